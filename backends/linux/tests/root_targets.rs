//! Targets: bad ones are refused before anything changes, odd ones work, and exactly what was made
//! is removed.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

mod kit;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use blockmount::{DeviceLocator, ErrorKind, Mounter};
use kit::{Image, KERNELS, Loop, Room, builder, guest, mount, on_linux, refused};

#[tokio::test]
async fn root_bad_targets_are_refused_and_nothing_is_left() {
    let mut room = Room::new();
    let device = Loop::new(&Image::Ext4.copy(room.path()));
    fs::create_dir_all(room.at("full/x")).unwrap();
    fs::create_dir_all(room.at("real/dir")).unwrap();
    fs::write(room.at("file"), "").unwrap();
    symlink(room.at("real"), room.at("link")).unwrap();
    symlink(room.at("nowhere"), room.at("dangling")).unwrap();
    room.settle();
    let guest = guest();
    let cases = [
        ("file", ErrorKind::Invalid, "file is not a directory"),
        ("file/x", ErrorKind::Invalid, "file is not a directory"),
        ("link", ErrorKind::Invalid, "link is a symbolic link"),
        ("link/dir", ErrorKind::Invalid, "link is a symbolic link"),
        (
            "dangling/x",
            ErrorKind::Invalid,
            "dangling is a symbolic link",
        ),
        ("full", ErrorKind::Conflict, "not empty"),
        ("full/../x", ErrorKind::Invalid, "'..'"),
    ];
    for (name, kind, words) in cases {
        let message = refused(mount(&guest, &device, &room.at(name), &[]).await, kind);
        assert!(message.contains(words), "{name}: {message}");
        room.assert_clean();
    }
    for system in [
        "/",
        "/proc",
        "/usr/local",
        "/etc/blockmount",
        "/tmp",
        "/dev/shm/x",
        "relative",
        "",
    ] {
        refused(
            mount(&guest, &device, Path::new(system), &[]).await,
            ErrorKind::Invalid,
        );
    }
    let long = room.at("n".repeat(256));
    refused(mount(&guest, &device, &long, &[]).await, ErrorKind::Invalid);
    room.assert_clean();
}

#[tokio::test]
async fn root_g19_a_taken_target_gets_no_second_mount() {
    for kernel in KERNELS {
        let mut room = Room::new();
        let one = Loop::new(&Image::Ext4.copy(room.path()));
        let other = Loop::new(&Image::Squashfs.copy(room.path()));
        room.settle();
        let guest = on_linux(kernel);
        mount(&guest, &one, &room.at("mnt"), &[]).await.unwrap();
        refused(
            mount(&guest, &other, &room.at("mnt"), &[]).await,
            ErrorKind::Conflict,
        );
        refused(
            mount(&on_linux(kernel), &other, &room.at("mnt"), &[]).await,
            ErrorKind::Conflict,
        );
        assert_eq!(room.mounts().len(), 1);
        guest.unmount(&room.at("mnt")).await.unwrap();
        room.assert_clean();
    }
}

