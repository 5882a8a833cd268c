//! What is on a device, and whether it may be mounted.

pub(crate) mod check;
pub(crate) mod format;
pub(crate) mod ioctl;
pub mod mkfs;
pub(crate) mod preflight;
pub mod probe;
pub(crate) mod tool;
