//! The contracts between the managers and the backends.
//!
//! They have two sides. **The managers** never run two calls for one key (a disk, a locator, a target)
//! at once: they make them one after the other, in the order in which they were asked, and let every
//! call finish. No future of a backend is dropped half-way while its runtime lives, but for
//! [`Transport::identify`], which changes nothing. **A backend**, in exchange, gives five promises that
//! the managers build on:
//!
//! - *Set-up is all or nothing.* After an error, nothing of it is left; where a backend cannot know
//!   (a time-out, a lost connection), it answers [`ErrorKind::Uncertain`] and the managers tear down
//!   before they try again.
//! - *Tear-down can be repeated.* Tearing down what is absent succeeds, and after any error the same
//!   call may be made again.
//! - *Calls for one key take effect in the order in which they were made*, also when the answer to one
//!   was lost. A backend behind a line (a connection, a queue, a thread) may have given up on a mount, or
//!   its future was dropped, while the other end is still at work. The unmount that follows then waits
//!   for that work or cancels it: once the unmount has succeeded, the late mount must not. The same is
//!   true of attach and detach of a disk, combine and separate of a target, and unplug and a later attach
//!   at the same locator.
//! - *What a restart left is found by asking.* After a manager was restarted, `adopt` says of each thing that its
//!   [`Journal`](crate::journal::Journal) remembers whether it is there, and makes it the implementor's own again.
//! - *Every wait ends.* A backend bounds its own waits and never panics, whatever it is given. (A
//!   panic is caught and counts as `Uncertain`.)
//!
//! None of the traits has provided methods: a wrapper that forgets to forward one would silently
//! change what it wraps.
//!
//! [`ErrorKind::Uncertain`]: crate::ErrorKind::Uncertain

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use crate::{BackendError, DeviceLocator, Disk, DiskId, MountOptions, Usage};

mod trees;

pub use trees::{BindMount, Overlay};

/// What is there of something that a journal remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Presence<T = ()> {
    /// It is there, and from now on as if the implementor's own call had set it up.
    Present(T),
    /// It is not there, and nothing is recorded of it.
    Absent,
    /// It cannot be told now: the manager tears it down by its key before it uses anything of it.
    Unknown,
}

impl<T> Presence<T> {
    /// The same with another value, as [`Option::map`].
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Presence<U> {
        match self {
            Presence::Present(there) => Presence::Present(change(there)),
            Presence::Absent => Presence::Absent,
            Presence::Unknown => Presence::Unknown,
        }
    }
}

