//! Finds block devices: sysfs, the kernel's events.

pub mod node;
pub mod sysfs;
pub mod uevent;
