//! One device, several mounts: the kernel gives them one filesystem, so who may have which is
//! decided.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

mod kit;

use std::fs;

use blockmount::{DeviceLocator, ErrorKind, MountOptions, Mounter, Unplugger};
use blockmount_linux::device;
use kit::{Image, KERNELS, Loop, Room, mount, mount_at, on_linux, options, refused, run};

#[tokio::test]
async fn root_readers_share_and_a_writer_does_not() {
    for kernel in KERNELS {
        for image in [Image::Ext4, Image::Xfs, Image::Erofs, Image::Squashfs] {
            let mut room = Room::new();
            let device = Loop::new(&image.copy(room.path()));
            room.settle();
            let guest = on_linux(kernel);
            mount(&guest, &device, &room.at("a"), &["ro"])
                .await
                .unwrap();
            mount(&guest, &device, &room.at("b"), &["ro", "nosuid"])
                .await
                .unwrap();
            assert!(
                mount_at(&room.at("b")).has_option("nosuid")
                    && !mount_at(&room.at("a")).has_option("nosuid")
            );
            assert_eq!(
                mount_at(&room.at("a")).device,
                mount_at(&room.at("b")).device
            );
            for other in [&[][..], &["ro", "sync"]] {
                let message = refused(
                    mount(&guest, &device, &room.at("c"), other).await,
                    ErrorKind::Conflict,
                );
                assert!(message.contains("options that exclude these"), "{message}");
            }
            guest.unmount(&room.at("a")).await.unwrap();
            assert_eq!(
                fs::read_to_string(room.at("b/hello")).unwrap(),
                image.name()
            );
            refused(
                mount(&guest, &device, &room.at("c"), &[]).await,
                ErrorKind::Conflict,
            );
            guest.unmount(&room.at("b")).await.unwrap();
            mount(&guest, &device, &room.at("c"), &[]).await.unwrap();
            refused(
                mount(&guest, &device, &room.at("d"), &["ro"]).await,
                ErrorKind::Conflict,
            );
            guest.unmount(&room.at("c")).await.unwrap();
            room.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_what_somebody_else_has_mounted_is_not_shared_silently() {
    for kernel in KERNELS {
        let mut room = Room::new();
        let device = Loop::new(&Image::Ext4.copy(room.path()));
        fs::create_dir(room.at("theirs")).unwrap();
        room.settle();
        run(
            "mount",
            &[
                "-o",
                "ro",
                device.node().to_str().unwrap(),
                room.at("theirs").to_str().unwrap(),
            ],
        );
        let guest = on_linux(kernel);
        for access in [&["ro"][..], &[]] {
            let message = refused(
                mount(&guest, &device, &room.at("a/b"), access).await,
                ErrorKind::Busy,
            );
            assert!(
                message.contains("in use by the mount at") && message.contains("/theirs"),
                "{message}"
            );
            assert_eq!(room.mounts().len(), 1);
            assert!(!room.at("a").exists());
        }
        run("umount", &[room.at("theirs").to_str().unwrap()]);
        mount(&guest, &device, &room.at("a/b"), &[]).await.unwrap();
        guest.unmount(&room.at("a/b")).await.unwrap();
        room.assert_clean();
    }
}

#[tokio::test]
async fn root_two_readers_at_once_both_get_their_mount() {
    let mut room = Room::new();
    let device = Loop::new(&Image::Ext4.copy(room.path()));
    room.settle();
    for kernel in KERNELS {
        let guest = on_linux(kernel);
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..6 {
            let (guest, locator, target) = (
                guest.clone(),
                device.locator(),
                room.at(format!("t{index}")),
            );
            tasks.spawn(async move {
                for _ in 0..5 {
                    guest
                        .mount(&locator, &target, &options(&["ro"]))
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
}

#[tokio::test]
async fn root_g21_a_device_is_unplugged_only_when_it_is_proven_free() {
    let mut room = Room::new();
    let disk = Loop::new(&Image::Ext4.copy(room.path()));
    fs::create_dir(room.at("theirs")).unwrap();
    room.settle();
    let guest = on_linux((u32::MAX, 0));
    let unplug = |locator: DeviceLocator| {
        let guest = guest.clone();
        async move { guest.unplug(&locator).await }
    };
    mount(&guest, &disk, &room.at("mnt"), &[]).await.unwrap();
    let message = refused(unplug(disk.locator()).await, ErrorKind::Busy);
    assert!(
        message.contains("the mount at") && message.contains("/mnt"),
        "{message}"
    );
    // A lazy unmount takes it out of every table, and it is in use all the same.
    let open = fs::File::open(room.at("mnt/hello")).unwrap();
    run("umount", &["-l", room.at("mnt").to_str().unwrap()]);
    assert_eq!(room.mounts(), []);
    refused(unplug(disk.locator()).await, ErrorKind::Busy);
    drop(open);
    guest.unmount(&room.at("mnt")).await.unwrap();
    unplug(disk.locator()).await.unwrap();
    let held = device::prove_free(disk.node()).unwrap();
    refused(
        mount(&guest, &disk, &room.at("mnt"), &[]).await,
        ErrorKind::Busy,
    );
    drop(held);
    unplug("test:/dev/blockmount-no-such-device".parse().unwrap())
        .await
        .unwrap();
    room.assert_clean();
}

/// A copy of the mount in another mount namespace keeps the filesystem alive when ours is gone.
/// (Removing the directory would take the copy away as well.)
#[tokio::test]
async fn root_a_mount_in_another_namespace_is_found_and_named() {
    let mut room = Room::new();
    let disk = Loop::new(&Image::Ext4.copy(room.path()));
    fs::create_dir(room.at("mnt")).unwrap();
    room.settle();
    let guest = on_linux((u32::MAX, 0));
    mount(&guest, &disk, &room.at("mnt"), &["rprivate"])
        .await
        .unwrap();
    let mut other = std::process::Command::new("unshare")
        .args([
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            "echo ready; exec sleep 60",
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut ready).unwrap();
    guest.unmount(&room.at("mnt")).await.unwrap();
    let message = refused(device::prove_free(disk.node()), ErrorKind::Busy);
    assert!(
        message.contains(&format!("in the mount namespace of process {}", other.id())),
        "{message}"
    );
    other.kill().unwrap();
    other.wait().unwrap();
    // The end of a namespace is not awaited by the end of its last process.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while device::prove_free(disk.node()).is_err() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    room.assert_clean();
}

#[tokio::test]
async fn root_what_this_guest_does_not_do_yet_is_refused_untouched() {
    let mut room = Room::new();
    let device = Loop::new(&Image::Ext4.copy(room.path()));
    room.settle();
    let guest = on_linux((u32::MAX, 0));
    let format = blockmount::Format::new("ext4").overwriting_everything();
    let cases = [
        MountOptions::builder().encryption(blockmount::Encryption::Ephemeral),
        MountOptions::builder().format(format),
        MountOptions::builder().expose(blockmount::Expose::BlockDevice),
    ];
    let before = fs::read(device.node()).unwrap();
    for case in cases {
        let result = guest
            .mount(&device.locator(), &room.at("a"), &case.build().unwrap())
            .await;
        assert!(refused(result, ErrorKind::Unsuitable).starts_with("this guest cannot"));
    }
    assert!(fs::read(device.node()).unwrap() == before);
    room.assert_clean();
}
