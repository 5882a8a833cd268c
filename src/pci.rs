//! Addresses of PCI devices.

use std::fmt;
use std::str::FromStr;

use crate::BackendError;

/// The address of a PCI device: domain, bus, device and function, as in `0000:00:10.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// An address by its parts; nothing unless `device` is below 32 and `function` below 8.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device >= 32 || function >= 8 {
            return None;
        }
        Some(PciAddress {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The device (or slot) on its bus, from 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function of the device, from 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }
}

/// As Linux writes it: `0000:00:10.0`.
impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// Reads hexadecimal digits, of which there are that many.
fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let is_hex = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

impl FromStr for PciAddress {
    type Err = BackendError;

    /// Reads what Linux writes, in either case. The domain must be given.
    fn from_str(text: &str) -> Result<Self, BackendError> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            // Linux numbers the domains of software bridges (VMD) from 65,536.
            let domain =
                hex(domain, 4..=8).filter(|_| domain.len() == 4 || !domain.starts_with('0'))?;
            let byte = |text: &str, digits| u8::try_from(hex(text, digits..=digits)?).ok();
            PciAddress::new(domain, byte(bus, 2)?, byte(device, 2)?, byte(function, 1)?)
        };
        parse().ok_or_else(|| {
            let text: String = text.chars().take(64).collect();
            BackendError::invalid(format!(
                "{text:?} is not the address of a PCI device, such as 0000:00:10.0"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_addresses_in_either_case_and_prints_the_kernels() {
        for (text, printed) in [
            ("0000:00:10.0", "0000:00:10.0"),
            ("ABCD:FF:1F.7", "abcd:ff:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), printed);
        }
        for bad in [
            "",
            "00:10.0",
            "0000:00:20.0",
            "0000:00:10.8",
            "0000:00:10",
            "0000:0:10.0",
            "+000:00:10.0",
            "0000:00:10.0\n",
            "0000:00:10.0/..",
            "00001:00:10.0",
            "123456789:00:10.0",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn addresses_round_trip(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
        }

        #[test]
        fn never_panics(text in ".{0,50}", near in "[0-9a-f:.]{0,40}") {
            for text in [text, near] {
                // What is read has one spelling, apart from case.
                if let Ok(address) = text.parse::<PciAddress>() {
                    prop_assert_eq!(address.to_string(), text.to_lowercase());
                }
            }
        }
    }
}
