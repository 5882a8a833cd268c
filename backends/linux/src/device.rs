//! Block devices: waiting for them, their partitions, and proving that nobody uses them.

pub(crate) mod dax;
pub mod mapper;
mod open;
pub(crate) mod part;
pub(crate) mod partitions;
pub(crate) mod windows;

pub use open::{
    DeviceNumber, await_open, await_partition, flush, hold_free, in_use, let_go,
    logical_block_size, open, partitions, prove_free, size,
};
pub(crate) use open::{node, node_named_in, read_ahead};
