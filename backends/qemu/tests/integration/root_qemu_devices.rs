//! Block devices of the host, passed through. Needs root, for loop devices.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount_scsi::testing::AttachIdentified as _;
use std::path::Path;
use std::process::Command;

use crate::common::{Qemu, address};
use blockmount::{Disk, ErrorKind};
use blockmount_scsi::Attacher;
use serde_json::json;

/// A loop device, freed when dropped.
struct Loop(String);

impl Loop {
    fn of(image: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(status.unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_qemu_takes_block_devices_that_nobody_uses() {
    let mut qemu = Qemu::start(1);
    // A QEMU that is stopped keeps the descriptors that it was passed, and with them the claim of a device.
    qemu.execute("cont", json!({}));
    let scsi = qemu.scsi().await;
    let before = qemu.tables();
    let image = qemu.image("image", 16 << 20);
    let device = Loop::of(&image);
    let (at, disk) = (address("0/0"), Disk::physical_disk(&device.0));

    let link = qemu.path("link");
    std::os::unix::fs::symlink(&device.0, &link).unwrap();
    let id = scsi.identify(&disk).await.unwrap();
    assert_eq!(scsi.identify(&Disk::physical_disk(link)).await.unwrap(), id);

    for disk in [disk.clone(), disk.clone().read_only()] {
        scsi.attach_identified(at, &disk).await.unwrap();
        let nodes = qemu.execute("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap();
        let file = nodes
            .iter()
            .find(|node| node["node-name"] == "bm-scsi-0-0-file")
            .unwrap();
        assert_eq!(
            (&file["drv"], &file["ro"]),
            (&json!("host_device"), &json!(disk.is_read_only()))
        );
        assert_eq!(file["image"]["virtual-size"], 16 << 20);
        scsi.detach(at).await.unwrap();
        assert_eq!(qemu.tables(), before);
    }

    // Neither is taken for the other.
    for (disk, says) in [
        (
            Disk::virtual_disk(&device.0),
            "attach it as a physical disk",
        ),
        (Disk::physical_disk(&image), "not a block device"),
    ] {
        let error = scsi.attach_identified(at, &disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }

    // A filesystem that is mounted here is not written to from there.
    let made = Command::new("mkfs.ext4").arg("-q").arg(&device.0).status();
    assert!(made.unwrap().success());
    let mount = Mounted::at(&device.0, &qemu.path("m"));
    let error = scsi.attach_identified(at, &disk).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(qemu.tables(), before);
    drop(mount);
    scsi.attach_identified(at, &disk).await.unwrap();
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

/// A mount, undone when dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn at(device: &str, path: &Path) -> Self {
        std::fs::create_dir(path).unwrap();
        let status = Command::new("mount").arg(device).arg(path).status();
        assert!(status.unwrap().success());
        Mounted(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}
