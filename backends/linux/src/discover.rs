//! Finds block devices: sysfs, the kernel's events, the resolvers of the transports.

pub(crate) mod resolvers;
pub mod source;
pub mod sysfs;
pub mod uevent;
