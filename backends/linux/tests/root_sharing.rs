//! One device, several mounts: the kernel gives them one filesystem, so who may have which is
//! decided.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

#[path = "integration/kit/mod.rs"]
mod kit;

use std::fs;

use blockmount::{DeviceLocator, ErrorKind, MountOptions, Mounter, Unplugger};
use blockmount_linux::device;
use kit::{
    Image, KERNELS, Loop, TestDir, mount, mount_at, on_linux, options, refused, run, short_wait,
};

#[tokio::test]
async fn root_readers_share_and_a_writer_does_not() {
    for kernel in KERNELS {
        for image in [Image::Ext4, Image::Xfs, Image::Erofs, Image::Squashfs] {
            let mut dir = TestDir::new();
            let device = Loop::new(&image.copy(dir.path()));
            dir.settle();
            let guest = on_linux(kernel);
            mount(&guest, &device, &dir.at("a"), &["ro"]).await.unwrap();
            mount(&guest, &device, &dir.at("b"), &["ro", "nosuid"])
                .await
                .unwrap();
            assert!(
                mount_at(&dir.at("b")).has_option("nosuid")
                    && !mount_at(&dir.at("a")).has_option("nosuid")
            );
            assert_eq!(mount_at(&dir.at("a")).device, mount_at(&dir.at("b")).device);
            for other in [&[][..], &["ro", "sync"]] {
                let message = refused(
                    mount(&guest, &device, &dir.at("c"), other).await,
                    ErrorKind::Conflict,
                );
                assert!(message.contains("options that exclude these"), "{message}");
            }
            guest.unmount(&dir.at("a")).await.unwrap();
            assert_eq!(fs::read_to_string(dir.at("b/hello")).unwrap(), image.name());
            refused(
                mount(&guest, &device, &dir.at("c"), &[]).await,
                ErrorKind::Conflict,
            );
            guest.unmount(&dir.at("b")).await.unwrap();
            mount(&guest, &device, &dir.at("c"), &[]).await.unwrap();
            refused(
                mount(&guest, &device, &dir.at("d"), &["ro"]).await,
                ErrorKind::Conflict,
            );
            guest.unmount(&dir.at("c")).await.unwrap();
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_what_somebody_else_has_mounted_is_not_shared_silently() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        fs::create_dir(dir.at("theirs")).unwrap();
        dir.settle();
        run(
            "mount",
            &[
                "-o",
                "ro",
                device.node().to_str().unwrap(),
                dir.at("theirs").to_str().unwrap(),
            ],
        );
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        for access in [&["ro"][..], &[]] {
            let message = refused(
                mount(&guest, &device, &dir.at("a/b"), access).await,
                ErrorKind::Busy,
            );
            assert!(
                message.contains("in use by the mount at") && message.contains("/theirs"),
                "{message}"
            );
            assert_eq!(dir.mounts().len(), 1);
            assert!(!dir.at("a").exists());
        }
        run("umount", &[dir.at("theirs").to_str().unwrap()]);
        mount(&guest, &device, &dir.at("a/b"), &[]).await.unwrap();
        guest.unmount(&dir.at("a/b")).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_two_readers_at_once_both_get_their_mount() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    for kernel in KERNELS {
        let guest = on_linux(kernel);
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..6 {
            let (guest, locator, target) =
                (guest.clone(), device.locator(), dir.at(format!("t{index}")));
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
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g21_a_device_is_unplugged_only_when_it_is_proven_free() {
    let mut dir = TestDir::new();
    let disk = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::create_dir(dir.at("theirs")).unwrap();
    dir.settle();
    let guest = short_wait().build();
    let unplug = |locator: DeviceLocator| {
        let guest = guest.clone();
        async move { guest.unplug(&locator).await }
    };
    mount(&guest, &disk, &dir.at("mnt"), &[]).await.unwrap();
    let message = refused(unplug(disk.locator()).await, ErrorKind::Busy);
    assert!(
        message.contains("the mount at") && message.contains("/mnt"),
        "{message}"
    );
    // A lazy unmount takes it out of every table, and it is in use all the same.
    let open = fs::File::open(dir.at("mnt/hello")).unwrap();
    run("umount", &["-l", dir.at("mnt").to_str().unwrap()]);
    assert_eq!(dir.mounts(), []);
    refused(unplug(disk.locator()).await, ErrorKind::Busy);
    drop(open);
    guest.unmount(&dir.at("mnt")).await.unwrap();
    unplug(disk.locator()).await.unwrap();
    let held = device::prove_free(disk.node()).unwrap();
    refused(
        mount(&guest, &disk, &dir.at("mnt"), &[]).await,
        ErrorKind::Busy,
    );
    drop(held);
    unplug("test:/dev/blockmount-no-such-device".parse().unwrap())
        .await
        .unwrap();
    dir.assert_clean();
}

/// A copy of the mount in another mount namespace keeps the filesystem alive when ours is gone.
/// (Removing the directory would take the copy away as well.)
#[tokio::test]
async fn root_a_mount_in_another_namespace_is_found_and_named() {
    let mut dir = TestDir::new();
    let disk = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::create_dir(dir.at("mnt")).unwrap();
    dir.settle();
    let guest = on_linux((u32::MAX, 0));
    mount(&guest, &disk, &dir.at("mnt"), &["rprivate"])
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
    guest.unmount(&dir.at("mnt")).await.unwrap();
    let message = refused(device::prove_free(disk.node()), ErrorKind::Busy);
    assert!(
        message.contains("in mount namespace 4")
            && message.contains(&format!("of process {}", other.id())),
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
    dir.assert_clean();
}

#[tokio::test]
async fn root_an_encrypted_device_without_a_filesystem_to_make_is_refused_untouched() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = on_linux((u32::MAX, 0));
    let cases = [MountOptions::builder().encryption(blockmount::Encryption::Ephemeral)];
    let before = fs::read(device.node()).unwrap();
    for case in cases {
        let result = guest
            .mount(&device.locator(), &dir.at("a"), &case.build().unwrap())
            .await;
        assert!(refused(result, ErrorKind::Invalid).contains("holds noise"));
    }
    assert!(fs::read(device.node()).unwrap() == before);
    dir.assert_clean();
}
