//! The names under which a hypervisor and its guest know one device.

use std::fmt;
use std::str::FromStr;

use blockmount::BackendError;

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
        fn guids_round_trip(digits: u128) {
            let id = VmbusId::new(digits);
            prop_assert_eq!(id.to_string().parse::<VmbusId>().unwrap(), id);
        }

        #[test]
        fn never_panics(text in ".{0,50}", near in "[0-9a-f{}-]{0,40}") {
            for text in [text, near] {
                // What is read has one spelling, apart from case and braces.
                if let Ok(id) = text.parse::<VmbusId>() {
                    prop_assert_eq!(id.to_string(), text.to_lowercase().replace(['{', '}'], ""));
                }
            }
        }
    }
}
