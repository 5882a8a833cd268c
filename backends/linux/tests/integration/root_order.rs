//! Calls for one target: in the order in which they were made, and what is busy is reported and tried again.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs::File;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::kit::{Image, KERNELS, Loop, TestDir, builder, options, refused, short_wait};
use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, ErrorKind, MountOptions, Mounter, Resolver,
};
use blockmount_linux::device::{self, DeviceNumber};
use tokio::sync::Semaphore;

/// Finds a device when the test lets it.
#[derive(Debug)]
struct Slow(Arc<Semaphore>);

#[async_trait]
impl Resolver for Slow {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let _permit = self.0.acquire().await.unwrap();
        Ok(BlockDevice::new(device.address()))
    }
}

/// A caller that gives up on a slow mount and unmounts must not be overtaken by the mount.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_i01_calls_for_one_target_run_in_order_also_when_the_caller_gave_up() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let gate = Arc::new(Semaphore::new(0));
    let guest = builder()
        .resolver("slow", Arc::new(Slow(gate.clone())))
        .build();
    let locator = DeviceLocator::new("slow", device.node().display()).unwrap();
    for _ in 0..20 {
        let soon = Duration::from_millis(5);
        let (target, options) = (dir.at("a/mnt"), options(&[]));
        let mount = guest.mount(&locator, &target, &options);
        assert!(tokio::time::timeout(soon, mount).await.is_err());
        let unmount = guest.unmount(&target);
        tokio::pin!(unmount);
        let early = tokio::time::timeout(soon, &mut unmount).await;
        assert!(early.is_err(), "it has not waited for the mount: {early:?}");
        let again = guest.mount(&locator, &target, &options);
        tokio::pin!(again);
        assert!(tokio::time::timeout(soon, &mut again).await.is_err());
        gate.add_permits(1);
        unmount.await.unwrap();
        again.await.unwrap();
        assert_eq!(dir.mounts().len(), 1);
        guest.unmount(&target).await.unwrap();
        gate.forget_permits(1);
        dir.assert_clean();
    }
}

fn known_to_the_kernel(device: &Loop) -> Vec<u32> {
    let number = DeviceNumber::of(&File::open(device.node()).unwrap()).unwrap();
    device::partitions(number).unwrap().into_keys().collect()
}

/// A partition that is busy when it should go is reported, with its users, and goes with the next attempt.
#[tokio::test]
async fn root_i07_a_busy_partition_is_reported_and_tried_again() {
    for kernel in KERNELS {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Gpt.copy(dir.path()));
        dir.settle();
        let guest = short_wait().as_on_linux(kernel.0, kernel.1).build();
        let two = NonZeroU32::new(2).unwrap();
        let options = MountOptions::builder().partition(two).read_only();
        let (options, target) = (options.build().unwrap(), dir.at("a/mnt"));
        guest
            .mount(&device.locator(), &target, &options)
            .await
            .unwrap();
        assert_eq!(known_to_the_kernel(&device), [2]);
        let node =
            device::partitions(DeviceNumber::of(&File::open(device.node()).unwrap()).unwrap())
                .unwrap()
                .remove(&2)
                .unwrap();
        let held = [File::open(&node).unwrap(), File::open(&node).unwrap()];
        for _ in 0..2 {
            let message = refused(guest.unmount(&target).await, ErrorKind::Busy);
            assert!(message.contains("partition 2"), "{message}");
            let user = format!("process {}", std::process::id());
            assert!(message.contains(&user), "{message}");
            assert_eq!(dir.mounts(), []);
            assert_eq!(known_to_the_kernel(&device), [2]);
        }
        // The target is not free before all is undone.
        let again = guest.mount(&device.locator(), &target, &options).await;
        refused(again, ErrorKind::Conflict);
        // Another mount takes the partition over.
        let other = dir.at("other");
        guest
            .mount(&device.locator(), &other, &options)
            .await
            .unwrap();
        guest.unmount(&target).await.unwrap();
        drop(held);
        assert_eq!(known_to_the_kernel(&device), [2]);
        guest.unmount(&other).await.unwrap();
        assert!(known_to_the_kernel(&device).is_empty());
        dir.assert_clean();
    }
}

/// A mount that fails, and leaves something that is busy, says so; the unmount undoes it.
#[tokio::test]
async fn root_i07_a_failed_mount_with_a_busy_partition_is_uncertain() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Gpt.copy(dir.path()));
    dir.settle();
    let guest = short_wait().build();
    let one = NonZeroU32::new(1).unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    // As a daemon that looks at each new device.
    let node = format!("{}p1", device.node().display());
    let watcher = tokio::task::spawn_blocking(move || {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while std::time::Instant::now() < deadline {
            if let Ok(held) = File::open(&node) {
                let _released = released.recv();
                drop(held);
                return;
            }
            std::thread::yield_now();
        }
    });
    let options = MountOptions::builder().partition(one).read_only().build();
    let (options, target) = (options.unwrap(), dir.at("a/mnt"));
    // The first partition is empty. The daemon may come too late for an attempt.
    let result = loop {
        match guest.mount(&device.locator(), &target, &options).await {
            Err(error) if error.kind() == ErrorKind::NotFound && !watcher.is_finished() => {}
            result => break result,
        }
    };
    let message = refused(result, ErrorKind::Uncertain);
    assert!(message.contains("cannot remove partition 1"), "{message}");
    drop(release);
    watcher.await.unwrap();
    guest.unmount(&target).await.unwrap();
    assert!(known_to_the_kernel(&device).is_empty());
    dir.assert_clean();
}
