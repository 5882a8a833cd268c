//! As many layers as the kernel stacks, and more; layers in images of other formats; stacks in files.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    Answer, alone, assert_nothing_left, hold, hold_by, image, in_kernel, program, run, run_id, temp,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// So many small layers, as words of the command line.
fn layers(dir: &TempDir, count: usize) -> Vec<String> {
    let first = dir.path().join("first");
    image("erofs", &first, &[("file", "text")]);
    let copy = |number: usize| -> PathBuf {
        let path = dir.path().join(format!("layer{number}"));
        fs::copy(&first, &path).unwrap();
        path
    };
    let words = (0..count).flat_map(|number| {
        let path = copy(number).to_str().unwrap().to_owned();
        ["--layer".to_owned(), path]
    });
    let at = dir.path().join("at").to_str().unwrap().to_owned();
    words.chain(["--at".to_owned(), at]).collect()
}

fn loop_devices() -> usize {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let is_loop = |name: &str| name.starts_with("loop");
    devices
        .filter(|device| is_loop(&device.file_name().to_string_lossy()))
        .count()
}

#[test]
fn root_u17_300_layers_again_and_again_make_no_more_loop_devices() {
    let _alone = alone();
    let dir = temp();
    let arguments = layers(&dir, 300);
    let mut counts = Vec::new();
    for _ in 0..3 {
        let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
        assert_eq!(held.json["layers"].as_array().unwrap().len(), 300);
        assert_eq!(
            fs::read_to_string(dir.path().join("at/file")).unwrap(),
            "text"
        );
        let answer = held.end(Signal::TERM);
        answer.says(0, &["nothing is left"]);
        counts.push(loop_devices());
    }
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
    assert_eq!(counts[1..], [counts[0]; 2], "loop devices after each run");
}

#[test]
fn root_u17_more_layers_than_linux_stacks_are_refused_before_anything_is_attached() {
    let dir = temp();
    let Err(answer) = hold(layers(&dir, 1_000)) else {
        panic!("1,000 layers were mounted");
    };
    answer.says(2, &["1000 layers", "500"]);
    assert_eq!(common::run_id(&answer.stderr), None, "{answer}");
    assert!(in_kernel(dir.path().file_name().unwrap()).is_empty());
}

/// An image with one file, in a format of `qemu-img`.
fn convert(dir: &TempDir, name: &str, words: &[&str]) -> String {
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let raw = path(&format!("{name}.raw"));
    image("erofs", Path::new(&raw), &[(name, name)]);
    tool(
        "qemu-img",
        &[&["convert", "-f", "raw"], words, &[&raw, &path(name)]].concat(),
    );
    path(name)
}

fn tool(name: &str, arguments: &[&str]) {
    let output = Command::new(name).args(arguments).output().unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
}

/// The storage daemon that a program has started.
fn storage_daemon(parent: u32) -> u32 {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_it = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{parent}\n"))
            && status.starts_with("Name:\tqemu-storage-da")
    };
    processes.find(is_it).unwrap()
}

fn refused<S: AsRef<str>>(words: &[S]) -> Answer {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    hold(words)
        .map(|held| drop(held.end(Signal::TERM)))
        .unwrap_err()
}

#[test]
fn root_u17_images_of_other_formats_are_layers() {
    let _alone = alone();
    let dir = temp();
    let at = dir.path().join("at").to_str().unwrap().to_owned();
    let images = [
        convert(&dir, "grows.vhd", &["-O", "vpc"]),
        convert(&dir, "fixed.vhd", &["-O", "vpc", "-o", "subformat=fixed"]),
        convert(&dir, "grows.vhdx", &["-O", "vhdx"]),
        convert(&dir, "fixed.VHDX", &["-O", "vhdx", "-o", "subformat=fixed"]),
        convert(&dir, "own.qcow2", &["-O", "qcow2"]),
    ];
    let mut arguments = vec!["--scratch", "8M", "--at", &at];
    arguments.extend(images.iter().flat_map(|image| ["--layer", image]));
    let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
    for image in &images {
        let name = Path::new(image).file_name().unwrap();
        let text = fs::read_to_string(Path::new(&at).join(name)).unwrap();
        assert_eq!(Path::new(&text), Path::new(name));
    }
    assert_eq!(held.json["layers"][0]["source"], images[0]);
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);

    // Who shows them is killed: the mount ends, and says why.
    let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
    common::signal(storage_daemon(held.pid()), Signal::KILL);
    let answer = held.wait();
    answer.says(
        1,
        &[
            "qemu-storage-daemon, which shows images, has ended",
            "SIGKILL",
        ],
    );
    assert_nothing_left(&answer, &dir);

    // The program is killed, and takes it along: a clean-up removes all.
    let held = hold(&arguments).unwrap_or_else(|answer| panic!("{answer}"));
    let said = held.kill();
    let id = run_id(&said).unwrap();
    assert!(in_kernel(id).iter().any(|line| line.contains("fuse")));
    common::clean_up(&[]).says(0, &[]);
    assert_eq!(in_kernel(id), Vec::<String>::new());
    assert!(!Path::new(&format!("/var/tmp/blockmount-{id}")).exists());
}

