//! From `loop:7` to `/dev/loop7`, and letting go of it.

use std::time::Duration;

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver, Unplugger, blocking,
};
use blockmount_linux::device::let_go;

use crate::SCHEME;
use crate::device::{Device, failed, find, is_absent, node};
use crate::transport::LoopTransport;

/// Finds the loop device behind a locator of any [`LoopTransport`].
///
/// There is nothing to wait for: the device is there before its locator is. It is enough where a
/// locator is not used for longer than its disk is attached, as the managers see to. A transport is
/// itself a resolver, which also tells its own devices from later ones with the same number.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoopResolver;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for LoopResolver {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let number = number_of(device)?;
        blocking(move || resolve(number)).await
    }
}

/// Finds devices of this transport only, each as long as it is bound as this transport has bound it.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for LoopTransport {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let number = number_of(device)?;
        let Some(binding) = self.binding_of(number) else {
            let message = format!("this transport has no device {device}");
            return Err(BackendError::not_found(message));
        };
        blocking(move || match find(number, &binding) {
            Ok(Some(_)) => Ok(BlockDevice::new(node(number))),
            Ok(None) => {
                let path = node(number);
                Err(BackendError::not_found(format!(
                    "{} is no longer bound by us",
                    path.display()
                )))
            }
            Err(error) => Err(failed("ask about", number, error)),
        })
        .await
    }
}

/// Makes this machine let go of a loop device, for the managers; the device stays bound until it is
/// detached.
///
/// Proves that nobody has the device mounted, mapped or claimed, and writes back what is cached, down to
/// the file beneath. Somebody who claims it only for a moment is waited for, up to
/// [`with_timeout`](Self::with_timeout).
#[derive(Debug, Clone, Copy)]
pub struct LoopUnplugger {
    timeout: Duration,
}

impl LoopUnplugger {
    /// Waits this long for others, in place of one second, before it answers `Busy`.
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
        if !blocking(move || is_there(number)).await? {
            return Ok(());
        }
        match let_go(&node(number), self.timeout).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            // Unbound meanwhile: there is nothing to write back to.
            Err(error) if error.kind() != ErrorKind::Busy => {
                let is_bound = blocking(move || is_bound(number)).await;
                if is_bound.unwrap_or(true) {
                    Err(error)
                } else {
                    Ok(())
                }
            }
            done => done,
        }
    }
}

/// Reads the address of a locator: a number as the kernel writes it.
fn number_of(device: &DeviceLocator) -> Result<u32, BackendError> {
    if device.transport() != SCHEME {
        return Err(BackendError::unsuitable(format!(
            "{device} is not a loop device"
        )));
    }
    match device.address().parse::<u32>() {
        Ok(number) if number.to_string() == device.address() => Ok(number),
        _ => Err(BackendError::invalid(format!(
            "{device} is not the locator of a loop device, such as loop:7"
        ))),
    }
}

fn resolve(number: u32) -> Result<BlockDevice, BackendError> {
    let path = node(number);
    let device = match Device::open(number) {
        Ok(device) => device,
        Err(error) if is_absent(&error) => {
            let message = format!("there is no loop device {}", path.display());
            return Err(BackendError::not_found(message).with_source(error));
        }
        Err(error) => return Err(failed("open", number, error)),
    };
    match device
        .status()
        .map_err(|error| failed("ask about", number, error))?
    {
        Some(_) => Ok(BlockDevice::new(path)),
        None => Err(BackendError::not_found(format!(
            "{} is bound to nothing",
            path.display()
        ))),
    }
}

/// Whether there is such a loop device, bound or not.
fn is_there(number: u32) -> Result<bool, BackendError> {
    match Device::open(number) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(failed("open", number, error)),
    }
}

fn is_bound(number: u32) -> Result<bool, BackendError> {
    let status = Device::open(number).and_then(|device| device.status());
    match status {
        Ok(status) => Ok(status.is_some()),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(failed("ask about", number, error)),
    }
}
