//! Block devices: opening them, proving that nobody uses them, and the device stack: from what a resolver found to what is
//! mounted.

pub(crate) mod cipher;
mod content;
pub(crate) mod crypt;
pub(crate) mod dax;
pub(crate) mod dm_linear;
pub(crate) mod free;
pub(crate) mod integrity;
mod key;
mod keyring;
pub(crate) mod luks;
mod luks_header;
pub(crate) mod mapped;
pub mod mapper;
pub(crate) mod node;
pub(crate) mod number;
pub(crate) mod partition;
pub(crate) mod partitions;
mod secret;
pub(crate) mod stack;
pub(crate) mod subrange;
mod tags;
pub(crate) mod verity;

#[cfg(feature = "fuzzing")]
pub(crate) use luks_header::fuzz as fuzz_luks_header;

pub use free::{flush, hold_free, in_use, prove_free, release, release_as};
pub use node::{await_open, logical_block_size, open, size};
pub use number::DeviceNumber;
pub use partitions::{await_partition, partitions};
