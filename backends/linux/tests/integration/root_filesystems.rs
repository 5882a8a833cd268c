//! Each filesystem, read-only and writable, with options that are honoured or refused, on every
//! kind of kernel.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;

use crate::kit::{Image, KERNELS, Loop, TestDir, guest, mount, mount_at, on_linux, refused};
use blockmount::{ErrorKind, MountOptions, Mounter};

#[tokio::test]
async fn root_each_filesystem_is_found_mounted_and_undone() {
    for kernel in KERNELS {
        for image in Image::FILESYSTEMS {
            let mut dir = TestDir::new();
            let device = Loop::new(&image.copy(dir.path()));
            dir.settle();
            let guest = on_linux(kernel);
            let target = dir.at("deep/er/mnt");
            for read_only in [true, false] {
                let access: &[&str] = if read_only { &["ro"] } else { &[] };
                mount(&guest, &device, &target, access)
                    .await
                    .unwrap_or_else(|error| {
                        panic!(
                            "{image:?} read-only {read_only} on {kernel:?}: {error} {:?}",
                            std::error::Error::source(&error)
                        )
                    });
                let mounted = mount_at(&target);
                assert_eq!(mounted.filesystem, image.name());
                assert_eq!(mounted.source, device.node().as_os_str());
                // What is clean needs no option that would hide a journal.
                for hiding in ["noload", "norecovery"] {
                    assert!(!mounted.has_option(hiding), "{mounted:?}");
                }
                assert_eq!(
                    fs::read_to_string(target.join("hello")).unwrap(),
                    image.name()
                );
                let written = fs::write(target.join("new"), "x");
                assert_eq!(
                    written.is_ok(),
                    !read_only && image.is_writable(),
                    "{image:?} {written:?}"
                );
                guest.unmount(&target).await.unwrap();
                dir.assert_clean();
            }
        }
    }
}

#[tokio::test]
async fn root_a_read_only_device_carries_a_read_only_mount_and_no_other() {
    for kernel in KERNELS {
        for image in Image::FILESYSTEMS {
            let mut dir = TestDir::new();
            let device = Loop::read_only(&image.copy(dir.path()));
            dir.settle();
            let guest = on_linux(kernel);
            mount(&guest, &device, &dir.at("mnt"), &["ro"])
                .await
                .unwrap();
            guest.unmount(&dir.at("mnt")).await.unwrap();
            let writable = mount(&guest, &device, &dir.at("mnt"), &[]).await;
            if image.is_writable() {
                let message = refused(writable, ErrorKind::Conflict);
                assert!(
                    message.contains("is read-only"),
                    "{image:?} on {kernel:?}: {message}"
                );
            } else {
                writable.unwrap();
                guest.unmount(&dir.at("mnt")).await.unwrap();
            }
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_g06_options_are_honoured_to_the_last() {
    let names = [
        "nosuid",
        "nodev",
        "noexec",
        "noatime",
        "nodiratime",
        "nosymfollow",
        "sync",
        "dirsync",
        "lazytime",
    ];
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        mount(
            &guest,
            &device,
            &dir.at("mnt"),
            &[&names[..], &["commit=17"]].concat(),
        )
        .await
        .unwrap();
        let mounted = mount_at(&dir.at("mnt"));
        for name in names {
            assert!(
                mounted.has_option(name),
                "{name} on {kernel:?}: {mounted:?}"
            );
        }
        assert!(mounted.has_option("commit=17"), "{mounted:?}");
        guest.unmount(&dir.at("mnt")).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g06_an_unknown_option_is_refused_in_the_kernels_words() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        dir.settle();
        let guest = on_linux(kernel);
        for option in ["nonsense", "nonsense=5", "commit=many"] {
            let message = refused(
                mount(&guest, &device, &dir.at("a/mnt"), &[option]).await,
                ErrorKind::Invalid,
            );
            let words = if kernel >= (5, 2) {
                "commit"
            } else {
                "the kernel says"
            };
            let words = if option.starts_with("nonsense") && kernel >= (5, 2) {
                "nonsense"
            } else {
                words
            };
            assert!(message.contains(words), "{message}");
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_a_filesystem_that_was_named_must_be_there() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext2.copy(dir.path()));
    dir.settle();
    let guest = guest();
    let named = |name: &str| MountOptions::builder().filesystem(name).build().unwrap();
    let at = dir.at("mnt");
    let message = refused(
        guest.mount(&device.locator(), &at, &named("xfs")).await,
        ErrorKind::NotFound,
    );
    assert!(
        message.contains("xfs was asked for, but it holds ext2"),
        "{message}"
    );
    guest
        .mount(&device.locator(), &at, &named("ext4"))
        .await
        .unwrap();
    assert_eq!(mount_at(&at).filesystem, "ext4");
    guest.unmount(&at).await.unwrap();
    dir.assert_clean();
}
