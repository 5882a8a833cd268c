//! The integrity check of a device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::InvalidOptions;

/// Blocks of dm-verity are powers of two from this size on, in bytes: a sector.
const SMALLEST_BLOCK: u32 = 512;
/// The largest page of any kernel, in bytes; most have pages of 4,096, and blocks no larger than that.
const LARGEST_BLOCK: u32 = 64 << 10;
/// The longest salt that a superblock holds, in bytes.
const LONGEST_SALT: usize = 256;
/// Offsets on devices are signed numbers in the kernel.
const LARGEST_DEVICE: u64 = i64::MAX as u64;
/// The longest description of a key that fits beside the rest, in bytes.
const LONGEST_KEY_DESCRIPTION: usize = 255;

/// Where dm-verity finds the hash tree of a device, and the root that vouches for it.
///
/// Nothing here is read from the device: the client knows what it trusts. What could not be given to a kernel is
/// refused when the options are built; the digits of the digest and of the salt become lower-case then.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Verity {
    /// The digest of the root, as hexadecimal digits.
    pub root_digest: String,
    /// The salt, as hexadecimal digits; empty for none. At most 256 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub salt: String,
    /// What digests the blocks.
    pub algorithm: HashAlgorithm,
    /// The size of a data block, in bytes: a power of two from 512 to the guest's page.
    pub data_block_size: u32,
    /// The size of a hash block, in bytes: a power of two from 512 to the guest's page.
    pub hash_block_size: u32,
    /// The number of data blocks that are covered. What follows them cannot be read.
    pub data_blocks: u64,
    /// Whether the hash tree is on a device of its own, which the request has as its device of the role
    /// [`HashTree`](super::DeviceRole::HashTree). By default it is on the device with the data, behind that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub separate_tree: bool,
    /// The first block of the hash tree, in hash blocks from the start of the device that it is on. A superblock is before it.
    pub hash_start_block: u64,
    /// What happens when a block is corrupt.
    #[serde(default, skip_serializing_if = "OnCorruption::is_error")]
    pub on_corruption: OnCorruption,
    /// Check a data block when it is read first, and not again: offline changes are found, later ones are not.
    /// Linux 4.17.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub check_at_most_once: bool,
    /// Check small reads without a change of threads if the hashes are in memory. Linux 6.0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub try_verify_in_tasklet: bool,
    /// The description of a key in the guest's keyring of the process that mounts, which is a PKCS#7 signature of the
    /// root digest; the kernel checks it against its trusted keys. Linux 5.4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature_key: Option<String>,
    /// Where the parity is by which corrupt blocks are repaired. Linux 4.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_correction: Option<ErrorCorrection>,
}

/// The algorithms that digest blocks, by their kernel names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum HashAlgorithm {
    /// SHA-256, which all tools use unless told otherwise.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl HashAlgorithm {
    /// Every algorithm.
    pub const ALL: [HashAlgorithm; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];

    /// Its name in the kernel.
    pub const fn name(self) -> &'static str {
        match self {
            HashAlgorithm::Sha256 => "sha256",
            HashAlgorithm::Sha384 => "sha384",
            HashAlgorithm::Sha512 => "sha512",
        }
    }

    /// The length of a digest, in bytes.
    pub const fn digest_size(self) -> usize {
        match self {
            HashAlgorithm::Sha256 => 32,
            HashAlgorithm::Sha384 => 48,
            HashAlgorithm::Sha512 => 64,
        }
    }

    /// The space that a digest takes in a hash block, in bytes: the next power of two.
    pub const fn slot_size(self) -> usize {
        self.digest_size().next_power_of_two()
    }

    /// The number of hash blocks on each level of a tree, from the leaves to the root. A single data block needs none.
    /// Nothing if a hash block cannot hold two digests, so that there would be no end; the smallest one holds eight.
    pub fn levels(self, data_blocks: u64, hash_block_size: u32) -> Option<Vec<u64>> {
        let fan_out = u64::from(hash_block_size) / self.slot_size() as u64;
        if fan_out < 2 {
            return None;
        }
        let mut levels = Vec::new();
        let mut blocks = data_blocks;
        while blocks > 1 {
            blocks = blocks.div_ceil(fan_out);
            levels.push(blocks);
        }
        Some(levels)
    }
}

impl fmt::Display for HashAlgorithm {
    /// Its name in the kernel.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HashAlgorithm {
    type Err = InvalidOptions;

    fn from_str(name: &str) -> Result<Self, InvalidOptions> {
        let known = Self::ALL.into_iter().find(|known| known.name() == name);
        known.ok_or_else(|| malformed("algorithm", "sha256, sha384 and sha512 are known"))
    }
}

/// What dm-verity does with a block that is not what its digest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnCorruption {
    /// Whoever reads the block gets `EIO`.
    #[default]
    Error,
    /// The block is read as it is, and the guest's kernel logs it. For the rescue of data.
    Ignore,
    /// The guest restarts.
    Restart,
    /// The guest's kernel panics. Linux 5.9.
    Panic,
}

impl OnCorruption {
    fn is_error(&self) -> bool {
        *self == OnCorruption::Error
    }
}

/// Reed-Solomon parity on the device with the hash tree, by which dm-verity repairs corrupt blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ErrorCorrection {
    /// The number of parity bytes for each 255 bytes: 2 to 24.
    pub roots: u32,
    /// The number of data blocks and hash blocks that are covered.
    pub blocks: u64,
    /// The first block of the parity, in data blocks from the start of the device.
    pub start: u64,
}

