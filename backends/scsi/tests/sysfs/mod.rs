//! A made-up tree with the layout of `/sys`, whose disks are real loop devices.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmount_linux::device::DeviceNumber;
use tempfile::TempDir;

/// A loop device of a mebibyte, gone with the value.
#[derive(Debug)]
pub(crate) struct Loop {
    node: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    pub(crate) const SIZE: u64 = 1 << 20;

    pub(crate) fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(Self::SIZE).unwrap();
        // Another test may take the free device in between.
        for _ in 0..50 {
            let mut command = Command::new("losetup");
            let output = command
                .args(["-f", "--show"])
                .arg(file.path())
                .output()
                .unwrap();
            if output.status.success() {
                let node = String::from_utf8(output.stdout).unwrap().trim().into();
                return Loop { node, _file: file };
            }
        }
        panic!("no loop device");
    }

    pub(crate) fn node(&self) -> &Path {
        &self.node
    }

    fn name(&self) -> &str {
        self.node.file_name().unwrap().to_str().unwrap()
    }

    pub(crate) fn number(&self) -> String {
        let rdev = fs::metadata(&self.node).unwrap().rdev();
        DeviceNumber::from_rdev(rdev).to_string()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup")
            .arg("-d")
            .arg(&self.node)
            .status()
            .unwrap();
        assert!(done.success() || std::thread::panicking());
    }
}

/// The tree. Whatever is put there stays until it is removed.
#[derive(Debug)]
pub(crate) struct Tree(TempDir);

impl Tree {
    pub(crate) fn new() -> Self {
        Tree(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    /// A virtio controller with a SCSI host.
    pub(crate) fn host(&self, pci: &str, host: u32) {
        fs::create_dir_all(self.at(&format!("bus/pci/devices/{pci}/virtio0/host{host}"))).unwrap();
        self.write(&format!("class/scsi_host/host{host}/scan"), "");
    }

    /// A SCSI device, such as `3:0:0:5`, that is a loop device.
    pub(crate) fn disk(&self, device: &str, disk: &Loop) {
        self.write(&format!("bus/scsi/devices/{device}/state"), "running\n");
        self.write(&format!("bus/scsi/devices/{device}/delete"), "");
        self.block(&format!("bus/scsi/devices/{device}"), disk);
    }

    /// The block device of a device.
    pub(crate) fn block(&self, device: &str, disk: &Loop) {
        let block = format!("{device}/block/{}", disk.name());
        self.name(&block, disk, disk.name());
        self.write(&format!("{block}/size"), format!("{}\n", Loop::SIZE / 512));
        let link = self.at(&format!("dev/block/{}", disk.number()));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&link);
        symlink(self.at(&block), link).unwrap();
    }

    /// Says which node the directory `block` of a loop device has.
    pub(crate) fn name(&self, block: &str, disk: &Loop, node: &str) {
        let number = disk.number();
        let (major, minor) = number.split_once(':').unwrap();
        // Older kernels do not count their disks.
        let counted = fs::read_to_string(format!("/sys/dev/block/{number}/diskseq"));
        let counted = counted.map_or(String::new(), |count| format!("DISKSEQ={count}"));
        let uevent = format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={node}\n{counted}");
        self.write(&format!("{block}/uevent"), uevent);
    }

    pub(crate) fn rename(&self, from: &str, to: &str) {
        fs::rename(self.at(from), self.at(to)).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        fs::remove_dir_all(self.at(path)).unwrap();
    }
}
