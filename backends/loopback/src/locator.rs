//! Locators of loop devices: `loop:7`.

use blockmount::{BackendError, DeviceLocator};

/// The transport's name in a [`DeviceLocator`].
pub const SCHEME: &str = "loop";

/// Reads the address of a locator: a number as the kernel writes it.
pub(crate) fn number_of(device: &DeviceLocator) -> Result<u32, BackendError> {
    if device.transport() != SCHEME {
        return Err(BackendError::unsuitable(format!(
            "{device} is not a loop device"
        )));
    }
    let number = DeviceLocator::number(device.address());
    number
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| {
            BackendError::invalid(format!(
                "{device} is not the locator of a loop device, such as loop:7"
            ))
        })
}
