//! Byte ranges of devices: which are refused, and that nothing is left then. That the good ones are mounted needs a
//! kernel with device-mapper.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::kit::{self, Image, Loop, TestDir, options, refused};
use async_trait::async_trait;
use blockmount::{BackendError, BlockDevice, DeviceLocator, ErrorKind, Mounter, Resolver};
use blockmount_linux::LinuxGuest;
use blockmount_linux::mapper::{self, DeviceMapper};

/// Answers the same part of the same device for every locator.
#[derive(Debug)]
struct Part(PathBuf, Range<u64>);

#[async_trait]
impl Resolver for Part {
    async fn resolve(&self, _: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        Ok(BlockDevice::new(&self.0).with_range(self.1.clone()))
    }
}

async fn mount(device: &Path, range: Range<u64>, target: &Path) -> Result<(), BackendError> {
    let part = Part(device.to_owned(), range);
    let guest = LinuxGuest::builder()
        .resolver("part", Arc::new(part))
        .build();
    guest
        .mount(&"part:0".parse().unwrap(), target, &options(&["ro"]))
        .await
}

#[tokio::test]
async fn root_a_range_that_is_no_range_of_the_device_is_refused() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let size: u64 = 4 << 20;
    for (start, end, why) in [
        (0, 0, "there are none"),
        (4096, 512, "there are none"),
        (0, size + 512, "it has 4194304 bytes"),
        (size, size + 4096, "it has 4194304 bytes"),
        (0, u64::MAX, "it has 4194304 bytes"),
        (1, 4096, "whole blocks"),
        (0, 4095, "whole blocks"),
    ] {
        let result = mount(device.node(), Range { start, end }, &dir.at("a/mnt")).await;
        let message = refused(result, ErrorKind::Invalid);
        assert!(message.contains(why), "{message}");
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_without_device_mapper_a_range_is_unsuitable() {
    if DeviceMapper::open().is_ok() {
        return;
    }
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let result = mount(device.node(), 0..4 << 20, &dir.at("a/mnt")).await;
    let message = refused(result, ErrorKind::Unsuitable);
    assert!(message.contains("device-mapper"), "{message}");
    dir.assert_clean();
}

/// A device that nothing is stacked on is in use as a whole or not at all.
#[tokio::test]
async fn root_a_range_is_free_when_its_device_is() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = kit::short_wait().build();
    let timeout = std::time::Duration::from_millis(50);
    let release = || mapper::release_range(device.node(), 0..4096, timeout);
    release().await.unwrap();
    kit::mount(&guest, &device, &dir.at("mnt"), &[])
        .await
        .unwrap();
    let message = refused(release().await, ErrorKind::Busy);
    assert!(message.contains("the mount at"), "{message}");
    guest.unmount(&dir.at("mnt")).await.unwrap();
    release().await.unwrap();
    let absent = Path::new("/dev/blockmount-no-such-device");
    let result = mapper::release_range(absent, 0..4096, timeout).await;
    refused(result, ErrorKind::NotFound);
    dir.assert_clean();
}