#[test]
fn root_u17_an_image_of_another_format_opens_no_other_file() {
    let dir = temp();
    let at = dir.path().join("at").to_str().unwrap().to_owned();
    let base = convert(&dir, "base.qcow2", &["-O", "qcow2"]);
    let top = dir.path().join("top.qcow2").to_str().unwrap().to_owned();
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top,
        ],
    );
    let words = ["--at", &at, "--layer", &top];
    let answer = refused(&words);
    answer.says(1, &["has a backing file", "--allow-backing"]);
    assert_nothing_left(&answer, &dir);
    let allowed = [&words[..], &["--allow-backing"]].concat();
    let held = hold(&allowed).unwrap_or_else(|answer| panic!("{answer}"));
    assert!(Path::new(&at).join("base.qcow2").exists());
    held.end(Signal::TERM).says(0, &["nothing is left"]);

    let vhdx = convert(&dir, "child.vhdx", &["-O", "vhdx"]);
    let vhd = convert(&dir, "child.vhd", &["-O", "vpc"]);
    let file = |path: &str| {
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    };
    // The type of a disk that is the difference to another.
    file(&vhd).write_at(&[4], 63).unwrap();
    // The flag of one that has a parent, behind the size of its blocks.
    let mut bytes = fs::read(&vhdx).unwrap();
    let parameters = 1_048_576..bytes.len();
    let id = b"\x37\x67\xa1\xca\x36\xfa\x43\x4d";
    let found = bytes[parameters]
        .windows(8)
        .enumerate()
        .find(|(_, window)| window == id);
    let entry = 1_048_576 + found.unwrap().0;
    let table = (entry - 32) / 65_536 * 65_536;
    let offset = u32::from_le_bytes(bytes[entry + 16..entry + 20].try_into().unwrap());
    bytes[table + offset as usize + 4] |= 2;
    fs::write(&vhdx, bytes).unwrap();
    let damaged = dir.path().join("damaged.vhdx").to_str().unwrap().to_owned();
    fs::write(&damaged, vec![0; 1 << 20]).unwrap();
    for (image, words) in [
        (&vhd, "is the difference to another image"),
        (&vhdx, "is the difference to another image"),
        (&damaged, "is named as a vhdx image and is none"),
    ] {
        let answer = refused(&["--allow-backing", "--at", &at, "--layer", image]);
        answer.says(1, &[words]);
        assert_nothing_left(&answer, &dir);
    }
    let named = refused(&["--name", "u17-format", "--at", &at, "--layer", &base]);
    named.says(2, &["outlives this program", "qemu-img convert"]);
    // What is missing on a machine is named.
    let mut command = program(["mount", "--json", "--at", &at, "--layer", &base]);
    command.env("PATH", "/nonexistent");
    let answer = hold_by(command)
        .map(|held| drop(held.end(Signal::TERM)))
        .unwrap_err();
    answer.says(1, &["qemu-storage-daemon", "install it"]);
    assert_nothing_left(&answer, &dir);
}

#[test]
fn root_a_stack_is_mounted_from_a_file() {
    let dir = temp();
    image("erofs", dir.path().join("app.erofs"), &[("app", "text")]);
    image("ext4", dir.path().join("base.img"), &[("base", "text")]);
    let text = "at = \"tree\"\noptions = [\"nodev\"]\n[scratch]\nsize = \"8M\"\n\
                [[layer]]\nimage = \"app.erofs\"\n[[layer]]\nimage = \"base.img\"\noptions = [\"noatime\"]\n";
    let file = dir.path().join("stack.toml").to_str().unwrap().to_owned();
    fs::write(&file, text).unwrap();
    let held = hold(["--file", &file]).unwrap_or_else(|answer| panic!("{answer}"));
    let tree = dir.path().join("tree");
    assert!(tree.join("app").exists() && tree.join("base").exists());
    fs::write(tree.join("new"), "writable").unwrap();
    assert_eq!(held.json["target"], tree.to_str().unwrap());
    let answer = held.end(Signal::TERM);
    answer.says(0, &["nothing is left"]);
    assert_nothing_left(&answer, &dir);
    // A mistake is told of before anything is made.
    fs::write(&file, text.replace("image", "imgae")).unwrap();
    let answer = run(["mount", "--file", &file]);
    answer.says(2, &["line 6, column 1", "unknown field `imgae`"]);
    assert_eq!(run_id(&answer.stderr), None);
}
