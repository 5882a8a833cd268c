//! The bridge between a host and the agent in its guest, over a stream of bytes.

pub mod gcs;
mod order;
