//! A transport as a stranger would write one, with nothing but the public API: virtio-blk disks, each behind a PCI Express
//! port of QEMU.
//!
//! | file | half | what it implements |
//! |---|---|---|
//! | `host.rs` | host | `Transport`: reserves a port, plugs a disk into it by QMP |
//! | `guest.rs` | guest | `Resolver` and `Unplugger`: from the port's PCI address to the disk behind it |
//! | `main.rs` | guest | an agent that knows it |
//!
//! No other crate of the workspace knows the scheme of its locators, `vblk:3`.

mod guest;
mod host;

pub use guest::VirtioBlk;
pub use host::VirtioBlkTransport;

/// The scheme of the locators: `vblk:3` is the disk behind port 3.
pub const SCHEME: &str = "vblk";
