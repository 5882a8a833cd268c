//! Finds block devices: sysfs, the kernel's events.

pub mod source;
pub mod sysfs;
pub mod uevent;
