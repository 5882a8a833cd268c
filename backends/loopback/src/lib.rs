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
//! let id = transport.identify(&layer).await?;
//! let locator = transport.attach(&layer, &id).await?; // needs root
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
//! `Conflict` unless both are read-only, because each device has a page cache of its own. A file that a VM of QEMU has, of anybody's, is one as well, and QEMU in turn
//! refuses what is bound here: a device has QEMU's locks on its file for as long as it is bound
//! ([`image_lock`](blockmount_source::image_lock)). A block device is claimed
//! (`O_EXCL`) while it is attached read-write, so that it cannot be mounted meanwhile.
//!
//! # Nodes, and the kernel's table
//!
//! A container's `/dev` is often a copy without the nodes of later devices. A device without a node gets one in
//! `/dev/blockmount`, which is removed when the device is unbound. The kernel keeps every loop device that was ever made,
//! so a new one is made only if no device is free, also when many disks are attached at once.
//!
//! # After a crash
//!
//! Only mounted devices stay: each device is bound with `LO_FLAGS_AUTOCLEAR`, so the kernel unbinds it when the last
//! handle is closed. A mounted one stays until it is unmounted, and has the transport's mark, by which
//! [`bound_loops`] finds it.
//!
//! # Errors
//!
//! | kind | when |
//! |---|---|
//! | `NotFound` | no such file or device; a locator whose device is not bound |
//! | `Invalid` | not a file of the disk's kind, empty, cut short, not writable but asked for read-write |
//! | `Conflict` | another loop device or a VM has the same file; the file was replaced under the same name |
//! | `Full` | the transport has reached `max_devices` |
//! | `Busy` | a device that is mounted or open elsewhere; detach again when it is free |
//! | `Unsuitable` | an extensible disk; no loop devices in this kernel, or one older than 5.8 |
//! | `LostWrites` | unplugged, but the file beneath did not take all that was written |
//! | `Other` | not root; other errors of the system |
#![cfg(target_os = "linux")]

mod adopt;
mod bare;
mod bind;
mod bound;
mod builder;
mod device;
mod free;
mod grow;
mod ioctl;
mod locator;
mod look;
mod resolver;
mod settings;
mod transport;

pub use bare::BareLoop;
pub use bound::{BoundLoop, bound_loops};
pub use builder::LoopTransportBuilder;
pub use locator::SCHEME;
pub use resolver::{LoopResolver, LoopUnplugger};
pub use transport::{LoopSlot, LoopTransport};

/// Compiles the examples of the README and of its pages.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
#[doc = include_str!("../../../docs/mounts.md")]
struct Readme;
