//! How many VPMEM devices a VM has, and how large each of them is.

use std::fmt;

use thiserror::Error;

use crate::{DeviceNumber, PAGE};

/// How many VPMEM devices a VM can have, and how many bytes fit on each of them.
///
/// ```
/// use blockmount_vpmem::Geometry;
///
/// assert_eq!(Geometry::default(), Geometry::new(64, 4 << 30)?);
/// assert!(Geometry::new(129, 4 << 30).is_err());
/// assert!(Geometry::new(64, 1_000_000).is_err());
/// # Ok::<(), blockmount_vpmem::InvalidGeometry>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    devices: u16,
    device_size: u64,
}

impl Geometry {
    /// A VM with so many devices of so many bytes.
    ///
    /// # Errors
    ///
    /// [`InvalidGeometry`] unless there are 1 to 128 devices, each of at least one page and of whole
    /// pages of [`PAGE`] bytes.
    pub const fn new(devices: u16, device_size: u64) -> Result<Self, InvalidGeometry> {
        let pages = device_size >= PAGE && device_size.is_multiple_of(PAGE);
        if devices >= 1 && devices <= DeviceNumber::LIMIT && pages {
            Ok(Geometry {
                devices,
                device_size,
            })
        } else {
            Err(InvalidGeometry {
                devices,
                device_size,
            })
        }
    }

    /// How many devices there are.
    pub const fn devices(self) -> u16 {
        self.devices
    }

    /// How many bytes fit on each of them.
    pub const fn device_size(self) -> u64 {
        self.device_size
    }

    /// Whether there is such a device in this VM.
    pub fn contains(self, device: DeviceNumber) -> bool {
        u16::from(device.get()) < self.devices
    }
}

impl Default for Geometry {
    /// 64 devices of 4 GiB. (Source: what the shim of Hyper-V's Linux containers asks for.)
    fn default() -> Self {
        Geometry {
            devices: 64,
            device_size: 4 << 30,
        }
    }
}

impl fmt::Display for Geometry {
    /// Devices and bytes: `64 x 4294967296`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.devices, self.device_size)
    }
}

/// No VM has so few or so many devices, or devices of this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "a VM cannot have {devices} VPMEM devices of {device_size} bytes; \
     it has 1 to {limit} of one or more whole pages of {PAGE} bytes",
    limit = DeviceNumber::LIMIT
)]
pub struct InvalidGeometry {
    devices: u16,
    device_size: u64,
}
