//! What a hypervisor does for SCSI disks.

use std::sync::Arc;

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, Disk, DiskId};

use crate::ScsiAddress;

/// Puts disks at SCSI addresses of one VM, and takes them out.
///
/// The two sides of the contract, besides the one of all backends ([`blockmount::contracts`]: bounded waits, no panics):
///
/// - *[`ScsiTransport`](crate::ScsiTransport) chooses the address.* The implementor may rely on it
///   being within the geometry, not reserved, and free as far as anybody knows: while an earlier
///   attachment or detachment at an address is in doubt, the address is not used for anything but `detach`.
///   In exchange the implementor must put the disk there and nowhere else, because the guest finds
///   the disk by its address.
/// - *One call at a time for one address.* The implementor must allow calls for different addresses
///   at once, because 64 layers are attached in the time of one. No lock is held during a call.
/// - *The answer decides about the address.* It is given to another disk right after `attach` has failed
///   with anything but `Uncertain`, or after `detach` has succeeded or failed with `Gone`. So the implementor
///   must answer `Uncertain` whenever it cannot prove that the disk is out.
/// - *Access rights to the disk are not its business*, nor is the guest's side of a detachment.
#[async_trait]
pub trait Attacher: Send + Sync + 'static {
    /// Says which disk is meant; as [`Transport::identify`](blockmount::Transport::identify).
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such disk, `Unsuitable` if this hypervisor cannot attach its kind.
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError>;

    /// Puts a disk at an address, and returns when the VM has it. All or nothing.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the disk may be there; `detach` of the address then follows before anything
    /// else happens with it. `Conflict` if something else is there, which stays as it is and must be in
    /// [`list`](Self::list), or if the disk is no longer the one with this id. After any other error nothing is at
    /// the address.
    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError>;

    /// Takes out whatever is at an address. If nothing is there, that is a success.
    ///
    /// # Errors
    ///
    /// After any error but `Gone` the address stays out of use, and the call may be repeated.
    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError>;

    /// Grows the disk at an address to so many bytes, and tells the VM; as
    /// [`Transport::resize`](blockmount::Transport::resize).
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this hypervisor cannot do it, `Invalid` if the disk is larger or read-only.
    async fn resize(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        bytes: u64,
    ) -> Result<(), BackendError>;

    /// Says which addresses are taken, also by disks that this attacher has not put there. Changes nothing.
    ///
    /// A disk with its [id](Occupant::id) is found again after a restart: without ids no disk is adopted, and all that a
    /// journal remembers is detached. What is left of one that was cut off half-way is [`Occupant::half_done`].
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this hypervisor cannot tell, `Gone` if the VM has ended; others as they come.
    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError>;
}

/// One attacher can serve several owners.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<A: Attacher + ?Sized> Attacher for Arc<A> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        (**self).identify(disk).await
    }

    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        (**self).attach(address, disk, id).await
    }

    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
        (**self).detach(address).await
    }

    async fn resize(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        bytes: u64,
    ) -> Result<(), BackendError> {
        (**self).resize(address, disk, bytes).await
    }

    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
        (**self).list().await
    }
}
