//! What a guest has (files, mounts, devices), told to its host apart from the agent whose work it shows.
//!
//! The checker is a process of its own in the guest, which init starts beside the agent. It reads, writes and mounts what it is
//! told, anywhere: it is for a host that owns its guest.
//!
//! | file | concern |
//! |---|---|
//! | `protocol.rs` | what is asked and answered, and its frames |
//! | `client.rs` | the host's end |
//! | `server.rs` | the guest's end: one request at a time on each connection |
//! | `tables.rs`, `bare_mount.rs`, `tree.rs` | how each answer is found |
//! | `private.rs` | files that have keys |
#![cfg(target_os = "linux")]

pub mod bare_mount;
mod client;
mod error;
mod private;
pub mod protocol;
pub mod server;
pub mod tables;
pub mod tree;

pub use client::Checker;
pub use error::Context;
pub use private::write_private;
pub use server::CheckerServer;

/// The virtio port over which a host reaches the checker.
pub const PORT: &str = "blockmount.checker";