impl ErrorCorrection {
    /// Parity for `blocks` blocks of data and hashes, from block `start` of the device on.
    pub fn new(roots: u32, blocks: u64, start: u64) -> Self {
        ErrorCorrection {
            roots,
            blocks,
            start,
        }
    }
}

impl Verity {
    /// A SHA-256 tree without salt over `data_blocks` blocks of 4,096 bytes, in blocks of that size right
    /// behind the data. The fields say what differs.
    pub fn new(root_digest: impl Into<String>, data_blocks: u64) -> Self {
        Verity {
            root_digest: root_digest.into(),
            salt: String::new(),
            algorithm: HashAlgorithm::Sha256,
            data_block_size: 4096,
            hash_block_size: 4096,
            data_blocks,
            separate_tree: false,
            hash_start_block: data_blocks,
            on_corruption: OnCorruption::Error,
            check_at_most_once: false,
            try_verify_in_tasklet: false,
            signature_key: None,
            error_correction: None,
        }
    }

    /// The same with the tree on a device of its own, from this hash block on.
    #[must_use]
    pub fn with_separate_tree(mut self, hash_start_block: u64) -> Self {
        self.separate_tree = true;
        self.hash_start_block = hash_start_block;
        self
    }

    /// The length of the data that is covered, in bytes. Nothing if no device is as large.
    pub fn data_bytes(&self) -> Option<u64> {
        bytes(self.data_blocks, self.data_block_size)
    }

    /// Where the hash tree ends, in bytes from the start of the device that it is on. Nothing if no device is as large.
    pub fn end(&self) -> Option<u64> {
        let levels = self
            .algorithm
            .levels(self.data_blocks, self.hash_block_size)?;
        let tree = levels.into_iter().try_fold(0u64, u64::checked_add)?;
        let end = self.hash_start_block.checked_add(tree)?;
        bytes(end, self.hash_block_size)
    }

    /// The canonical form, or why a kernel could not be given this.
    pub(super) fn canonical(mut self) -> Result<Self, InvalidOptions> {
        self.root_digest.make_ascii_lowercase();
        self.salt.make_ascii_lowercase();
        if self.root_digest.len() != 2 * self.algorithm.digest_size() || !is_hex(&self.root_digest)
        {
            return Err(malformed("root digest", "it is no digest of its algorithm"));
        }
        if self.salt.len() > 2 * LONGEST_SALT || !is_hex(&self.salt) {
            return Err(malformed(
                "salt",
                "it is no hexadecimal number of at most 256 bytes",
            ));
        }
        let sizes = SMALLEST_BLOCK..=LARGEST_BLOCK;
        let is_size = |size: &u32| size.is_power_of_two() && sizes.contains(size);
        if ![self.data_block_size, self.hash_block_size]
            .iter()
            .all(is_size)
        {
            return Err(malformed(
                "block size",
                "it is no power of two from 512 to 65536",
            ));
        }
        let (data, end) = (self.data_bytes(), self.end());
        let (Some(data), Some(end)) = (data.filter(|data| *data > 0), end) else {
            return Err(malformed("number of blocks", "no device has as many"));
        };
        let starts = bytes(self.hash_start_block, self.hash_block_size);
        if !self.separate_tree && starts < Some(data) {
            return Err(malformed("first hash block", "it is among the data"));
        }
        if let Some(parity) = &self.error_correction {
            self.check_parity(parity, end)?;
        }
        let is_plain = |key: &String| {
            let fits = (1..=LONGEST_KEY_DESCRIPTION).contains(&key.len());
            fits && key.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if !self.signature_key.iter().all(is_plain) {
            let reason = "a key's description has 1 to 255 visible ASCII characters";
            return Err(malformed("signature key", reason));
        }
        Ok(self)
    }

    fn check_parity(&self, parity: &ErrorCorrection, end: u64) -> Result<(), InvalidOptions> {
        let refuse = |reason| Err(malformed("error correction", reason));
        if !(2..=24).contains(&parity.roots) {
            return refuse("it has 2 to 24 parity bytes for each 255");
        }
        if self.data_block_size != self.hash_block_size {
            return refuse("data blocks and hash blocks must have one size");
        }
        if bytes(parity.start, self.data_block_size) < Some(end) {
            return refuse("its first block is among the data or the hashes");
        }
        let covers = bytes(parity.blocks, self.data_block_size);
        let needs = self.end().and_then(|end| {
            let start = bytes(self.hash_start_block, self.hash_block_size)?;
            self.data_bytes()?.checked_add(end - start)
        });
        match (covers, needs) {
            (Some(covers), Some(needs)) if covers >= needs => Ok(()),
            _ => refuse("it does not cover the data and the hashes"),
        }
    }
}

fn malformed(what: &str, reason: &'static str) -> InvalidOptions {
    InvalidOptions::Malformed(format!("verity {what}"), reason)
}

fn is_hex(digits: &str) -> bool {
    digits.len().is_multiple_of(2) && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// The length of blocks, if a device can be as large.
fn bytes(blocks: u64, size: u32) -> Option<u64> {
    let bytes = blocks.checked_mul(size.into())?;
    (bytes <= LARGEST_DEVICE).then_some(bytes)
}
