//! Digests of blocks, each with the salt before it.

use blockmount::HashAlgorithm;
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// What digests blocks: it has taken the salt already.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Hasher {
    /// Nothing for an algorithm that is newer than this crate.
    pub(crate) fn new(algorithm: HashAlgorithm, salt: &[u8]) -> Option<Self> {
        Some(match algorithm {
            HashAlgorithm::Sha256 => Hasher::Sha256(Sha256::new_with_prefix(salt)),
            HashAlgorithm::Sha384 => Hasher::Sha384(Sha384::new_with_prefix(salt)),
            HashAlgorithm::Sha512 => Hasher::Sha512(Sha512::new_with_prefix(salt)),
            _ => return None,
        })
    }

    /// Puts the digest of a block at the start of its slot in a hash block.
    pub(crate) fn digest(&self, block: &[u8], slot: &mut [u8]) {
        fn put(digest: &[u8], slot: &mut [u8]) {
            slot[..digest.len()].copy_from_slice(digest);
        }
        match self {
            Hasher::Sha256(salted) => put(&salted.clone().chain_update(block).finalize(), slot),
            Hasher::Sha384(salted) => put(&salted.clone().chain_update(block).finalize(), slot),
            Hasher::Sha512(salted) => put(&salted.clone().chain_update(block).finalize(), slot),
        }
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of hexadecimal digits of either case.
pub(crate) fn from_hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.as_bytes();
    let pairs = digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks_exact(2))?;
    let byte = |pair: &[u8]| {
        let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
        u8::try_from(high? << 4 | low?).ok()
    };
    pairs.map(byte).collect()
}
