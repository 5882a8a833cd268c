//! Direct access that was asked for and cannot be had: these devices have none.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;

use crate::kit::{Image, KERNELS, Loop, TestDir, guest, mount, on_linux, refused};
use blockmount::{ErrorKind, Mounter};

/// Xfs and erofs are mounted without it, and say so only in the kernel's log. The mount is taken back then,
/// though it was good and could be written to: what is on the device stays.
#[tokio::test]
async fn root_g01_a_good_mount_that_is_not_wanted_is_unmounted_and_nothing_is_removed_from_it() {
    for kernel in KERNELS {
        for image in [Image::Xfs, Image::Erofs, Image::Ext4, Image::Ext2] {
            let mut dir = TestDir::new();
            let device = Loop::new(&image.copy(dir.path()));
            dir.settle();
            let guest = on_linux(kernel);
            let target = dir.at("a/mnt");
            let result = mount(&guest, &device, &target, &["dax=always"]).await;
            let message = refused(result, ErrorKind::Unsuitable);
            assert!(message.contains("dax=always"), "{message}");
            dir.assert_clean();
            mount(&guest, &device, &target, &[]).await.unwrap();
            let hello = fs::read_to_string(target.join("hello")).unwrap();
            assert_eq!(hello, image.name());
            assert_eq!(guest.is_dax(&target).await, Some(false));
            guest.unmount(&target).await.unwrap();
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_where_nothing_is_mounted_there_is_nothing_to_say() {
    let dir = TestDir::new();
    let guest = guest();
    assert_eq!(guest.is_dax(&dir.at("nothing")).await, None);
    fs::create_dir(dir.at("dir")).unwrap();
    assert_eq!(guest.is_dax(&dir.at("dir")).await, None);
    fs::remove_dir(dir.at("dir")).unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_never_is_granted() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = guest();
    mount(&guest, &device, &dir.at("mnt"), &["dax=never"])
        .await
        .unwrap();
    assert_eq!(guest.is_dax(&dir.at("mnt")).await, Some(false));
    guest.unmount(&dir.at("mnt")).await.unwrap();
    dir.assert_clean();
}