/// Makes disks visible to the VM: SCSI, VPMEM, loop devices. Host side.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Says which disk is meant, so that a disk under two names is attached once.
    ///
    /// The implementor must give equal ids to whatever names the same disk (a relative path, a link, a
    /// hard link), different ids to different disks, and must change nothing. It is
    /// called for every request, also for disks that are attached, and its future is dropped when the
    /// caller is cancelled.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such disk, `Unsuitable` if this transport cannot attach its kind.
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError>;

    /// Attaches a disk: reserves a slot, fills it, and says where the device is. It is never given a
    /// disk that equals one that is attached.
    ///
    /// `id` is what [`identify`](Self::identify) answered for this request. The path may name another file by now, so the
    /// implementor must prove the id on what it has opened, and attach exactly that.
    ///
    /// The implementor must honour each of the [options](Disk::options) that are set, or refuse the disk
    /// ([`DiskOptions::require_only`](crate::DiskOptions::require_only)). The locator must be unique among all
    /// transports of the manager: one that another disk has is a `Conflict`, and the disk is detached again.
    ///
    /// The implementor must not hand out a slot again while a device may be in it: after `Uncertain`
    /// the slot stays out of use until [`detach`](Self::detach) of the same disk has succeeded.
    ///
    /// What the VM has and this manager did not put there is foreign. The implementor must never detach it: it keeps
    /// that slot out of use, and takes another one for the disk (see [`placement`](crate::placement)).
    ///
    /// # Errors
    ///
    /// `Full` if no slot is free and `Unsuitable` if the disk does not fit this transport; in both
    /// cases another transport may be tried. `Conflict` if the disk is no longer the one with this id.
    /// `NotFound`, `Uncertain`, `Gone` and others as they come.
    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError>;

    /// Detaches a disk and frees its slot. It is given a disk that equals the one attached.
    ///
    /// The implementor may rely on the device being unplugged in the guest, with three exceptions, in which the
    /// guest was never told of it: the attachment was `Uncertain`, its locator was that of another disk, or
    /// the manager was built without an [`Unplugger`].
    ///
    /// # Errors
    ///
    /// After any error the disk still has its slot, and the call may be repeated. `Gone` counts as
    /// done, and so does `LostWrites`.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError>;

    /// Grows an attached disk to `bytes`, and tells the VM. One that has this size already stays as it is.
    ///
    /// The implementor must never make a disk smaller, and must change nothing of a disk that it has not attached.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this transport cannot do it, `NotFound` if the disk is not attached, `Invalid` if it is larger or
    /// attached read-only. After any error the call may be repeated.
    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError>;

    /// Says whether a disk that an earlier process attached is there, and takes it over.
    ///
    /// It is called at most once for each disk that a journal remembers, by a manager that recovers, before any other
    /// call for this disk but [`identify`](Self::identify). The implementor must ask the hypervisor (or the kernel), never
    /// guess, and must change nothing outside of its own tables. `id` is what the disk was identified as when it was attached;
    /// its file may be gone by now.
    ///
    /// `locator` is what the attach answered. Without one the attach was cut off before its answer was written
    /// down, and the implementor looks for the disk by what the hypervisor shows of it (a node's name, a serial, the
    /// backing file of a loop device).
    ///
    /// - `Present`: the disk is there; its slot is occupied, and [`detach`](Self::detach) works as after an attach.
    /// - `Absent`: the disk is not there. If something else is at the locator, that slot stays out of use as foreign, and
    ///   its occupant is never detached.
    /// - `Unknown`: the slot, if the locator says which, stays out of use as after `Uncertain`, until a detach of the
    ///   same disk has decided.
    ///
    /// # Errors
    ///
    /// `Gone` counts as `Absent`; after any other error the caller goes on as after `Unknown`, and so must the implementor.
    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError>;
}

/// Removes a device from the guest before the host detaches it. Guest side.
#[async_trait]
pub trait Unplugger: Send + Sync + 'static {
    /// Proves that the device is not in use in the guest, writes back what is cached and removes it from
    /// the guest. Unplugging a device that is not there succeeds.
    ///
    /// # Errors
    ///
    /// `Busy` if the device is in use; it then stays as it was.
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError>;
}

/// Finds the block device behind a locator. Guest side.
#[async_trait]
pub trait Resolver: Send + Sync + 'static {
    /// Waits until the device can be opened, proves that it is the one that is meant, and names it. Changes nothing.
    ///
    /// The implementor must not guess: the order in which the kernel gives names is not the order of
    /// attachment. Waiting is for events, with a deadline.
    ///
    /// # Errors
    ///
    /// `NotFound` if the device has not appeared in time, `Unsuitable` if the locator is of another
    /// transport, `Invalid` if its address makes no sense.
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError>;

    /// Has the guest's kernel ask a device that is there for its size and its access again, if it may know it by one that was there
    /// before. Whether it knew something else.
    ///
    /// An engine calls it before it does what depends on the size alone, such as making a filesystem, and after a mount has
    /// failed, which it then tries once more. The default is for transports whose guests always learn what is plugged.
    ///
    /// # Errors
    ///
    /// As for [`resolve`](Self::resolve); a device that is not there is none.
    async fn measure(&self, device: &DeviceLocator) -> Result<bool, BackendError> {
        let _is_known = device;
        Ok(false)
    }
}

