//! VPMEM disks by documents.

use std::fmt;

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, Disk, DiskId};
use blockmount_vpmem::{Attacher, ByteRange, DeviceNumber, VpmemAddress};

use crate::documents::{DiskAddress, Settings, VirtualPMemDevice, VirtualPMemMapping};
use crate::vm::Vm;
use crate::{ComputeSystem, GuestOs, disk};

/// Puts disks on the VPMEM devices of a VM of Hyper-V: image files, read-only, in Linux guests.
///
/// A disk of another kind, or in a guest of Windows, is `Unsuitable`, so that a manager tries the next transport.
/// The VM must have the devices (see [`Devices`](crate::documents::Devices)), and access to the files.
pub struct VpmemAttacher<S> {
    vm: Vm<S>,
    guest: GuestOs,
}

impl<S> fmt::Debug for VpmemAttacher<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VpmemAttacher")
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

impl<S: ComputeSystem> VpmemAttacher<S> {
    /// The devices of a VM that runs `guest`.
    pub fn new(system: S, guest: GuestOs) -> Self {
        VpmemAttacher {
            vm: Vm::new(system),
            guest,
        }
    }

    fn fit(&self, disk: &Disk) -> Result<Disk, BackendError> {
        if self.guest == GuestOs::Windows {
            let message = format!("a Windows guest cannot mount VPMEM devices, so not disk {disk}");
            return Err(BackendError::unsuitable(message));
        }
        disk::absolute(disk)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ComputeSystem> Attacher for VpmemAttacher<S> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        disk::identify(disk).await
    }

    async fn size(&self, disk: &Disk) -> Result<u64, BackendError> {
        disk::size(disk).await
    }

    async fn attach(
        &self,
        device: DeviceNumber,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        let settings = Settings::VpmemDevice(VirtualPMemDevice::of(&self.fit(disk)?)?);
        disk::prove(disk, id).await?;
        self.vm
            .add(DiskAddress::VpmemDevice(device), settings)
            .await
    }

    async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError> {
        self.vm.remove(DiskAddress::VpmemDevice(device)).await
    }

    async fn map(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        let settings = Settings::VpmemMapping(VirtualPMemMapping::of(&self.fit(disk)?)?);
        disk::prove(disk, id).await?;
        self.vm.add(mapping(device, range), settings).await
    }

    async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError> {
        self.vm.remove(mapping(device, range)).await
    }

    /// The service does not show a VM's disks: `Gone` if the VM has ended, else `Unsuitable`.
    async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
        Err(self.vm.cannot_list().await)
    }
}

fn mapping(device: DeviceNumber, range: ByteRange) -> DiskAddress {
    let offset = range.offset();
    DiskAddress::VpmemMapping { device, offset }
}
