//! Mounts that are asked how full they are, trimmed, grown, and checked before.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

mod kit;

use std::fs;
use std::path::Path;
use std::process::Command;

use blockmount::{BackendError, Check, ErrorKind, Expose, Format, MountOptions, Mounter};
use blockmount_linux::LinuxGuest;
use kit::{Image, Loop, TestDir, blank, guest, mount, noise, options, refused, run};

const MIB: u64 = 1 << 20;

async fn make(guest: &LinuxGuest, device: &Loop, target: &Path, filesystem: &str) {
    let options = MountOptions::builder().format(Format::new(filesystem));
    let options = options.build().unwrap();
    guest
        .mount(&device.locator(), target, &options)
        .await
        .unwrap();
}

/// Grows an image and its loop device, as a host does.
fn grow_disk(image: &Path, device: &Loop, bytes: u64) {
    let file = fs::File::options().write(true).open(image).unwrap();
    file.set_len(bytes).unwrap();
    run("losetup", &["-c", device.node().to_str().unwrap()]);
}

/// Whether this process has the capability that ext4 wants for that, which root has not in every container.
fn can_grow_ext4() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let bits = lines.find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(bits.trim(), 16).unwrap() & 1 << 24 != 0
}

#[tokio::test]
async fn root_a_filesystem_grows_while_it_is_used_and_keeps_its_files() {
    for (filesystem, before, after) in [("ext4", 64, 256), ("xfs", 320, 512)] {
        let mut dir = TestDir::new();
        let image = dir.at("disk");
        blank(&image, before * MIB);
        let device = Loop::new(&image);
        dir.settle();
        let (guest, target) = (guest(), dir.at("mnt"));
        make(&guest, &device, &target, filesystem).await;
        let content = noise(3 << 20);
        fs::write(target.join("file"), &content).unwrap();
        if filesystem == "ext4" && !can_grow_ext4() {
            let message = refused(guest.grow(&target, before * MIB).await, ErrorKind::Other);
            assert!(message.contains("CAP_SYS_RESOURCE"), "{message}");
            guest.unmount(&target).await.unwrap();
            continue;
        }
        // What has not grown stays, and what the kernel has not seen is awaited in vain.
        guest.grow(&target, before * MIB).await.unwrap();
        let early = guest.grow(&target, after * MIB).await;
        let message = refused(early, ErrorKind::NotFound);
        assert!(message.contains("in time"), "{message}");
        let small = guest.usage(&target).await.unwrap().bytes;
        grow_disk(&image, &device, after * MIB);
        for _ in 0..2 {
            guest.grow(&target, after * MIB).await.unwrap();
        }
        let large = guest.usage(&target).await.unwrap().bytes;
        assert!(small.total < before * MIB, "{small:?}");
        assert!(large.total > after * MIB * 8 / 10, "{large:?}");
        assert!(large.used >= content.len() as u64 && large.available > small.total);
        // It can be filled beyond what it was.
        fs::write(
            target.join("more"),
            noise(before as usize * 2 * MIB as usize / 3),
        )
        .unwrap();
        guest.unmount(&target).await.unwrap();
        let check = ["e2fsck -f -n", "xfs_repair -n"][usize::from(filesystem == "xfs")];
        let (tool, arguments) = check.split_once(' ').unwrap();
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let node = device.node().to_str().unwrap();
        run(tool, &[&arguments[..], &[node]].concat());
        mount(&guest, &device, &target, &["ro"]).await.unwrap();
        assert!(fs::read(target.join("file")).unwrap() == content);
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_what_cannot_grow_says_what_it_is() {
    let mut dir = TestDir::new();
    let (ext4, erofs, gpt) = (
        Loop::new(&Image::Ext4.copy(dir.path())),
        Loop::new(&Image::Erofs.copy(dir.path())),
        Loop::new(&Image::Gpt.copy(dir.path())),
    );
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    refused(guest.grow(&target, 1).await, ErrorKind::NotFound);
    let part = MountOptions::builder().partition(2.try_into().unwrap());
    for (device, options, kind, words) in [
        (&ext4, options(&["ro"]), ErrorKind::Invalid, "read-only"),
        (&erofs, options(&[]), ErrorKind::Invalid, "read-only"),
        (
            &gpt,
            part.build().unwrap(),
            ErrorKind::Unsuitable,
            "a partition",
        ),
    ] {
        let locator = device.locator();
        guest.mount(&locator, &target, &options).await.unwrap();
        let message = refused(guest.grow(&target, 1).await, kind);
        assert!(message.contains(words), "{message}");
        guest.unmount(&target).await.unwrap();
    }
    dir.assert_clean();
}

#[tokio::test]
async fn root_a_mount_tells_its_usage_and_frees_what_it_does_not_use() {
    use std::os::unix::fs::MetadataExt;
    let mut dir = TestDir::new();
    let image = dir.at("disk");
    blank(&image, 64 * MIB);
    let device = Loop::new(&image);
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    refused(guest.usage(&target).await, ErrorKind::NotFound);
    refused(guest.trim(&target).await, ErrorKind::NotFound);
    make(&guest, &device, &target, "ext4").await;
    let empty = guest.usage(&target).await.unwrap();
    fs::write(target.join("file"), noise(8 << 20)).unwrap();
    rustix::fs::sync();
    let full = guest.usage(&target).await.unwrap();
    assert!(full.bytes.used >= empty.bytes.used + (8 << 20), "{full:?}");
    assert_eq!(full.inodes.used, empty.inodes.used + 1);
    assert_eq!(full.bytes.total, empty.bytes.total);
    let held = || fs::metadata(&image).unwrap().blocks() * 512;
    let with_file = held();
    fs::remove_file(target.join("file")).unwrap();
    rustix::fs::sync();
    let trimmed = guest.trim(&target).await.unwrap();
    assert!(trimmed > 8 << 20, "{trimmed}");
    assert!(held() + (8 << 20) <= with_file, "{} of {with_file}", held());
    guest.unmount(&target).await.unwrap();
    mount(&guest, &device, &target, &["ro"]).await.unwrap();
    refused(guest.trim(&target).await, ErrorKind::Invalid);
    guest.unmount(&target).await.unwrap();
    // A device is used by whoever has its node.
    let exposed = MountOptions::builder().expose(Expose::BlockDevice);
    let (locator, exposed) = (device.locator(), exposed.build().unwrap());
    guest.mount(&locator, &target, &exposed).await.unwrap();
    let usage = guest.usage(&target).await.unwrap();
    assert_eq!((usage.bytes.total, usage.bytes.used), (64 * MIB, 64 * MIB));
    refused(guest.trim(&target).await, ErrorKind::Unsuitable);
    grow_disk(&image, &device, 96 * MIB);
    guest.grow(&target, 96 * MIB).await.unwrap();
    assert_eq!(guest.usage(&target).await.unwrap().bytes.total, 96 * MIB);
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}

async fn checked(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    check: Check,
) -> Result<(), BackendError> {
    let options = MountOptions::builder().check(check).build().unwrap();
    guest.mount(&device.locator(), target, &options).await
}

fn debugfs(image: &Path, request: &str) {
    let done = Command::new("debugfs")
        .args(["-w", "-R", request])
        .arg(image)
        .output();
    assert!(done.unwrap().status.success());
}

#[tokio::test]
async fn root_a_damaged_filesystem_is_mounted_only_when_its_repair_was_asked_for() {
    let mut dir = TestDir::new();
    let image = Image::Ext4.copy(dir.path());
    // The file is in a directory, and does not know it: that is repaired without a loss.
    debugfs(&image, "set_inode_field hello links_count 7");
    let device = Loop::new(&image);
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    let before = fs::read(&image).unwrap();
    let message = refused(
        checked(&guest, &device, &target, Check::Verify).await,
        ErrorKind::Invalid,
    );
    assert!(
        message.contains("is damaged") && message.contains("ref count"),
        "{message}"
    );
    assert!(fs::read(&image).unwrap() == before, "nothing was written");
    dir.assert_clean();
    checked(&guest, &device, &target, Check::Repair)
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(target.join("hello")).unwrap(), "ext4");
    guest.unmount(&target).await.unwrap();
    checked(&guest, &device, &target, Check::Verify)
        .await
        .unwrap();
    // One that is mounted already is not checked under its users.
    checked(&guest, &device, &dir.at("again"), Check::Verify)
        .await
        .unwrap_err();
    guest.unmount(&target).await.unwrap();
    // What a repair would lose something by is for people.
    debugfs(device.node(), "set_inode_field <2> mode 0100644");
    let message = refused(
        checked(&guest, &device, &target, Check::Repair).await,
        ErrorKind::Invalid,
    );
    assert!(message.contains("not repaired unasked"), "{message}");
    dir.assert_clean();
}

#[tokio::test]
async fn root_what_cannot_be_checked_is_said() {
    let mut dir = TestDir::new();
    let dirty = Image::Ext4.copy(dir.path());
    debugfs(&dirty, "feature needs_recovery");
    let xfs = Image::Xfs.copy(dir.path());
    let (dirty, xfs) = (Loop::new(&dirty), Loop::new(&xfs));
    let erofs = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    for (device, check, kind, words) in [
        (
            &dirty,
            Check::Verify,
            ErrorKind::Invalid,
            "was not replayed",
        ),
        (&xfs, Check::Repair, ErrorKind::Unsuitable, "for people"),
        (
            &erofs,
            Check::Verify,
            ErrorKind::Unsuitable,
            "only of ext and xfs",
        ),
    ] {
        let message = refused(checked(&guest, device, &target, check).await, kind);
        assert!(message.contains(words), "{message}");
        dir.assert_clean();
    }
    checked(&guest, &xfs, &target, Check::Verify).await.unwrap();
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}