#[tokio::test]
async fn root_any_bytes_make_a_name() {
    let deep = format!("{}/{}", "d".repeat(255), "e".repeat(255));
    let names: [&[u8]; 10] = [
        b"a space",
        b"a,comma",
        b"a:colon",
        b"a\nnewline",
        b"a\\back\\040slash",
        b"not\xfftext\xfe",
        b"#hash",
        b"-dash",
        "ü 文".as_bytes(),
        deep.as_bytes(),
    ];
    for kernel in [(4, 19), (6, 1), (u32::MAX, 0)] {
        let mut room = Room::new();
        let device = Loop::new(&Image::Erofs.copy(room.path()));
        room.settle();
        let guest = on_linux(kernel);
        for name in names {
            let target = room.at("some where").join(OsStr::from_bytes(name));
            mount(&guest, &device, &target, &["ro"]).await.unwrap();
            assert_eq!(fs::read_to_string(target.join("hello")).unwrap(), "erofs");
            assert_eq!(room.mounts().len(), 1);
            assert_eq!(room.mounts()[0].mount_point, target);
            guest.unmount(&target).await.unwrap();
            room.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_the_longest_path_works() {
    let mut room = Room::new();
    let device = Loop::new(&Image::Erofs.copy(room.path()));
    room.settle();
    let mut target = room.path().to_owned();
    while target.as_os_str().len() + 201 <= 4095 {
        target.push("p".repeat(200));
    }
    target.push("q".repeat(4095 - 1 - target.as_os_str().len()));
    assert_eq!(target.as_os_str().len(), 4095);
    let guest = guest();
    mount(&guest, &device, &target, &["ro"]).await.unwrap();
    assert_eq!(room.mounts().len(), 1);
    guest.unmount(&target).await.unwrap();
    room.assert_clean();
}

#[tokio::test]
async fn root_what_was_made_is_private_and_removed_and_what_was_there_stays() {
    let mut room = Room::new();
    let one = Loop::new(&Image::Ext4.copy(room.path()));
    let other = Loop::new(&Image::Erofs.copy(room.path()));
    fs::create_dir(room.at("old")).unwrap();
    room.settle();
    let guest = guest();
    mount(&guest, &one, &room.at("old/new/a"), &[])
        .await
        .unwrap();
    assert_eq!(
        fs::metadata(room.at("old/new"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o700
    );
    mount(&guest, &other, &room.at("old/new/b/c"), &[])
        .await
        .unwrap();
    guest.unmount(&room.at("old/new/a")).await.unwrap();
    assert!(!room.at("old/new/a").exists() && room.at("old/new/b/c/hello").exists());
    fs::write(room.at("old/new/theirs"), "").unwrap();
    guest.unmount(&room.at("old/new/b/c")).await.unwrap();
    assert!(!room.at("old/new/b").exists() && room.at("old/new/theirs").exists());
    fs::remove_file(room.at("old/new/theirs")).unwrap();
    fs::remove_dir(room.at("old/new")).unwrap();
    mount(&guest, &one, &room.at("old"), &[]).await.unwrap();
    guest.unmount(&room.at("old")).await.unwrap();
    room.assert_clean();
}

/// A mount below a mount goes before it, and its directories go inside of it.
#[tokio::test]
async fn root_a_mount_below_a_mount() {
    let mut room = Room::new();
    let outer = Loop::new(&Image::Ext4.copy(room.path()));
    let inner = Loop::new(&Image::Erofs.copy(room.path()));
    room.settle();
    let guest = guest();
    mount(&guest, &outer, &room.at("a"), &[]).await.unwrap();
    mount(&guest, &inner, &room.at("a/b/c"), &[]).await.unwrap();
    let message = refused(guest.unmount(&room.at("a")).await, ErrorKind::Busy);
    assert!(
        message.contains("the mount at") && message.contains("a/b/c"),
        "{message}"
    );
    guest.unmount(&room.at("a/b/c")).await.unwrap();
    assert!(!room.at("a/b").exists());
    guest.unmount(&room.at("a")).await.unwrap();
    room.assert_clean();
}

#[tokio::test]
async fn root_only_allowed_roots_are_mounted_at() {
    let mut room = Room::new();
    let device = Loop::new(&Image::Ext4.copy(room.path()));
    room.settle();
    let guest = builder()
        .allow_targets_under([room.at("in"), room.at("also")])
        .build();
    for outside in ["out", "in", "inside/x", "also"] {
        let message = refused(
            mount(&guest, &device, &room.at(outside), &[]).await,
            ErrorKind::Invalid,
        );
        assert!(message.contains("targets must be below"), "{message}");
    }
    mount(&guest, &device, &room.at("in/x"), &[]).await.unwrap();
    guest.unmount(&room.at("in/x")).await.unwrap();
    room.assert_clean();
}

/// Whatever fails, it fails before or after directories were made; none stays.
#[tokio::test]
async fn root_a_failed_mount_leaves_no_directory() {
    let mut room = Room::new();
    fs::write(room.at("no device"), "").unwrap();
    fs::write(room.at("no-device"), "").unwrap();
    room.settle();
    for kernel in KERNELS {
        let guest = on_linux(kernel);
        let absent: DeviceLocator = "test:/dev/blockmount-no-such-device".parse().unwrap();
        let at = room.at("a/b/c");
        refused(
            guest.mount(&absent, &at, &kit::options(&[])).await,
            ErrorKind::NotFound,
        );
        let file = DeviceLocator::new("test", room.at("no-device").display()).unwrap();
        refused(
            guest.mount(&file, &at, &kit::options(&[])).await,
            ErrorKind::Invalid,
        );
        let other: DeviceLocator = "scsi:0/1".parse().unwrap();
        refused(
            guest.mount(&other, &at, &kit::options(&[])).await,
            ErrorKind::Unsuitable,
        );
        room.assert_clean();
    }
}

#[tokio::test]
async fn root_many_at_once_do_not_get_into_each_others_way() {
    let mut room = Room::new();
    let devices: Vec<Loop> = (0..8)
        .map(|index| {
            fs::create_dir(room.at(index.to_string())).unwrap();
            Loop::new(&Image::Squashfs.copy(&room.at(index.to_string())))
        })
        .collect();
    room.settle();
    let guest = guest();
    let mut tasks = tokio::task::JoinSet::new();
    for (index, device) in devices.iter().enumerate() {
        let (guest, locator) = (guest.clone(), device.locator());
        let target = room.at("shared/way").join(index.to_string());
        tasks.spawn(async move {
            for _ in 0..20 {
                guest
                    .mount(&locator, &target, &kit::options(&["ro"]))
                    .await
                    .unwrap();
                guest.unmount(&target).await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    room.assert_clean();
}
