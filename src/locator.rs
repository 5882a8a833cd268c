//! Where an attached device sits, in its transport's own words.

use std::fmt::{self, Write};
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triomphe::ThinArc;

use crate::printable;

/// Where an attached device sits: a transport and an address on it, such as `scsi:0/3`, `vpmem:2`,
/// `vpmem:2@4194304+1052672` or `loop:7`.
///
/// A locator is opaque to everyone but its transport. The host's [`Transport`] makes it, the guest's
/// [`Resolver`] for the same transport reads it, and everything between carries it as it is. It
/// says nothing about the name that the guest's kernel gives the device: names are not predictable.
///
/// Cloning is cheap (a reference count).
///
/// ```
/// use blockmount::DeviceLocator;
///
/// let locator: DeviceLocator = "scsi:0/3".parse()?;
/// assert_eq!(locator.transport(), "scsi");
/// assert_eq!(locator.address(), "0/3");
/// # Ok::<(), blockmount::InvalidLocator>(())
/// ```
///
/// [`Transport`]: crate::Transport
/// [`Resolver`]: crate::Resolver
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceLocator(
    /// Its text: a pointer of one word, since each mount has its locator in several places.
    ThinArc<(), u8>,
);

/// Why a string is not a [`DeviceLocator`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("\"{text}\" is not a device locator: {reason}")]
pub struct InvalidLocator {
    text: String,
    reason: &'static str,
}

impl DeviceLocator {
    /// The longest locator, in bytes. Ours are under 40; the bound keeps a peer from making us
    /// carry more.
    pub const MAX_LEN: usize = 255;

    /// Makes a locator from the name of a transport and an address on it.
    ///
    /// # Errors
    ///
    /// [`InvalidLocator`] unless the transport is a lower-case word (`a-z`, then `a-z0-9-`), the
    /// address is at least one visible ASCII character and has no white space, and both together
    /// fit in [`MAX_LEN`](Self::MAX_LEN).
    pub fn new(transport: &str, address: impl fmt::Display) -> Result<Self, InvalidLocator> {
        // Room for the address that nearly all have, so that the text is not moved as it grows.
        let mut text = String::with_capacity(transport.len() + 32);
        text.push_str(transport);
        text.push(':');
        write!(text, "{address}").expect("text can be added to any");
        Self::checked(text)
    }

    /// The transport, which is also the scheme under which a resolver is registered: `scsi`.
    pub fn transport(&self) -> &str {
        self.split().0
    }

    /// The address on the transport: `0/3`.
    pub fn address(&self) -> &str {
        self.split().1
    }

    /// The whole locator: `scsi:0/3`.
    pub fn as_str(&self) -> &str {
        self.text()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.0.slice).expect("it was made of a string")
    }

    /// Reads a number in an address. Each number has one spelling, so that two locators of one place are equal: decimal digits
    /// without a sign or leading zeros.
    ///
    /// ```
    /// use blockmount::DeviceLocator;
    ///
    /// assert_eq!(DeviceLocator::number("10"), Some(10));
    /// assert_eq!(DeviceLocator::number("010"), None);
    /// ```
    pub fn number(text: &str) -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let leading_zero = text.len() > 1 && text.starts_with('0');
        (digits && !leading_zero)
            .then(|| text.parse().ok())
            .flatten()
    }

    fn split(&self) -> (&str, &str) {
        self.as_str()
            .split_once(':')
            .expect("a locator has a colon since it was checked")
    }

    fn checked(text: String) -> Result<Self, InvalidLocator> {
        match reason_against(&text) {
            None => Ok(DeviceLocator(ThinArc::from_header_and_slice(
                (),
                text.as_bytes(),
            ))),
            Some(reason) => Err(InvalidLocator {
                text: printable(text).shortened(64).to_string(),
                reason,
            }),
        }
    }
}

/// Names the first rule that `text` breaks.
fn reason_against(text: &str) -> Option<&'static str> {
    if text.len() > DeviceLocator::MAX_LEN {
        return Some("it is longer than 255 bytes");
    }
    // Found as a byte, which is quicker than as a character.
    let colon = text.bytes().position(|byte| byte == b':');
    let Some((transport, address)) = colon.map(|at| (&text[..at], &text[at + 1..])) else {
        return Some("it has no colon between transport and address");
    };
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !transport.starts_with(|c: char| c.is_ascii_lowercase()) || !transport.bytes().all(word) {
        return Some("the transport is not a lower-case word");
    }
    if address.is_empty() || !address.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Some("the address is empty or has characters that are not visible ASCII");
    }
    None
}

/// The text alone: what it is kept in would hash its length twice, for each look-up.
impl Hash for DeviceLocator {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.slice.hash(state);
    }
}

impl fmt::Display for DeviceLocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for DeviceLocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeviceLocator {
    type Err = InvalidLocator;

    fn from_str(text: &str) -> Result<Self, InvalidLocator> {
        Self::checked(text.to_owned())
    }
}

impl TryFrom<String> for DeviceLocator {
    type Error = InvalidLocator;

    fn try_from(text: String) -> Result<Self, InvalidLocator> {
        Self::checked(text)
    }
}

impl From<DeviceLocator> for String {
    fn from(locator: DeviceLocator) -> String {
        locator.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_prints() {
        for text in [
            "scsi:0/3",
            "vpmem:2",
            "vpmem:2@4194304+1052672",
            "loop:7",
            "a-1:x:y",
        ] {
            assert_eq!(text.parse::<DeviceLocator>().unwrap().to_string(), text);
        }
        assert_eq!("a-1:x:y".parse::<DeviceLocator>().unwrap().address(), "x:y");
    }

    #[test]
    fn refuses_what_is_no_locator() {
        let long = format!("loop:{}", "7".repeat(DeviceLocator::MAX_LEN));
        for text in [
            "", "loop", "loop:", ":7", "Loop:7", "7:7", "loop:7 8", "loop:\n", "loop:é", &long,
        ] {
            let error = text.parse::<DeviceLocator>().unwrap_err().to_string();
            assert!(
                error.contains("is not a device locator") && error.len() < 200,
                "{error}"
            );
        }
    }

    #[test]
    fn serde_validates() {
        let locator: DeviceLocator = serde_json::from_str("\"scsi:0/3\"").unwrap();
        assert_eq!(serde_json::to_string(&locator).unwrap(), "\"scsi:0/3\"");
        assert!(serde_json::from_str::<DeviceLocator>("\"scsi\"").is_err());
    }
}