/// A block device of the guest, as a [`Resolver`] found it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BlockDevice {
    /// The device node.
    pub path: PathBuf,
    /// The bytes of it that are meant, where one device holds many disks; all of it if none.
    pub range: Option<Range<u64>>,
    /// The device itself, if its resolver has it open for reading: it need not be opened again to be read. Others may use the
    /// same handle, so it is read by position alone.
    pub open: Option<Arc<File>>,
}

impl BlockDevice {
    /// All of the device at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        BlockDevice {
            path: path.into(),
            range: None,
            open: None,
        }
    }

    /// These bytes of the device.
    #[must_use]
    pub fn with_range(mut self, range: impl Into<Option<Range<u64>>>) -> Self {
        self.range = range.into();
        self
    }

    /// With a handle of the device that is open for reading.
    #[must_use]
    pub fn with_open(mut self, open: impl Into<Option<Arc<File>>>) -> Self {
        self.open = open.into();
        self
    }
}

/// By what it names: a handle is only another way to it.
impl PartialEq for BlockDevice {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path && self.range == other.range
    }
}

impl Eq for BlockDevice {}

/// Mounts devices. Guest side, or the host's end of a line to it.
#[async_trait]
pub trait Mounter: Send + Sync + 'static {
    /// Mounts a device at a target, which it makes if it is not there.
    ///
    /// # Errors
    ///
    /// `NotFound` if the device, its partition or a filesystem on it is not there, `Conflict` if the
    /// target is taken, `Invalid` if the target or the options cannot be, `Unsuitable` for what
    /// this guest cannot do.
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError>;

    /// Unmounts what [`mount`](Self::mount) has mounted at the target, and removes the directories
    /// that it made. The target alone is enough: the implementor keeps a ledger of what to undo.
    /// A target where nothing was mounted is unmounted.
    ///
    /// # Errors
    ///
    /// `Busy` if the mount is in use; it then stays as it was. `Conflict` if what is at the
    /// target was not mounted by this implementor. `LostWrites` if it is unmounted and not everything that was
    /// written has reached the disk.
    async fn unmount(&self, target: &Path) -> Result<(), BackendError>;

    /// Says how much of the filesystem at a target is used. Changes nothing.
    ///
    /// # Errors
    ///
    /// `NotFound` if nothing of this implementor's is mounted there, `Unsuitable` if this guest cannot tell.
    async fn usage(&self, target: &Path) -> Result<Usage, BackendError>;

    /// Tells the device below a target which of its blocks the filesystem does not use, and answers how many bytes those are.
    ///
    /// # Errors
    ///
    /// `NotFound` as for [`usage`](Self::usage), `Unsuitable` if the device, the filesystem or this guest cannot do it,
    /// `Invalid` if it is mounted read-only.
    async fn trim(&self, target: &Path) -> Result<u64, BackendError>;

    /// Grows what is at a target after its disk has grown to `bytes`: the implementor waits until the guest has seen that, and
    /// grows the devices in between and the filesystem, which stay in use. What has grown already stays as it is.
    ///
    /// # Errors
    ///
    /// `NotFound` as for [`usage`](Self::usage), or if the guest has not seen the disk grow in time; `Unsuitable` if something
    /// on the way cannot grow, with its name; `Invalid` if it is mounted read-only. The call may be repeated.
    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError>;

    /// Says whether a mount that an earlier process made is there, and takes it over.
    ///
    /// It is called at most once for each mount that a journal remembers, by a manager that recovers, before any other
    /// call for this target. The implementor must ask the guest, never guess, and must change nothing outside of its own
    /// tables. After `Present` an [`unmount`](Self::unmount) works as after a mount, and after `Unknown` it decides.
    /// Another device or other options at the target are `Absent`.
    ///
    /// # Errors
    ///
    /// As for [`Transport::adopt`].
    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError>;
}

