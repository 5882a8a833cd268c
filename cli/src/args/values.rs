//! Values on the command line: sizes, numbers, salts and ciphers.

use blockmount::{Aead, Encryption};
use clap::ValueEnum;

/// One value: a list of bytes would be several.
#[derive(Debug, Clone)]
pub(super) struct Salt(pub(super) Vec<u8>);

pub(super) fn parse_salt(digits: &str) -> Result<Salt, String> {
    let digit = |digit: char| digit.to_digit(16);
    let digits: Option<Vec<u32>> = digits.chars().map(digit).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2) && digits.len() <= 512);
    let digits = digits.ok_or("a salt is an even number of hexadecimal digits, 512 at most")?;
    let pairs = digits.chunks_exact(2);
    Ok(Salt(
        pairs.map(|pair| (pair[0] << 4 | pair[1]) as u8).collect(),
    ))
}

/// Reads a size in bytes: a number with K, M, G or T for powers of 1,024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = unit
        .trim_end_matches("iB")
        .trim_end_matches('B')
        .to_ascii_uppercase();
    let shift = match unit.as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a size is a number with K, M, G or T, such as 512M".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size starts with a number, such as 512M")?;
    let bytes = number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= MAX_SCRATCH);
    let bytes = bytes.ok_or("a scratch disk has at most 16T")?;
    match bytes >= MIN_SCRATCH {
        true => Ok(bytes),
        false => Err("a scratch disk has at least 4M: its filesystem needs as much".to_owned()),
    }
}

/// By what changes of an encrypted scratch disk are noticed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Integrity {
    /// AES, and tags by HMAC-SHA-256
    #[default]
    HmacSha256,
    /// AEGIS-128, the fastest where the processor has AES
    #[value(name = "aegis128")]
    Aegis128,
    /// ChaCha20-Poly1305, where it does not
    #[value(name = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl Integrity {
    /// What a guest is asked for.
    pub(crate) fn encryption(self) -> Encryption {
        match self {
            Integrity::HmacSha256 => Encryption::EphemeralWithIntegrity,
            Integrity::Aegis128 => Encryption::EphemeralWithAead(Aead::Aegis128),
            Integrity::ChaCha20Poly1305 => Encryption::EphemeralWithAead(Aead::ChaCha20Poly1305),
        }
    }

    /// All names, for a message.
    pub(crate) fn names() -> String {
        let names = Self::value_variants().iter();
        let names = names.filter_map(|one| one.to_possible_value());
        let names: Vec<String> = names.map(|one| format!("\"{}\"", one.get_name())).collect();
        names.join(", ")
    }
}

/// How many disks are measured at once: as many as a virtual machine has places for.
pub(super) fn parse_disks(text: &str) -> Result<usize, String> {
    within(text, 256)
}

/// How often it is measured.
pub(super) fn parse_rounds(text: &str) -> Result<usize, String> {
    within(text, 1_000)
}

fn within(text: &str, most: usize) -> Result<usize, String> {
    let number = text.parse().ok();
    let number = number.filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| format!("it is a number from 1 to {most}"))
}

/// A smaller ext4 cannot hold a journal and the overlay's directories.
const MIN_SCRATCH: u64 = 4 << 20;
/// The largest ext4 with blocks of 4 KiB and 32-bit block numbers.
const MAX_SCRATCH: u64 = 16 << 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_bounds() {
        assert_eq!((parse_disks("1"), parse_disks("256")), (Ok(1), Ok(256)));
        assert_eq!(parse_rounds("1000"), Ok(1_000));
        for text in ["", "0", "257", "-1", "1.5", "99999999999999999999"] {
            assert!(parse_disks(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("4194304"), Ok(4 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        for text in [
            "",
            "M",
            "1X",
            "-1M",
            "1 M",
            "1K",
            "17T",
            "99999999999999999999G",
        ] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
