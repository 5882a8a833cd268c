//! What a hypervisor does for VPMEM devices.

use std::sync::Arc;

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, Disk, DiskId};

use crate::{ByteRange, DeviceNumber, VpmemAddress};

/// Puts disks on the VPMEM devices of one VM, and takes them out. All of them are read-only for the guest.
///
/// A device is used in one of two ways, never both: it is one disk (`attach`, `detach`), or many disks
/// are mapped to ranges of it (`map`, `unmap`). A device that is mapped to comes into being with its
/// first mapping; whether it goes with its last one is up to the implementor, since its number will only
/// be mapped to again.
///
/// The two sides of the contract, besides the one of all backends (bounded waits, no panics):
///
/// - *The transport chooses device and range.* The implementor may rely on
///   them being free: what is in doubt is not used for anything but tear-down. In
///   exchange the disk is put there and nowhere else, because the guest finds it by number and offset.
/// - *One call at a time* for one whole device, and for one range. The implementor must allow all others
///   at once, also for ranges of the same device. No lock is held during a call.
/// - *The answer decides about the address.* It is given to another disk right after `attach` or `map` has
///   failed with anything but `Uncertain`, or after `detach` or `unmap` has succeeded or failed with `Gone`.
/// - *What cannot be unplugged stays.* A hypervisor that cannot take a device out answers `detach` with
///   `Unsuitable`: the device then keeps its number and its disk, and is offered again when the same
///   disk is asked for, by [`DiskId`] and size. So an id that `identify` has given must not be given
///   to another disk while the device is there; the implementor keeps the file open, for example.
#[async_trait]
pub trait Attacher: Send + Sync + 'static {
    /// Says which disk is meant; as [`Transport::identify`](blockmount::Transport::identify).
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such disk, `Unsuitable` if this hypervisor cannot attach its kind.
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError>;

    /// The size of a disk in bytes, as the file or device has it now. An empty disk may be answered with
    /// 0, which the transport refuses.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such disk, `Invalid` if it is empty.
    async fn size(&self, disk: &Disk) -> Result<u64, BackendError>;

    /// Puts a disk on a device of its own, and returns when the VM has it. All or nothing.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the disk may be there; `detach` then follows before anything else happens with
    /// the device. `Conflict` if something else is there, which stays as it is and must be in [`list`](Self::list), or
    /// if the disk is no longer the one with this id. After any other error nothing is there.
    async fn attach(
        &self,
        device: DeviceNumber,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError>;

    /// Takes out whatever disk a device is. If there is none, that is a success.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if the device is there and can never be taken out of this VM. After any error but
    /// `Gone` the number stays out of use, and the call may be repeated.
    async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError>;

    /// Maps a disk to a range of a device, which is as long as the disk was when [`size`](Self::size)
    /// was asked, rounded up to whole pages. All or nothing.
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach); `Unsuitable` if this hypervisor cannot map.
    async fn map(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError>;

    /// Takes away the mapping to exactly this range. If there is none, that is a success.
    ///
    /// # Errors
    ///
    /// After any error but `Gone` the range stays out of use, and the call may be repeated.
    async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError>;

    /// Says which devices and ranges are taken, also by disks that this attacher has not put there. Changes nothing.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this hypervisor cannot tell, `Gone` if the VM has ended; others as they come.
    async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError>;
}

/// One attacher can serve several owners.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<A: Attacher + ?Sized> Attacher for Arc<A> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        (**self).identify(disk).await
    }

    async fn size(&self, disk: &Disk) -> Result<u64, BackendError> {
        (**self).size(disk).await
    }

    async fn attach(
        &self,
        device: DeviceNumber,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        (**self).attach(device, disk, id).await
    }

    async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError> {
        (**self).detach(device).await
    }

    async fn map(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        (**self).map(device, range, disk, id).await
    }

    async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError> {
        (**self).unmap(device, range).await
    }

    async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
        (**self).list().await
    }
}
