//! Where a disk sits: a controller and a LUN.

use std::fmt;
use std::str::FromStr;

use blockmount::slots;
use blockmount::{BackendError, DeviceLocator};
use thiserror::Error;

/// The transport of SCSI locators, as in `scsi:0/3`.
pub const SCHEME: &str = "scsi";

/// The GUIDs of the SCSI controllers of a VM of Hyper-V, by their number. A guest finds a controller on the VMBus by it.
///
/// Source: microsoft/hcsshim, `guestrequest.ScsiControllerGuids`: UUIDs of version 5 of the numbers 0 to 3 as decimal text
/// in the namespace `d422512d-2bf2-4752-809d-7b82b5fcb1b4`.
pub const HYPER_V_CONTROLLERS: [&str; 4] = [
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
];

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty) below $limit:expr, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name($repr);

        impl $name {
            /// The highest that there can be.
            pub const MAX: $name = $name(($limit - 1) as $repr);

            /// The number as such.
            pub const fn get(self) -> $repr {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = InvalidAddress;

            /// Checks the number; it is never cut to fit.
            fn try_from(number: u64) -> Result<Self, InvalidAddress> {
                match <$repr>::try_from(number) {
                    Ok(fits) if fits <= Self::MAX.0 => Ok($name(fits)),
                    _ => {
                        let highest = Self::MAX.0.into();
                        Err(InvalidAddress::TooHigh { what: $what, number, highest })
                    }
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// The number of a SCSI controller of the VM, from 0 to 63.
    Controller(u8) below slots::MAX_GROUPS, "controller"
}

number! {
    /// The number of a disk on its controller, from 0 to 16,383 (virtio-scsi; Hyper-V ends at 63).
    Lun(u16) below slots::MAX_PER_GROUP, "LUN"
}

/// Where a disk is: a controller and a LUN on it.
///
/// ```
/// use blockmount::DeviceLocator;
/// use blockmount_scsi::ScsiAddress;
///
/// let locator: DeviceLocator = "scsi:0/3".parse()?;
/// let address = ScsiAddress::try_from(&locator)?;
/// assert_eq!(address.to_string(), "0/3");
/// assert_eq!(DeviceLocator::from(address), locator);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScsiAddress {
    /// The controller.
    pub controller: Controller,
    /// The disk on the controller.
    pub lun: Lun,
}

impl ScsiAddress {
    /// What every [`serial`](Self::serial) number begins with.
    pub const SERIAL_PREFIX: &str = "bm-scsi-";

    /// A LUN of a controller.
    pub const fn new(controller: Controller, lun: Lun) -> Self {
        ScsiAddress { controller, lun }
    }

    /// The serial number of the disk at this address: `bm-scsi-0-3`. A hypervisor that can choose serial numbers
    /// gives the disk this one, and the guest refuses a disk with that of another address.
    ///
    /// It has at most 16 characters: some drivers cut a serial number after 20.
    pub fn serial(self) -> String {
        format!("{}{}-{}", Self::SERIAL_PREFIX, self.controller, self.lun)
    }

    /// The address whose [`serial`](Self::serial) number this is, if it is of that form.
    pub fn from_serial(serial: &str) -> Option<Self> {
        let (controller, lun) = serial.strip_prefix(Self::SERIAL_PREFIX)?.split_once('-')?;
        let controller = DeviceLocator::number(controller)?.try_into().ok()?;
        let lun = DeviceLocator::number(lun)?.try_into().ok()?;
        Some(ScsiAddress { controller, lun })
    }
}

impl fmt::Display for ScsiAddress {
    /// Controller and LUN: `0/3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.controller, self.lun)
    }
}

impl From<ScsiAddress> for DeviceLocator {
    fn from(address: ScsiAddress) -> DeviceLocator {
        DeviceLocator::new(SCHEME, address).expect("an address is short and visible ASCII")
    }
}

impl TryFrom<&DeviceLocator> for ScsiAddress {
    type Error = InvalidAddress;

    fn try_from(locator: &DeviceLocator) -> Result<Self, InvalidAddress> {
        if locator.transport() != SCHEME {
            return Err(InvalidAddress::OtherTransport(locator.clone()));
        }
        locator.address().parse()
    }
}

impl FromStr for ScsiAddress {
    type Err = InvalidAddress;

    /// Reads exactly what is printed: two decimal numbers without signs or leading zeros.
    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let malformed = || InvalidAddress::Malformed(text.chars().take(64).collect());
        let (controller, lun) = text.split_once('/').ok_or_else(malformed)?;
        let controller = DeviceLocator::number(controller)
            .ok_or_else(malformed)?
            .try_into()?;
        let lun = DeviceLocator::number(lun)
            .ok_or_else(malformed)?
            .try_into()?;
        Ok(ScsiAddress { controller, lun })
    }
}

/// Why something is not the address of a SCSI disk.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidAddress {
    /// The locator is of another transport.
    #[error("{0} is not the locator of a SCSI disk")]
    OtherTransport(DeviceLocator),
    /// It is not two decimal numbers with a slash between.
    #[error("{0:?} is not a SCSI address; one has the form controller/lun, such as 0/3")]
    Malformed(String),
    /// No hypervisor has that many.
    #[error("there is no {what} {number}; the highest is {highest}")]
    TooHigh {
        /// Controller or LUN.
        what: &'static str,
        /// The number given.
        number: u64,
        /// The highest that there can be.
        highest: u16,
    },
}

impl From<InvalidAddress> for BackendError {
    fn from(error: InvalidAddress) -> BackendError {
        match error {
            InvalidAddress::OtherTransport(_) => BackendError::unsuitable(error.to_string()),
            _ => BackendError::invalid(error.to_string()),
        }
    }
}
