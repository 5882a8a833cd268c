//! Finds the device node of `loop:7`, and unplugs the device.

use std::time::Duration;

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver, Unplugger, blocking_step,
};
use blockmount_linux::device::{DeviceNumber, release, release_as};
use blockmount_linux::is_absent;

use crate::device::{Device, device_number, failed, find, node, usual_node};
use crate::locator::number_of;
use crate::transport::LoopTransport;

/// Finds the loop device behind a locator of any [`LoopTransport`].
///
/// It does not wait, since the device is there before its locator is. It is enough where a locator is not used after
/// its disk was detached, which the managers guarantee. A [`LoopTransport`] is itself a resolver, which also tells
/// its own devices from later ones with the same number.
///
/// Where `/dev` has no node for the device, as in many containers, it makes one below `/dev/blockmount`, which the
/// detach removes.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoopResolver;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for LoopResolver {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let number = number_of(device)?;
        blocking_step(move || resolve(number)).await
    }

    /// A device is bound anew, and not replaced.
    async fn measure(&self, _device: &DeviceLocator) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// Finds devices of this transport only, each as long as it is bound as this transport has bound it.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for LoopTransport {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let number = number_of(device)?;
        let Some((binding, handle)) = self.find(number) else {
            let message = format!("this transport has no device {device}");
            return Err(BackendError::not_found(message));
        };
        blocking_step(move || {
            let is_ours = match &handle {
                // It is this device for as long as it is open, but others may give it another file.
                Some(handle) => handle.is_bound_as(&binding),
                None => find(number, &binding).map(|found| found.is_some()),
            };
            match is_ours {
                Ok(true) => match &handle {
                    Some(handle) => open_device(handle),
                    None => block_device(number),
                },
                Ok(false) => Err(BackendError::not_found(format!(
                    "{} is no longer bound as this transport bound it",
                    usual_node(number).display()
                ))),
                Err(error) => Err(failed("ask about", number, error)),
            }
        })
        .await
    }

    /// As of any loop device.
    async fn measure(&self, device: &DeviceLocator) -> Result<bool, BackendError> {
        LoopResolver.measure(device).await
    }
}

/// Unplugs a loop device, which stays bound until it is detached.
///
/// Proves that the device is not mounted, mapped or claimed, and writes back what is cached, down to the file
/// beneath. Waits up to [`with_timeout`](Self::with_timeout) for users that hold it only for a moment.
#[derive(Debug, Clone, Copy)]
pub struct LoopUnplugger {
    timeout: Duration,
}

impl LoopUnplugger {
    /// Waits this long for other users before it answers `Busy`; the default is one second.
    pub fn with_timeout(timeout: Duration) -> Self {
        LoopUnplugger { timeout }
    }
}

impl Default for LoopUnplugger {
    fn default() -> Self {
        Self::with_timeout(Duration::from_secs(1))
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for LoopUnplugger {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let number = number_of(device)?;
        // Most devices are at their usual node.
        let usual = blocking_step(move || usual(number)).await?;
        if let Some(usual) = usual {
            match release_as(&usual_node(number), usual, self.timeout).await {
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict) => {
                }
                done => return or_unbound(number, done).await,
            }
        }
        let node = match blocking_step(move || resolve(number)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            found => found?.path,
        };
        or_unbound(number, release(&node, self.timeout).await).await
    }
}

/// The same, or success if the device was unbound meanwhile: there is nothing to write back.
async fn or_unbound(number: u32, released: Result<(), BackendError>) -> Result<(), BackendError> {
    match released {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != ErrorKind::Busy => {
            let is_bound = blocking_step(move || is_bound(number)).await;
            if is_bound.unwrap_or(true) {
                Err(error)
            } else {
                Ok(())
            }
        }
        done => done,
    }
}

/// The number of a device, if it is there.
fn usual(number: u32) -> Result<Option<DeviceNumber>, BackendError> {
    match device_number(number) {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(failed("ask about", number, error)),
    }
}

/// A device of which a handle is open.
fn open_device(device: &Device) -> Result<BlockDevice, BackendError> {
    let number = device.number;
    let path = device
        .node()
        .map_err(|error| failed("find the node of", number, error))?;
    Ok(BlockDevice::new(path).with_open(device.shared_file()))
}

fn resolve(number: u32) -> Result<BlockDevice, BackendError> {
    if is_bound(number)? {
        return block_device(number);
    }
    let path = usual_node(number);
    Err(BackendError::not_found(format!(
        "there is no loop device {}, or it is bound to nothing",
        path.display()
    )))
}

fn block_device(number: u32) -> Result<BlockDevice, BackendError> {
    let path = node(number).map_err(|error| failed("find the node of", number, error))?;
    Ok(BlockDevice::new(path))
}

fn is_bound(number: u32) -> Result<bool, BackendError> {
    let status = Device::open(number).and_then(|device| device.status());
    match status {
        Ok(status) => Ok(status.is_some()),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(failed("ask about", number, error)),
    }
}
