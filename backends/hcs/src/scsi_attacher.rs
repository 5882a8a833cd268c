//! SCSI disks by documents.

use std::fmt;

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, Disk, DiskId};
use blockmount_scsi::{Attacher, Geometry, ScsiAddress};

use crate::documents::{Attachment, DiskAddress, Settings};
use crate::vm::Vm;
use crate::{ComputeSystem, GuestOs, disk};

/// Puts disks on the SCSI controllers of a VM of Hyper-V.
///
/// The VM must have the controllers (see [`Devices`](crate::documents::Devices)), and access to the files of its disks:
/// this does not grant it. What is on the controllers when the VM is made, such as its root disk, must be
/// reserved with the transport.
pub struct ScsiAttacher<S> {
    vm: Vm<S>,
    guest: GuestOs,
}

impl<S> fmt::Debug for ScsiAttacher<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScsiAttacher")
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

impl<S: ComputeSystem> ScsiAttacher<S> {
    /// The controllers of a VM that runs `guest`.
    pub fn new(system: S, guest: GuestOs) -> Self {
        ScsiAttacher {
            vm: Vm::new(system),
            guest,
        }
    }

    /// The addresses that this guest can use, for the transport: it then gives no other address to a disk. If the
    /// VM was made with fewer controllers, give the transport fewer.
    pub fn geometry(&self) -> Geometry {
        self.guest.scsi_geometry()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ComputeSystem> Attacher for ScsiAttacher<S> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        disk::identify(disk).await
    }

    /// `Unsuitable`, before anything is attached, at an address that the guest could not mount from.
    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        if !self.geometry().contains(address) {
            let (guest, geometry) = (self.guest.name(), self.geometry());
            return Err(BackendError::unsuitable(format!(
                "a {guest} guest of Hyper-V can use {geometry} SCSI controllers and LUNs, \
                 which do not have address {address}"
            )));
        }
        let attachment = Attachment::of(&disk::absolute(disk)?)?;
        let settings = Settings::Attachment(attachment);
        disk::prove(disk, id).await?;
        self.vm.add(DiskAddress::Scsi(address), settings).await
    }

    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
        self.vm.remove(DiskAddress::Scsi(address)).await
    }

    /// The service has no request for it: a virtual disk is grown by the storage interface of Windows.
    async fn resize(&self, _: ScsiAddress, disk: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable(format!(
            "cannot grow disk {disk}: Hyper-V does not grow the disks of a running VM by this interface"
        )))
    }

    /// The service does not show a VM's disks: `Gone` if the VM has ended, else `Unsuitable`.
    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
        Err(self.vm.cannot_list().await)
    }
}
