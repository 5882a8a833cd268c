//! Making filesystems: on what is blank, with fixed features, and never over anything else.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::kit::{
    Image, Loop, TestDir, blank, builder, guest, mount, mount_at, refused, run, short_wait, umount,
};
use blockmount::{BackendError, ErrorKind, Format, MountOptions, Mounter};
use blockmount_linux::LinuxGuest;
use blockmount_linux::probe::{Content, Superblock, probe};

async fn ensure(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    format: Format,
) -> Result<(), BackendError> {
    let options = MountOptions::builder().format(format).build().unwrap();
    guest.mount(&device.locator(), target, &options).await
}

fn found_on(device: &Loop) -> Content {
    let mut open = fs::File::open(device.node()).unwrap();
    probe(&mut open).unwrap().content
}

fn filesystem_on(device: &Loop) -> Superblock {
    match found_on(device) {
        Content::Filesystem(found) => found,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn root_a_blank_device_is_formatted_once_and_then_kept() {
    const UUID: &str = "0f3c0e0a-1d1c-4e1b-9d54-0a1b2c3d4e5f";
    for filesystem in ["ext4", "xfs"] {
        let mut dir = TestDir::new();
        blank(&dir.at("disk"), 512 << 20);
        let device = Loop::new(&dir.at("disk"));
        dir.settle();
        let guest = guest();
        let format = || Format::new(filesystem).label("a-label").uuid(UUID);
        ensure(&guest, &device, &dir.at("mnt"), format())
            .await
            .unwrap();
        assert_eq!(mount_at(&dir.at("mnt")).filesystem, filesystem);
        fs::write(dir.at("mnt/kept"), "x").unwrap();
        guest.unmount(&dir.at("mnt")).await.unwrap();
        let found = filesystem_on(&device);
        assert_eq!(found.label.as_deref(), Some("a-label"));
        assert_eq!(found.uuid.as_deref(), Some(UUID));
        // Nothing that a kernel of 2018 does not know.
        assert!(found.features.is_empty(), "{found:?}");
        ensure(&guest, &device, &dir.at("mnt"), Format::new(filesystem))
            .await
            .unwrap();
        assert_eq!(fs::read_to_string(dir.at("mnt/kept")).unwrap(), "x");
        guest.unmount(&dir.at("mnt")).await.unwrap();
        // By force, it is made anew.
        let anew = Format::new(filesystem).overwriting_everything();
        ensure(&guest, &device, &dir.at("mnt"), anew).await.unwrap();
        assert!(!dir.at("mnt/kept").exists());
        guest.unmount(&dir.at("mnt")).await.unwrap();
        assert_ne!(filesystem_on(&device).uuid.as_deref(), Some(UUID));
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g03_what_is_not_blank_is_not_overwritten() {
    let mut dir = TestDir::new();
    blank(&dir.at("raw"), 64 << 20);
    let file = fs::File::options().write(true).open(dir.at("raw")).unwrap();
    // The last byte that the proof reads, and no signature of anything.
    file.write_all_at(b"x", (64 << 20) - 1).unwrap();
    let images = [Image::Xfs, Image::Squashfs, Image::Gpt, Image::Swap];
    let mut paths: Vec<_> = images.iter().map(|image| image.copy(dir.path())).collect();
    paths.push(dir.at("raw"));
    for path in paths {
        let device = Loop::new(&path);
        dir.settle();
        let before = fs::read(&path).unwrap();
        let tried = ensure(&guest(), &device, &dir.at("mnt"), Format::new("ext4")).await;
        let message = refused(tried, ErrorKind::Conflict);
        assert!(message.contains("it is not blank"), "{message}");
        assert!(fs::read(&path).unwrap() == before);
        dir.assert_clean();
    }
    let device = Loop::new(&dir.at("raw"));
    let force = Format::new("ext4").overwriting_everything();
    let guest = guest();
    ensure(&guest, &device, &dir.at("mnt"), force)
        .await
        .unwrap();
    guest.unmount(&dir.at("mnt")).await.unwrap();
}

#[tokio::test]
async fn root_a_device_that_is_in_use_or_read_only_is_not_formatted() {
    let mut dir = TestDir::new();
    let (used, read_only) = (dir.at("used"), dir.at("read-only"));
    blank(&read_only, 64 << 20);
    fs::rename(Image::Ext4.copy(dir.path()), &used).unwrap();
    fs::create_dir(dir.at("theirs")).unwrap();
    let device = Loop::new(&used);
    dir.settle();
    let theirs = dir.at("theirs");
    run(
        "mount",
        &[device.node().to_str().unwrap(), theirs.to_str().unwrap()],
    );
    let force = || Format::new("ext4").overwriting_everything();
    let tried = ensure(&short_wait().build(), &device, &dir.at("mnt"), force()).await;
    umount(theirs);
    let message = refused(tried, ErrorKind::Busy);
    assert!(message.contains("theirs"), "{message}");
    for format in [force(), Format::new("ext4")] {
        let device = Loop::read_only(&read_only);
        let tried = ensure(&guest(), &device, &dir.at("mnt"), format).await;
        refused(tried, ErrorKind::Other);
    }
    dir.assert_clean();
}

/// A device too small for any filesystem: the tool says why, and the device is blank as before.
#[tokio::test]
async fn root_the_tools_words_are_in_the_error_and_the_device_is_blank_again() {
    for (filesystem, size, tool, words) in [
        ("ext4", 16 << 10, "mke2fs", "Not enough space"),
        ("xfs", 8 << 20, "mkfs.xfs", "too small"),
    ] {
        let mut dir = TestDir::new();
        blank(&dir.at("disk"), size);
        let device = Loop::new(&dir.at("disk"));
        dir.settle();
        let tried = ensure(&guest(), &device, &dir.at("a/mnt"), Format::new(filesystem)).await;
        let message = refused(tried, ErrorKind::Other);
        assert!(
            message.contains(&format!("{tool} failed with status")),
            "{message}"
        );
        assert!(
            message.contains(words) && !message.contains("Usage"),
            "{message}"
        );
        assert_eq!(found_on(&device), Content::Blank);
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g16_a_tool_that_does_not_end_in_time_is_killed_and_nothing_is_left() {
    let mut dir = TestDir::new();
    blank(&dir.at("disk"), 4 << 30);
    let device = Loop::new(&dir.at("disk"));
    dir.settle();
    let guest = builder().format_timeout(Duration::ZERO).build();
    let began = Instant::now();
    let tried = ensure(&guest, &device, &dir.at("mnt"), Format::new("ext4")).await;
    let message = refused(tried, ErrorKind::Other);
    assert!(message.contains("was killed"), "{message}");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(found_on(&device), Content::Blank);
    dir.assert_clean();
}

/// Formats at once wait for each other, and each is of its own device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_many_devices_are_formatted_at_once() {
    let mut dir = TestDir::new();
    let mut devices = Vec::new();
    for n in 0..12 {
        blank(&dir.at(format!("disk{n}")), 64 << 20);
        devices.push(Loop::new(&dir.at(format!("disk{n}"))));
    }
    dir.settle();
    let guest = guest();
    let all = devices.iter().enumerate().map(|(n, device)| {
        let (guest, target, locator) = (guest.clone(), dir.at(format!("mnt{n}")), device.locator());
        tokio::spawn(async move {
            let format = Format::new("ext4").label(format!("disk{n}"));
            let options = MountOptions::builder().format(format).build().unwrap();
            guest.mount(&locator, &target, &options).await
        })
    });
    for done in all.collect::<Vec<_>>() {
        done.await.unwrap().unwrap();
    }
    for (n, device) in devices.iter().enumerate() {
        guest.unmount(&dir.at(format!("mnt{n}"))).await.unwrap();
        assert_eq!(filesystem_on(device).label, Some(format!("disk{n}")));
    }
    dir.assert_clean();
}

#[tokio::test]
async fn root_what_cannot_be_made_is_refused_before_anything_is_touched() {
    let mut dir = TestDir::new();
    blank(&dir.at("disk"), 64 << 20);
    let device = Loop::new(&dir.at("disk"));
    dir.settle();
    for filesystem in ["btrfs", "erofs", "vfat"] {
        let force = Format::new(filesystem).overwriting_everything();
        let tried = ensure(&guest(), &device, &dir.at("mnt"), force).await;
        let message = refused(tried, ErrorKind::Unsuitable);
        assert!(
            message.starts_with("cannot make a filesystem of type"),
            "{message}"
        );
        assert_eq!(found_on(&device), Content::Blank);
        dir.assert_clean();
    }
}

/// What this machine has configured for filesystems of its own does not decide.
#[tokio::test]
async fn root_u20_a_partition_is_formatted_with_what_any_kernel_mounts() {
    let mut dir = TestDir::new();
    blank(&dir.at("disk"), 64 << 20);
    let script = dir.at("script");
    fs::write(&script, "label: gpt\nsize=20MiB\nsize=20MiB\n").unwrap();
    let input = fs::File::open(&script).unwrap();
    let table = std::process::Command::new("sfdisk")
        .arg("-q")
        .arg(dir.at("disk"))
        .stdin(input)
        .status();
    assert!(table.unwrap().success());
    let device = Loop::with_partitions(&dir.at("disk"));
    dir.settle();
    let guest = guest();
    let options = MountOptions::builder()
        .partition(2.try_into().unwrap())
        .format(Format::new("ext4"))
        .build()
        .unwrap();
    guest
        .mount(&device.locator(), &dir.at("mnt"), &options)
        .await
        .unwrap();
    guest.unmount(&dir.at("mnt")).await.unwrap();
    let on_whole = MountOptions::builder()
        .partition(2.try_into().unwrap())
        .read_only()
        .build()
        .unwrap();
    guest
        .mount(&device.locator(), &dir.at("mnt"), &on_whole)
        .await
        .unwrap();
    guest.unmount(&dir.at("mnt")).await.unwrap();
    mount(&guest, &device, &dir.at("mnt"), &["ro"])
        .await
        .unwrap_err();
    dir.assert_clean();
}
