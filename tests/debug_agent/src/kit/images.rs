//! Images of filesystems, made by tools that need no root.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Makes an image with these files by a tool that needs no root.
pub fn image(filesystem: &str, image: impl AsRef<Path>, files: &[(&str, &str)]) {
    let (image, content) = (image.as_ref(), tempfile::tempdir().unwrap());
    for (name, text) in files {
        let path = content.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let mut command = match filesystem {
        "erofs" => tool("mkfs.erofs"),
        "squashfs" => tool("mksquashfs"),
        "ext4" => tool("mkfs.ext4"),
        other => panic!("no images of {other}"),
    };
    match filesystem {
        "erofs" => command.arg(image).arg(content.path()),
        "squashfs" => command
            .arg(content.path())
            .arg(image)
            .args(["-noappend", "-no-progress"]),
        _ => {
            fs::File::create(image).unwrap().set_len(8 << 20).unwrap();
            command
                .args(["-q", "-F", "-L", "test-label", "-d"])
                .arg(content.path())
                .arg(image)
        }
    };
    run_tool(command);
}

/// Makes an image with a GPT, and an ext4 with these files on partition 2.
pub fn partitioned(disk: impl AsRef<Path>, files: &[(&str, &str)]) {
    let (disk, filesystem) = (disk.as_ref(), tempfile::NamedTempFile::new().unwrap());
    image("ext4", filesystem.path(), files);
    fs::File::create(disk).unwrap().set_len(12 << 20).unwrap();
    let mut sfdisk = tool("sfdisk")
        .arg("-q")
        .arg(disk)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::{Seek, SeekFrom, Write};
    let table = "label: gpt\nstart=2048,size=2048,name=first\nstart=4096,size=16384,name=second\n";
    sfdisk
        .stdin
        .take()
        .unwrap()
        .write_all(table.as_bytes())
        .unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let mut disk = fs::File::options().write(true).open(disk).unwrap();
    disk.seek(SeekFrom::Start(4096 * 512)).unwrap();
    std::io::copy(&mut fs::File::open(filesystem.path()).unwrap(), &mut disk).unwrap();
}

/// A tool of the system, also of its administrators.
pub fn tool(name: &str) -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new(name);
    command.env("PATH", path);
    command
}

/// Runs a tool, which must succeed.
pub fn run_tool(mut command: Command) {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(
        status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
}
