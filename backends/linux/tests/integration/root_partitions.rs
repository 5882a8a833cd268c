//! Partitions: found by what sysfs says, missing ones named.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs::{self, File};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use crate::kit::{
    self, Image, KERNELS, Loop, TestDir, builder, guest, mount_at, on_linux, refused,
};
use blockmount::{BackendError, ErrorKind, MountOptions, Mounter};
use blockmount_linux::device::{self, DeviceNumber};

fn partition(number: u32) -> MountOptions {
    let number = NonZeroU32::new(number).unwrap();
    MountOptions::builder()
        .partition(number)
        .read_only()
        .build()
        .unwrap()
}

#[tokio::test]
async fn root_the_second_partition_of_each_table_is_mounted() {
    for kernel in KERNELS {
        for image in [Image::Gpt, Image::Mbr] {
            let mut dir = TestDir::new();
            let device = Loop::with_partitions(&image.copy(dir.path()));
            dir.settle();
            let guest = on_linux(kernel);
            guest
                .mount(&device.locator(), &dir.at("mnt"), &partition(2))
                .await
                .unwrap();
            assert_eq!(fs::read_to_string(dir.at("mnt/hello")).unwrap(), "ext4");
            assert_ne!(mount_at(&dir.at("mnt")).source, device.node().as_os_str());
            guest.unmount(&dir.at("mnt")).await.unwrap();
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_a_missing_partition_costs_no_wait_and_the_others_are_named() {
    for image in [Image::Gpt, Image::Mbr] {
        let mut dir = TestDir::new();
        let device = Loop::new(&image.copy(dir.path()));
        kit::run("partx", &["-a", device.node().to_str().unwrap()]);
        dir.settle();
        let guest = builder().device_timeout(Duration::from_secs(60)).build();
        let started = Instant::now();
        let result: Result<(), BackendError> = guest
            .mount(&device.locator(), &dir.at("x/mnt"), &partition(7))
            .await;
        let message = refused(result, ErrorKind::NotFound);
        assert!(
            message.contains("no partition 7") && message.ends_with("exist: 1, 2, 3"),
            "{message}"
        );
        assert!(started.elapsed() < Duration::from_secs(10));
        dir.assert_clean();
    }
}

fn known_to_the_kernel(device: &Loop) -> Vec<u32> {
    let number = DeviceNumber::of(&File::open(device.node()).unwrap()).unwrap();
    device::partitions(number).unwrap().into_keys().collect()
}

/// A kernel without the code for partition tables, or a disk that was attached without a scan.
#[tokio::test]
async fn root_a_partition_that_the_kernel_does_not_find_is_made_known_and_forgotten() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Gpt.copy(dir.path()));
    dir.settle();
    assert!(known_to_the_kernel(&device).is_empty());
    let guest = guest();
    guest
        .mount(&device.locator(), &dir.at("one"), &partition(2))
        .await
        .unwrap();
    guest
        .mount(&device.locator(), &dir.at("two"), &partition(2))
        .await
        .unwrap();
    assert_eq!(known_to_the_kernel(&device), [2]);
    guest.unmount(&dir.at("one")).await.unwrap();
    assert_eq!(known_to_the_kernel(&device), [2]);
    guest.unmount(&dir.at("two")).await.unwrap();
    assert!(known_to_the_kernel(&device).is_empty());
    // What holds no filesystem is not kept either.
    refused(
        guest
            .mount(&device.locator(), &dir.at("one"), &partition(1))
            .await,
        ErrorKind::NotFound,
    );
    assert!(known_to_the_kernel(&device).is_empty());
    dir.assert_clean();
}

#[tokio::test]
async fn root_a_partition_that_appears_late_is_awaited_with_a_deadline() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Gpt.copy(dir.path()));
    dir.settle();
    let disk = File::open(device.node()).unwrap();
    let two = NonZeroU32::new(2).unwrap();
    let late = device.node().to_owned();
    let scan = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        tokio::task::spawn_blocking(move || kit::run("partx", &["-a", late.to_str().unwrap()]))
            .await
            .unwrap();
    });
    let started = Instant::now();
    let deadline = started + Duration::from_secs(30);
    let node = device::await_partition(&disk, two, deadline).await.unwrap();
    assert!(
        started.elapsed() >= Duration::from_millis(80),
        "it was not there before"
    );
    drop(device::await_open(&node, deadline).await.unwrap());
    scan.await.unwrap();
    kit::run("partx", &["-d", device.node().to_str().unwrap()]);
    let soon = Instant::now() + Duration::from_millis(50);
    let message = refused(
        device::await_partition(&disk, two, soon).await,
        ErrorKind::NotFound,
    );
    assert!(
        message.ends_with("partitions that exist: none"),
        "{message}"
    );
}

#[tokio::test]
async fn root_a_disk_with_partitions_is_no_filesystem_and_a_filesystem_has_no_partitions() {
    let mut dir = TestDir::new();
    let disk = Loop::with_partitions(&Image::Gpt.copy(dir.path()));
    let plain = Loop::with_partitions(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = guest();
    let whole: Result<(), BackendError> = guest
        .mount(&disk.locator(), &dir.at("mnt"), &MountOptions::read_only())
        .await;
    let message = refused(whole, ErrorKind::NotFound);
    assert!(
        message.contains("GPT partition table, name one of its partitions: 1, 2, 3"),
        "{message}"
    );
    refused(
        guest
            .mount(&plain.locator(), &dir.at("mnt"), &partition(1))
            .await,
        ErrorKind::NotFound,
    );
    dir.assert_clean();
}