/// Stacks mounted layers as an overlay. Guest side, or the host's end of a line to it.
#[async_trait]
pub trait LayerCombiner: Send + Sync + 'static {
    /// Makes the layers appear as one tree at the target.
    ///
    /// # Errors
    ///
    /// As for [`Mounter::mount`].
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError>;

    /// Takes an overlay apart, by its target alone. What was written to the scratch stays there. A
    /// target where nothing was combined is separated.
    ///
    /// # Errors
    ///
    /// As for [`Mounter::unmount`].
    async fn separate(&self, target: &Path) -> Result<(), BackendError>;

    /// Says whether an overlay that an earlier process made is there, and takes it over, as
    /// [`Mounter::adopt`] does for mounts.
    ///
    /// # Errors
    ///
    /// As for [`Transport::adopt`].
    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError>;
}

/// Shows mounts at further places: bind mounts with options of their own. Guest side, or the host's end of a line to it.
#[async_trait]
pub trait Binder: Send + Sync + 'static {
    /// Shows a mount of [`Mounter::mount`], or a directory of it, at a target, which it makes if it is not there.
    ///
    /// The implementor must follow no link on the way to the directory, and must not leave the mount: what is in it is
    /// not trusted. Options that it cannot honour are `Unsuitable`, by name. What is shown is in use: it is not unmounted
    /// before its views are gone.
    ///
    /// # Errors
    ///
    /// As for [`Mounter::mount`]; `NotFound` if the source is not mounted by this implementor, or has no such directory.
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError>;

    /// Removes a view, by its target alone, and the directories that were made for it. What it shows stays mounted. A target
    /// where nothing was bound is unbound.
    ///
    /// # Errors
    ///
    /// As for [`Mounter::unmount`].
    async fn unbind(&self, target: &Path) -> Result<(), BackendError>;

    /// Says whether a view that an earlier process made is there, and takes it over, as [`Mounter::adopt`] does for mounts.
    ///
    /// # Errors
    ///
    /// As for [`Transport::adopt`].
    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError>;
}

/// A backend behind a pointer is a backend: an `Arc` shares one between managers.
macro_rules! forward_through_pointers {
    (@one $pointer:ident $contract:ident {
        $($method:ident($($arg:ident: $type:ty),*) -> $output:ty;)*
    }) => {
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<T: $contract + ?Sized> $contract for $pointer<T> {
            $(async fn $method(&self, $($arg: $type),*) -> Result<$output, BackendError> {
                (**self).$method($($arg),*).await
            })*
        }
    };
    ($($contract:ident { $($method:ident($($arg:ident: $type:ty),*) -> $output:ty;)* })*) => {$(
        forward_through_pointers! { @one Arc $contract { $($method($($arg: $type),*) -> $output;)* } }
        forward_through_pointers! { @one Box $contract { $($method($($arg: $type),*) -> $output;)* } }
    )*};
}

forward_through_pointers! {
    Transport {
        identify(disk: &Disk) -> DiskId;
        attach(disk: &Disk, id: &DiskId) -> DeviceLocator;
        detach(disk: &Disk) -> ();
        resize(disk: &Disk, bytes: u64) -> ();
        adopt(disk: &Disk, id: &DiskId, locator: Option<&DeviceLocator>) -> Presence<DeviceLocator>;
    }
    Unplugger { unplug(device: &DeviceLocator) -> (); }
    Resolver {
        resolve(device: &DeviceLocator) -> BlockDevice;
        measure(device: &DeviceLocator) -> bool;
    }
    Mounter {
        mount(device: &DeviceLocator, target: &Path, options: &MountOptions) -> ();
        unmount(target: &Path) -> ();
        usage(target: &Path) -> Usage;
        trim(target: &Path) -> u64;
        grow(target: &Path, bytes: u64) -> ();
        adopt(device: &DeviceLocator, target: &Path, options: &MountOptions) -> Presence;
    }
    LayerCombiner {
        combine(overlay: &Overlay) -> ();
        separate(target: &Path) -> ();
        adopt(overlay: &Overlay) -> Presence;
    }
    Binder {
        bind(bind: &BindMount) -> ();
        unbind(target: &Path) -> ();
        adopt(bind: &BindMount) -> Presence;
    }
}
