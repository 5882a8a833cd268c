//! What every Linux guest needs to mount block devices: it finds and awaits them, knows what is on
//! them, mounts them, stacks them as an overlay, and undoes all of it by the target alone.
#![cfg(target_os = "linux")]
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use async_trait::async_trait;
//! use blockmount::{BackendError, BlockDevice, DeviceLocator, MountOptions, Mounter, Resolver};
//! use blockmount_linux::LinuxGuest;
//!
//! /// Finds `pmem:0` and so on; a real one proves that the device is the one that is meant.
//! struct Pmem;
//!
//! #[async_trait]
//! impl Resolver for Pmem {
//!     async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
//!         Ok(BlockDevice::new(format!("/dev/pmem{}", device.address())))
//!     }
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let guest = LinuxGuest::builder().resolver("pmem", Arc::new(Pmem)).build();
//! let target = Path::new("/run/layers/base");
//! guest.mount(&"pmem:0".parse()?, target, &MountOptions::read_only()).await?;
//! guest.unmount(target).await?;
//! # Ok(())
//! # }
//! ```
//!
//! | item | what is in it |
//! |---|---|
//! | [`LinuxGuest`] | the engine: a `Mounter`, a `LayerCombiner`, a `Binder` and an `Unplugger` |
//! | [`Transports`] | how devices of each transport are found and unplugged |
//! | [`uevent`] | events of the kernel about devices, and waiting for what they announce |
//! | [`sysfs`] | devices by address: PCI addresses, VMBus channels, disks |
//! | [`device`] | opening, partitions, proving that nobody uses a device |
//! | [`probe`](mod@probe) | what is on a device or in an image |
//! | [`mapper`] | devices made of ranges of others |
//! | [`mountinfo`] | the kernel's table of mounts |
//!
//! # What a mount is here
//!
//! A mount is built detached, gets its attributes, and is then moved to its target, so that nobody
//! sees it half done; `mount(2)` takes over on kernels before 5.2. The device must not be mounted
//! by anybody else: the kernel would silently share one filesystem, with the other's options.
//! Directories that are missing on the way to the target are made, and exactly those are removed
//! again, with `rmdir` only. A target goes through no symbolic link. Unmounting is never lazy.
//!
//! # Undoing
//!
//! Each target has a list of what there is to undo: directories, a partition or a byte range, the mount. It is undone
//! from the last step to the first. A step that is busy stays on the list and is reported as `Busy`, and the next
//! unmount of the target goes on with it. What several targets share is undone with the last of them.
//!
//! # While it is mounted
//!
//! A mount tells how full it is (`Mounter::usage`), is trimmed (`trim`), and grows (`grow`) once its disk has: the guest waits
//! until its kernel has seen that, then grows an encrypted device in between and the ext4, xfs or btrfs on it. A partition, a
//! byte range and what is checked by a hash tree keep their size. Before a mount, a filesystem is checked by the guest's own
//! tools if the options ask for it; nothing is repaired unasked.
//!
//! # After a kill
//!
//! Mounts live in the kernel, and the lists live in the process that made them. One that may be killed keeps a
//! journal ([`LinuxGuestBuilder::journal`]) with a file for each target, which has each step before it is made, with the
//! identity by which it can be told from everything else. The next process with that journal takes over the mounts
//! that are there and undoes what was left half done. What it cannot prove to be its own, it does not touch.
//!
//! ```no_run
//! # async fn example() -> Result<(), blockmount::BackendError> {
//! use blockmount_linux::LinuxGuest;
//!
//! let guest = LinuxGuest::builder().journal("/run/blockmount/agent").await?;
//! # Ok(())
//! # }
//! ```

pub mod device;

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    //! What the targets in `fuzz/` call.

    /// Reads bytes as what `cryptsetup` says of a header of LUKS2, and of a key.
    pub fn luks_header(bytes: &[u8]) {
        crate::device::fuzz_luks_header(bytes);
    }

    /// Reads bytes as a record of the journal, and what it has written again.
    pub fn journal_record(bytes: &[u8]) {
        use crate::undo::record::{decode, encode};
        if let Ok(record) = decode(bytes, "origin") {
            let again = decode(&encode(&record, "origin"), "origin");
            assert_eq!(again.as_ref(), Ok(&record));
        }
    }
}

mod builder;
mod discover;
mod errno;
mod filesystem;
mod guest;
mod kernel;
mod mount;
mod sys;
mod transports;
mod undo;

pub use builder::LinuxGuestBuilder;
pub use device::mapper;
pub use discover::{node, sysfs, uevent};
pub use errno::{Backoff, is_absent};
pub use filesystem::{mkfs, probe};
pub use guest::LinuxGuest;
pub use mount::mountinfo;
pub use transports::Transports;
