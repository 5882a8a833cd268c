//! The names under which a hypervisor and its guest know one device.

use std::fmt;
use std::str::FromStr;

use blockmount::BackendError;

/// The address of a PCI device: domain, bus, device and function, as in `0000:00:10.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// Reads the address of a slot, which has all functions of a device: `0000:00:10`.
    pub(crate) fn slot(self) -> String {
        let PciAddress {
            domain,
            bus,
            device,
            ..
        } = self;
        format!("{domain:04x}:{bus:02x}:{device:02x}")
    }
}

/// As the kernel writes it.
impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:x}", self.slot(), self.function)
    }
}

/// Reads hexadecimal digits, of which there are that many.
fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let is_hex = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

impl FromStr for PciAddress {
    type Err = BackendError;

    /// Reads what the kernel writes, in whatever case. The domain must be given.
    fn from_str(text: &str) -> Result<Self, BackendError> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            // More than 65,536 domains are made up by drivers of bridges in software.
            let domain =
                hex(domain, 4..=8).filter(|_| domain.len() == 4 || !domain.starts_with('0'))?;
            let address = PciAddress {
                domain,
                bus: u8::try_from(hex(bus, 2..=2)?).ok()?,
                device: u8::try_from(hex(device, 2..=2)?).ok()?,
                function: u8::try_from(hex(function, 1..=1)?).ok()?,
            };
            (address.device < 32 && address.function < 8).then_some(address)
        };
        parse().ok_or_else(|| {
            let text: String = text.chars().take(64).collect();
            BackendError::invalid(format!(
                "{text:?} is not the address of a PCI device, such as 0000:00:10.0"
            ))
        })
    }
}

/// The instance of a VMBus channel: a GUID, as in `df6d0690-79e5-55b6-a5ec-c1e2f77f580a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmbusId(u128);

impl VmbusId {
    /// A GUID by its digits, most significant first: `0xdf6d0690_79e5_55b6_a5ec_c1e2f77f580a`.
    pub const fn new(digits: u128) -> Self {
        VmbusId(digits)
    }
}

/// How many digits there are between the dashes.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

/// As the kernel writes it: in lower case, without braces.
impl fmt::Display for VmbusId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.0);
        let mut rest = &*digits;
        for (index, length) in GROUPS.into_iter().enumerate() {
            let (group, after) = rest.split_at(length);
            f.write_str(if index == 0 { "" } else { "-" })?;
            f.write_str(group)?;
            rest = after;
        }
        Ok(())
    }
}

impl FromStr for VmbusId {
    type Err = BackendError;

    /// Reads a GUID in either case, with or without braces around it.
    fn from_str(text: &str) -> Result<Self, BackendError> {
        let parse = || {
            let inner = match text.strip_prefix('{') {
                Some(rest) => rest.strip_suffix('}')?,
                None => text,
            };
            let groups: Vec<&str> = inner.split('-').collect();
            let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
            let digits = groups.concat();
            let is_guid = lengths == GROUPS && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            is_guid
                .then(|| u128::from_str_radix(&digits, 16).ok())
                .flatten()
        };
        parse().map(VmbusId).ok_or_else(|| {
            let text: String = text.chars().take(64).collect();
            BackendError::invalid(format!(
                "{text:?} is not a GUID of 32 digits in five groups"
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

    #[test]
    fn reads_guids_with_and_without_braces() {
        let guid = VmbusId::new(0xdf6d0690_79e5_55b6_a5ec_c1e2f77f580a);
        assert_eq!(guid.to_string(), "df6d0690-79e5-55b6-a5ec-c1e2f77f580a");
        for text in [
            "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
            "{DF6D0690-79E5-55B6-A5EC-C1E2F77F580A}",
        ] {
            assert_eq!(text.parse::<VmbusId>().unwrap(), guid);
        }
        for bad in [
            "",
            "{}",
            "df6d069079e555b6a5ecc1e2f77f580a",
            "{df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
            "df6d0690-79e5-55b6-a5ec-c1e2f77f580g",
            "df6d0690-79e5-55b6-a5ec-c1e2f77f580a-",
            "+f6d0690-79e5-55b6-a5ec-c1e2f77f580a",
        ] {
            assert!(bad.parse::<VmbusId>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn addresses_round_trip(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
        }

        #[test]
        fn guids_round_trip(digits: u128) {
            let id = VmbusId::new(digits);
            prop_assert_eq!(id.to_string().parse::<VmbusId>().unwrap(), id);
        }

        #[test]
        fn never_panics(text in ".{0,50}", near in "[0-9a-f:.{}-]{0,40}") {
            for text in [text, near] {
                // What is read has one spelling, apart from case and braces.
                if let Ok(address) = text.parse::<PciAddress>() {
                    prop_assert_eq!(address.to_string(), text.to_lowercase());
                }
                if let Ok(id) = text.parse::<VmbusId>() {
                    prop_assert_eq!(id.to_string(), text.to_lowercase().replace(['{', '}'], ""));
                }
            }
        }
    }
}
