//! Hot-plug disk images into a virtual machine, mount them in the guest, share them between containers,
//! and take them out again exactly once, whatever fails on the way.
//!
//! In one line: `async fn(Disk, MountRequest) -> Mount`.
//!
//! ```
//! use blockmount::testing::FakeVm;
//! use blockmount::{Disk, Manager, MountOptions, MountRequest};
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
//! # runtime.block_on(async {
//! let vm = FakeVm::new(); // a VM in memory; see the table of backends for real ones
//! let manager = Manager::builder()
//!     .transport(vm.clone())
//!     .unplugger(vm.clone())
//!     .mounter(vm.clone())
//!     .build();
//!
//! let layer = Disk::virtual_disk("/images/base.erofs").read_only();
//! let request = MountRequest::new(MountOptions::read_only());
//! let one = manager.add(&layer, &request).await?; // attached and mounted
//! let two = manager.add(&layer, &request).await?; // shared
//! assert_eq!(one.path(), two.path());
//!
//! one.release().await?; // still mounted for the other
//! two.release().await?; // unmounted, unplugged, detached
//! assert!(manager.drain().await.is_clean());
//! # vm.assert_empty();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it is built
//!
//! ```text
//!  Manager ── AttachManager ────── Transport (SCSI, loop devices, ...)        host side
//!     │            └────────────── Unplugger                                  guest side
//!     ├────── BlockMountManager ── Mounter  (this machine, or a line to it)   guest side
//!     └────── Stack, View ──────── LayerCombiner, Binder                      guest side
//! ```
//!
//! - [`AttachManager`] attaches each disk once and shares the [`Attachment`].
//! - [`BlockMountManager`] mounts each device once for each set of [`MountOptions`] and shares the
//!   [`Mount`]. It knows no transport: a device is an opaque [`DeviceLocator`].
//! - [`Manager`] puts the two in a row, stacks layers as an overlay ([`Stack`]), and shows a mount at further places
//!   ([`View`]).
//!
//! Under all of them is one lease table, which shares, counts and serialises. Each set-up and tear-down
//! runs in a task of its own; callers only wait for it, so a caller can be cancelled at any moment. The last release
//! tears down: unmount, then unplug, then detach. A tear-down that fails is pending: it is retried
//! before the same disk is attached or the same device mounted again, and its path and slot stay taken until then.
//!
//! # Errors
//!
//! Every error has a [kind](ErrorKind), by what the caller can do next, and names the step, the disk, the
//! device and the path. A release that fails answers with a [`ReleaseError`], which can be retried;
//! [`Manager::drain`] retries all pending tear-downs. A handle that is dropped is released in the
//! background.
//!
//! # Backends
//!
//! | crate | implements | for |
//! |---|---|---|
//! | `blockmount-journal` | [`Journal`](journal::Journal) | what survives a restart, in a file |
//! | `blockmount-loopback` | [`Transport`], [`Resolver`], [`Unplugger`] | loop devices: host and guest are this machine |
//! | `blockmount-scsi` | [`Transport`] over its own small `Attacher`; [`Resolver`], [`Unplugger`] in Linux guests | any hypervisor with SCSI controllers |
//! | `blockmount-vpmem` | the same for persistent memory, whole devices and packed ones | any hypervisor with VPMEM or virtio-pmem |
//! | `blockmount-qemu` | both attachers by QMP; starts the VM | QEMU |
//! | `blockmount-hcs` | both attachers and the guest's contracts by HCS documents | Hyper-V |
//! | `blockmount-linux` | [`Mounter`], [`LayerCombiner`], [`Binder`] | every Linux guest: finds, probes, maps, mounts, combines |
//! | `blockmount-bridge` | [`Mounter`], [`LayerCombiner`], [`Binder`], [`Unplugger`] | a guest at the other end of a line |
//!
//! The contracts ([`Transport`], [`Unplugger`], [`Resolver`], [`Mounter`], [`LayerCombiner`], [`Binder`]) are small,
//! and each says what the implementor must do and what it may rely on; what holds for all of them is in
//! [`contracts`]. With the feature
//! `testing` there is a conformance suite that every backend must pass, and a VM in memory with faults on
//! demand.

mod attach;
mod blocking;
mod call;
mod claims;
pub mod contracts;
mod disk;
mod error;
mod freeze;
mod holders;
mod inspect;
pub mod journal;
mod lease;
mod linger;
mod locator;
mod manager;
mod mount;
mod name;
mod named;
mod options;
mod pci;
pub mod placement;
mod printable;
mod recovery;
mod release;
pub mod slots;
mod snapshot;
mod stack;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
mod transports;
mod turns;
mod usage;
mod view;
mod volume;

pub use attach::{AttachManager, Attachment};
pub use blocking::{after_queued, blocking, blocking_call, blocking_step};
#[doc(inline)]
pub use contracts::{
    BindMount, Binder, BlockDevice, LayerCombiner, Mounter, Overlay, Presence, Resolver, Transport,
    Unplugger,
};
pub use disk::{CacheMode, Disk, DiskId, DiskKind, DiskOption, DiskOptions, SectorSize};
pub use error::{BackendError, Error, ErrorKind, Step};
pub use freeze::Frozen;
pub use inspect::{
    AttachmentStatus, HolderStatus, Inspection, LeaseState, LeaseStatus, MountStatus, SlotStatus,
    StackStatus, StepBucket, StepStatus, ViewStatus,
};
pub use linger::Linger;
pub use locator::{DeviceLocator, InvalidLocator};
pub use manager::{DEFAULT_TIMEOUT, Drained, Manager, ManagerBuilder};
pub use mount::{BlockMountManager, Mount, MountPoint};
pub use name::{HolderName, InvalidHolderName};
pub use options::{
    Aead, Check, DeviceRole, Encryption, ErrorCorrection, Expose, ExtraDevice, ExtraDisk, Format,
    FsGroup, FsGroupPolicy, HashAlgorithm, IdMap, IdRange, InvalidOptions, KeySource, LuksKey,
    MountFlag, MountFlags, MountOptions, MountOptionsBuilder, MountRequest, NewDirectory,
    OnCorruption, OverlayOptions, Overwrite, Propagation, PropagationMode, Verity, ViewOptions,
};
pub use pci::PciAddress;
pub use printable::{Printable, printable};
pub use recovery::{Found, FoundHolder, FoundState, Held, Recovery, Report};
pub use release::ReleaseError;
pub use snapshot::Snapshot;
pub use stack::{Stack, StackRequest};
pub use turns::Turns;
pub use usage::{Space, Usage};
pub use view::{View, ViewRequest, Viewable};
