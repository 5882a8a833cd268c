//! Loop devices as a transport of `blockmount`: the embedded default, where host and guest are this
//! machine.
//!
//! A disk is attached by binding its image to a loop device, and its locator says which: `loop:7`.
//! Everything that is mounted from it, shared and taken out again works as with a VM, so a program
//! can be written and tested here and run with another transport elsewhere.
//!
//! ```no_run
//! use blockmount::{Disk, Resolver, Transport};
//! use blockmount_loopback::{LoopResolver, LoopTransport};
//!
//! # async fn example() -> Result<(), blockmount::BackendError> {
//! let transport = LoopTransport::builder().max_devices(64).mark("example").build()?;
//! let layer = Disk::virtual_disk("/images/base.erofs").read_only();
//!
//! let locator = transport.attach(&layer).await?; // needs root
//! let device = LoopResolver.resolve(&locator).await?;
//! println!("{locator} is {}", device.path.display()); // loop:7 is /dev/loop7
//! transport.detach(&layer).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What can be attached
//!
//! Image files as virtual disks and block devices as physical disks; extensible disks are `Unsuitable`. A
//! source has at least one sector of 512 bytes, and whole sectors: the kernel would hide the rest, which
//! is how a truncated image looks. A file that another loop device has too, in any process, is a
//! `Conflict` unless both are read-only, because each device has a cache of its own. A block device is claimed
//! while it is attached read-write, so that nobody mounts it meanwhile.
//!
//! # What is left if the process dies
//!
//! Nothing that is not mounted: each device is bound to be cleared when it is closed, and this process has
//! it open. Mounted devices stay until they are unmounted. They carry the transport's mark, by which
//! [`bound_loops`] finds them.
//!
//! # Errors
//!
//! | kind | when |
//! |---|---|
//! | `NotFound` | no such file or device; a locator whose device is not bound |
//! | `Invalid` | not a file of the disk's kind, empty, cut short, not writable but asked for read-write |
//! | `Conflict` | another loop device has the same file; the file was replaced under the same name |
//! | `Full` | the transport has as many devices as it may |
//! | `Busy` | a device that somebody has mounted or open; detach again when it is free |
//! | `Unsuitable` | an extensible disk; no loop devices in this kernel, or one older than 5.8 |
//! | `Other` | not root, and what else the system says |
#![cfg(target_os = "linux")]

mod bind;
mod bound;
mod builder;
mod device;
mod ioctl;
mod resolver;
mod transport;

pub use bound::{BoundLoop, bound_loops};
pub use builder::LoopTransportBuilder;
pub use resolver::{LoopResolver, LoopUnplugger};
pub use transport::{LoopSlot, LoopTransport, SCHEME};

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
