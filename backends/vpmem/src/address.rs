//! Where a disk sits: a device number, and a range of the device if it holds many disks.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use blockmount::{BackendError, DeviceLocator};
use thiserror::Error;

/// The transport of VPMEM locators, as in `vpmem:2`.
pub const SCHEME: &str = "vpmem";

/// What ranges start and end at multiples of, in bytes: the page of the guest's kernel.
pub const PAGE: u64 = 4096;

/// The number of a VPMEM device of the VM, from 0 to 127. (Source: Hyper-V allows 128 of them.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// How many devices a VM can have.
    pub const LIMIT: u16 = 128;

    /// The number as such.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u64> for DeviceNumber {
    type Error = InvalidAddress;

    /// Checks the number; it is never cut to fit.
    fn try_from(number: u64) -> Result<Self, InvalidAddress> {
        match u8::try_from(number) {
            Ok(fits) if u16::from(fits) < Self::LIMIT => Ok(DeviceNumber(fits)),
            _ => Err(InvalidAddress::NoSuchDevice(number)),
        }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A range of a device: whole pages, at least one, with an end that fits in 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    offset: u64,
    size: u64,
}

impl ByteRange {
    /// The range of `size` bytes from `offset`.
    ///
    /// # Errors
    ///
    /// [`InvalidAddress::NoRange`] if it is empty, not of whole pages, or ends beyond 64 bits.
    pub fn new(offset: u64, size: u64) -> Result<Self, InvalidAddress> {
        let pages = offset.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && size > 0;
        match offset.checked_add(size) {
            Some(_) if pages => Ok(ByteRange { offset, size }),
            _ => Err(InvalidAddress::NoRange { offset, size }),
        }
    }

    /// Where it starts, in bytes from the start of the device.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// How long it is, in bytes.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Where it ends: the first byte that is not in it.
    pub const fn end(self) -> u64 {
        self.offset + self.size
    }
}

impl From<ByteRange> for Range<u64> {
    fn from(range: ByteRange) -> Range<u64> {
        range.offset..range.end()
    }
}

impl fmt::Display for ByteRange {
    /// Offset and size: `4194304+1052672`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.size)
    }
}

/// Where a disk is: a device, or a range of one.
///
/// ```
/// use blockmount::DeviceLocator;
/// use blockmount_vpmem::VpmemAddress;
///
/// let locator: DeviceLocator = "vpmem:2@4194304+1052672".parse()?;
/// let address = VpmemAddress::try_from(&locator)?;
/// assert_eq!(address.range.map(|range| range.size()), Some(1_052_672));
/// assert_eq!(DeviceLocator::from(address), locator);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VpmemAddress {
    /// The device.
    pub device: DeviceNumber,
    /// The part of it that is the disk; none if all of it is.
    pub range: Option<ByteRange>,
}

impl fmt::Display for VpmemAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)?;
        self.range.map_or(Ok(()), |range| write!(f, "@{range}"))
    }
}

impl From<VpmemAddress> for DeviceLocator {
    fn from(address: VpmemAddress) -> DeviceLocator {
        DeviceLocator::new(SCHEME, address).expect("an address is short and visible ASCII")
    }
}

impl TryFrom<&DeviceLocator> for VpmemAddress {
    type Error = InvalidAddress;

    fn try_from(locator: &DeviceLocator) -> Result<Self, InvalidAddress> {
        if locator.transport() != SCHEME {
            return Err(InvalidAddress::OtherTransport(locator.clone()));
        }
        locator.address().parse()
    }
}

impl FromStr for VpmemAddress {
    type Err = InvalidAddress;

    /// Reads exactly what is printed: decimal numbers without signs or leading zeros.
    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let malformed = || InvalidAddress::Malformed(text.chars().take(64).collect());
        let (device, range) = match text.split_once('@') {
            Some((device, range)) => (device, Some(range)),
            None => (text, None),
        };
        let device = DeviceLocator::number(device)
            .ok_or_else(malformed)?
            .try_into()?;
        let range = match range {
            None => None,
            Some(range) => {
                let (offset, size) = range.split_once('+').ok_or_else(malformed)?;
                let offset = DeviceLocator::number(offset).ok_or_else(malformed)?;
                let size = DeviceLocator::number(size).ok_or_else(malformed)?;
                Some(ByteRange::new(offset, size)?)
            }
        };
        Ok(VpmemAddress { device, range })
    }
}

/// Why something is not the address of a VPMEM disk.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidAddress {
    /// The locator is of another transport.
    #[error("{0} is not the locator of a VPMEM device")]
    OtherTransport(DeviceLocator),
    /// It is not a device number, with or without a range.
    #[error(
        "{0:?} is not a VPMEM address; one has the form device or device@offset+size, such as 2@0+4096"
    )]
    Malformed(String),
    /// No VM has that many.
    #[error("there is no VPMEM device {0}; the highest is 127")]
    NoSuchDevice(u64),
    /// It is empty, not of whole pages, or too far out.
    #[error("{offset}+{size} is not a range of whole pages of {PAGE} bytes")]
    NoRange {
        /// Where it would start.
        offset: u64,
        /// How long it would be.
        size: u64,
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
