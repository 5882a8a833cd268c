//! What is on a device, and whether it may be mounted.

pub(crate) mod preflight;
pub mod probe;
