//! Targets: bad ones are refused before anything changes, odd ones work, and exactly what was made
//! is removed.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::kit::{
    self, Image, KERNELS, Loop, TestDir, builder, guest, mount, on_linux, refused, short_wait,
};
use blockmount::{DeviceLocator, ErrorKind, Mounter};

#[tokio::test]
async fn root_bad_targets_are_refused_and_nothing_is_left() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::create_dir_all(dir.at("full/x")).unwrap();
    fs::create_dir_all(dir.at("real/dir")).unwrap();
    fs::write(dir.at("file"), "").unwrap();
    symlink(dir.at("real"), dir.at("link")).unwrap();
    symlink(dir.at("nowhere"), dir.at("dangling")).unwrap();
    dir.settle();
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
        let message = refused(mount(&guest, &device, &dir.at(name), &[]).await, kind);
        assert!(message.contains(words), "{name}: {message}");
        dir.assert_clean();
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
    let long = dir.at("n".repeat(256));
    refused(mount(&guest, &device, &long, &[]).await, ErrorKind::Invalid);
    dir.assert_clean();
}

#[tokio::test]
async fn root_g19_a_taken_target_gets_no_second_mount() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let one = Loop::new(&Image::Ext4.copy(dir.path()));
        let other = Loop::new(&Image::Squashfs.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        mount(&guest, &one, &dir.at("mnt"), &[]).await.unwrap();
        refused(
            mount(&guest, &other, &dir.at("mnt"), &[]).await,
            ErrorKind::Conflict,
        );
        refused(
            mount(&on_linux(kernel), &other, &dir.at("mnt"), &[]).await,
            ErrorKind::Conflict,
        );
        assert_eq!(dir.mounts().len(), 1);
        guest.unmount(&dir.at("mnt")).await.unwrap();
        dir.assert_clean();
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
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Erofs.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        for name in names {
            let target = dir.at("some where").join(OsStr::from_bytes(name));
            mount(&guest, &device, &target, &["ro"]).await.unwrap();
            assert_eq!(fs::read_to_string(target.join("hello")).unwrap(), "erofs");
            assert_eq!(dir.mounts().len(), 1);
            assert_eq!(dir.mounts()[0].mount_point, target);
            guest.unmount(&target).await.unwrap();
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_the_longest_path_works() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let mut target = dir.path().to_owned();
    while target.as_os_str().len() + 201 <= 4095 {
        target.push("p".repeat(200));
    }
    target.push("q".repeat(4095 - 1 - target.as_os_str().len()));
    assert_eq!(target.as_os_str().len(), 4095);
    let guest = guest();
    mount(&guest, &device, &target, &["ro"]).await.unwrap();
    assert_eq!(dir.mounts().len(), 1);
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_what_was_made_is_private_and_removed_and_what_was_there_stays() {
    let mut dir = TestDir::new();
    let one = Loop::new(&Image::Ext4.copy(dir.path()));
    let other = Loop::new(&Image::Erofs.copy(dir.path()));
    fs::create_dir(dir.at("old")).unwrap();
    dir.settle();
    let guest = guest();
    mount(&guest, &one, &dir.at("old/new/a"), &[])
        .await
        .unwrap();
    assert_eq!(
        fs::metadata(dir.at("old/new"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o700
    );
    mount(&guest, &other, &dir.at("old/new/b/c"), &[])
        .await
        .unwrap();
    guest.unmount(&dir.at("old/new/a")).await.unwrap();
    assert!(!dir.at("old/new/a").exists() && dir.at("old/new/b/c/hello").exists());
    fs::write(dir.at("old/new/theirs"), "").unwrap();
    guest.unmount(&dir.at("old/new/b/c")).await.unwrap();
    assert!(!dir.at("old/new/b").exists() && dir.at("old/new/theirs").exists());
    fs::remove_file(dir.at("old/new/theirs")).unwrap();
    fs::remove_dir(dir.at("old/new")).unwrap();
    mount(&guest, &one, &dir.at("old"), &[]).await.unwrap();
    guest.unmount(&dir.at("old")).await.unwrap();
    dir.assert_clean();
}

/// A mount below a mount goes before it, and its directories go inside of it.
#[tokio::test]
async fn root_a_mount_below_a_mount() {
    let mut dir = TestDir::new();
    let outer = Loop::new(&Image::Ext4.copy(dir.path()));
    let inner = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let guest = short_wait().build();
    mount(&guest, &outer, &dir.at("a"), &[]).await.unwrap();
    mount(&guest, &inner, &dir.at("a/b/c"), &[]).await.unwrap();
    let message = refused(guest.unmount(&dir.at("a")).await, ErrorKind::Busy);
    assert!(
        message.contains("the mount at") && message.contains("a/b/c"),
        "{message}"
    );
    guest.unmount(&dir.at("a/b/c")).await.unwrap();
    assert!(!dir.at("a/b").exists());
    guest.unmount(&dir.at("a")).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_only_allowed_roots_are_mounted_at() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = builder()
        .allow_targets_under([dir.at("in"), dir.at("also")])
        .build();
    for outside in ["out", "in", "inside/x", "also"] {
        let message = refused(
            mount(&guest, &device, &dir.at(outside), &[]).await,
            ErrorKind::Invalid,
        );
        assert!(message.contains("targets must be below"), "{message}");
    }
    mount(&guest, &device, &dir.at("in/x"), &[]).await.unwrap();
    guest.unmount(&dir.at("in/x")).await.unwrap();
    dir.assert_clean();
}

/// Whatever fails, it fails before or after directories were made; none stays.
#[tokio::test]
async fn root_a_failed_mount_leaves_no_directory() {
    let mut dir = TestDir::new();
    fs::write(dir.at("no device"), "").unwrap();
    fs::write(dir.at("no-device"), "").unwrap();
    dir.settle();
    for kernel in KERNELS {
        let guest = on_linux(kernel);
        let absent: DeviceLocator = "test:/dev/blockmount-no-such-device".parse().unwrap();
        let at = dir.at("a/b/c");
        refused(
            guest.mount(&absent, &at, &kit::options(&[])).await,
            ErrorKind::NotFound,
        );
        let file = DeviceLocator::new("test", dir.at("no-device").display()).unwrap();
        refused(
            guest.mount(&file, &at, &kit::options(&[])).await,
            ErrorKind::Invalid,
        );
        let other: DeviceLocator = "scsi:0/1".parse().unwrap();
        refused(
            guest.mount(&other, &at, &kit::options(&[])).await,
            ErrorKind::Unsuitable,
        );
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_many_at_once_do_not_get_into_each_others_way() {
    let mut dir = TestDir::new();
    let devices: Vec<Loop> = (0..8)
        .map(|index| {
            fs::create_dir(dir.at(index.to_string())).unwrap();
            Loop::new(&Image::Squashfs.copy(&dir.at(index.to_string())))
        })
        .collect();
    dir.settle();
    let guest = guest();
    let mut tasks = tokio::task::JoinSet::new();
    for (index, device) in devices.iter().enumerate() {
        let (guest, locator) = (guest.clone(), device.locator());
        let target = dir.at("shared/way").join(index.to_string());
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
    dir.assert_clean();
}

/// Whoever is late takes its mount away again, also where it finds the target free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_r06_of_two_processes_with_one_target_one_mounts() {
    let images = tempfile::tempdir().unwrap();
    let [one, two] =
        [Image::Ext4, Image::Erofs].map(|image| Loop::read_only(&image.copy(images.path())));
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        fs::create_dir(dir.at("there")).unwrap();
        dir.settle();
        let guests = [on_linux(kernel), on_linux(kernel)];
        for round in 0..100 {
            // Also where the directory has to be made first.
            let target = dir.at(["there", "made"][round % 2]);
            let barrier = tokio::sync::Barrier::new(2);
            let [first, second] =
                [(&guests[0], &one), (&guests[1], &two)].map(async |(guest, device)| {
                    barrier.wait().await;
                    mount(guest, device, &target, &["ro"]).await
                });
            let (first, second) = tokio::join!(first, second);
            let winner = match (first, second) {
                (Ok(()), Err(late)) => (0, late),
                (Err(late), Ok(())) => (1, late),
                both => panic!("round {round} on {kernel:?}: {both:?}"),
            };
            assert_eq!(winner.1.kind(), ErrorKind::Conflict, "{}", winner.1);
            assert_eq!(dir.mounts().len(), 1, "round {round} on {kernel:?}");
            let device = [&one, &two][winner.0].node().to_owned();
            assert_eq!(Path::new(&dir.mounts()[0].source), device);
            guests[winner.0].unmount(&target).await.unwrap();
            guests[1 - winner.0].unmount(&target).await.unwrap();
            // Of a directory that both have made, one may be left that a mount was on.
            let _ = fs::remove_dir(dir.at("made"));
            dir.assert_clean();
        }
    }
}
