//! An image of busybox, as a registry has images: layers that are stacked.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::servers::{self, Client};

/// Where Debian's package puts it, without libraries.
pub const BUSYBOX: &str = "/bin/busybox";

/// The layers of the image, the topmost first: an application over what it needs.
pub fn layers(dir: &TempDir) -> [PathBuf; 2] {
    let [app, base] = ["app", "base"].map(|name| dir.path().join(name));
    for directory in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(base.join(directory)).unwrap();
    }
    fs::copy(BUSYBOX, base.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "sleep", "echo", "ls"] {
        std::os::unix::fs::symlink("busybox", base.join("bin").join(name)).unwrap();
    }
    fs::write(base.join("etc/release"), "base\n").unwrap();
    fs::create_dir_all(app.join("app")).unwrap();
    fs::create_dir_all(app.join("etc")).unwrap();
    fs::write(app.join("etc/release"), "app\n").unwrap();
    let script = app.join("app/hello");
    fs::write(
        &script,
        "#!/bin/sh\ncat /etc/release\necho \"from $1\" > /app/written\ncat /app/written\n",
    )
    .unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    [app, base].map(|tree| {
        let image = tree.with_extension("erofs");
        let made = Command::new("mkfs.erofs")
            .arg("--quiet")
            .args([&image, &tree])
            .status();
        assert!(made.unwrap().success());
        image
    })
}

/// Activates an image for a container, with a scratch of its own, and says where its tree is.
pub fn activate(dir: &TempDir, client: &mut Client, name: &str, layers: &[PathBuf]) -> PathBuf {
    let scratch = dir.path().join(format!("{name}.img"));
    let mut list: Vec<Value> = vec![servers::writable(scratch)];
    list.extend(layers.iter().map(servers::layer));
    list.push(servers::overlay(layers.len()));
    client.activate(name, &list).last().unwrap().clone()
}
