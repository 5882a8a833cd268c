//! The VPMEM devices of a VM as a transport.

use std::fmt;

use async_trait::async_trait;
use blockmount::placement::{self, Allocation, Call, Outcome, Placement, SlotUse};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};

use super::devices::{Allocated, Devices, DiskVersion, InvalidReserved, Mode};
use crate::{Attacher, DeviceNumber, Geometry, VpmemAddress};

/// The VPMEM devices of a VM, as a [`Transport`] for read-only disks.
///
/// It chooses the device, or the range of one, and remembers which disk is where. [`Attacher`] does the
/// rest. What does not fit is `Unsuitable` (a disk that is to be written to, an empty one, one larger
/// than a device), and with nothing free it is `Full`: a [`Manager`](blockmount::Manager) with several
/// transports then passes the disk on to the next.
///
/// A device or range is used for one disk until it is certain that the disk is out: after an attachment that
/// was `Uncertain`, whose future was dropped, or in which the attacher panicked, and after any
/// detachment that failed, [`detach`](Transport::detach) of that disk is what frees it.
///
/// What the VM has and this transport did not put there is foreign: it is never detached, and its address is
/// used for nothing until the hypervisor shows that it has gone.
///
/// # Devices that cannot be unplugged
///
/// Some hypervisors cannot take a device out (QEMU's nvdimm). The attacher then answers `detach` with
/// `Unsuitable`, and the disk counts as detached, but its device is *retained*: it keeps its number,
/// is never given to another disk, and is what the same disk gets when it is asked for again, without
/// a call of the attacher. The same is what has the same [`DiskId`] and size: a new file under an
/// old name is attached anew.
pub struct VpmemTransport<A> {
    attacher: A,
    devices: Devices,
    placement: Placement<Allocated>,
}

/// A line of [`VpmemTransport::slot_map`].
pub type SlotEntry = placement::SlotEntry<VpmemAddress>;

impl<A: Attacher> VpmemTransport<A> {
    /// All devices of `geometry` but the `reserved` ones, such as that of the disk which the VM
    /// boots from. A reserved device is never given to a disk, and never detached.
    ///
    /// # Errors
    ///
    /// [`InvalidReserved`] if one of the reserved devices does not exist or is there twice.
    pub fn new(
        attacher: A,
        geometry: Geometry,
        mode: Mode,
        reserved: &[DeviceNumber],
    ) -> Result<Self, InvalidReserved> {
        let whole = |device: &DeviceNumber| VpmemAddress {
            device: *device,
            range: None,
        };
        Ok(VpmemTransport {
            attacher,
            devices: Devices::new(mode, geometry, reserved)?,
            placement: Placement::new("VPMEM device", reserved.iter().map(whole)),
        })
    }

    /// How many devices the VM has, and how large they are.
    pub fn geometry(&self) -> Geometry {
        self.devices.geometry()
    }

    /// How the devices are used.
    pub fn mode(&self) -> Mode {
        self.devices.mode()
    }

    /// All devices and ranges that are not free, in order.
    pub fn slot_map(&self) -> Vec<SlotEntry> {
        self.placement.slot_map()
    }

    /// How many devices are retained: their disks were detached and cannot be unplugged.
    pub fn retained(&self) -> usize {
        self.placement.retained()
    }

    /// Refuses a disk that cannot be on VPMEM. Changes nothing.
    async fn examine(&self, disk: &Disk, id: &DiskId) -> Result<DiskVersion, BackendError> {
        if !disk.is_read_only() {
            let message = format!("disk {disk} cannot be on VPMEM, which is read-only for the VM");
            return Err(BackendError::unsuitable(message));
        }
        let size = self.attacher.size(disk).await?;
        let most = self.geometry().device_size();
        if size == 0 || size > most {
            let message = format!(
                "disk {disk} of {size} bytes cannot be on VPMEM, whose devices hold 1 to {most} bytes"
            );
            return Err(BackendError::unsuitable(message));
        }
        let id = id.clone();
        Ok(DiskVersion { id, size })
    }

    /// Begins to attach a disk to a device or range that is free, or from which a foreign disk has gone.
    async fn begin(
        &self,
        disk: &Disk,
        version: &DiskVersion,
    ) -> Result<Call<Allocated>, BackendError> {
        let allocate = || self.devices.allocate(version.clone());
        let list = self.attacher.list();
        let call = self.placement.attach_or_vacate(disk, allocate, list, is_in);
        call.await?
            .ok_or_else(|| self.devices.full(version.size, &self.placement))
    }

    /// Keeps what others have attached from all disks, before the first attach.
    async fn survey(&self) -> Result<(), BackendError> {
        let foreign = |at: &VpmemAddress| {
            let id = DiskId::name("foreign");
            self.devices.allocate_at(at, DiskVersion { id, size: 0 })
        };
        self.placement.survey(self.attacher.list(), foreign).await
    }

    /// Whether an attach met something else at the address, and not a disk that was replaced.
    async fn is_taken(&self, at: VpmemAddress, disk: &Disk, id: &DiskId) -> bool {
        if self
            .attacher
            .identify(disk)
            .await
            .is_ok_and(|now| now != *id)
        {
            return false;
        }
        // An attacher may show a device that disks are mapped to, and not its ranges.
        let is_other = |other: VpmemAddress| other.device == at.device && other != at;
        let ours = self.placement.map_disks(|_, allocated, usage| {
            usage == SlotUse::Occupied && is_other(allocated.address())
        });
        let is_ours = |found: &VpmemAddress| found.range != at.range && ours.contains(&true);
        let is_foreign = |found: &VpmemAddress| is_in(found, &at) && !is_ours(found);
        let list = self.attacher.list().await;
        list.map_or(true, |list| {
            list.iter().any(|found| is_foreign(&found.address))
        })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<A: Attacher> Transport for VpmemTransport<A> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.attacher.identify(disk).await
    }

    /// If this future is dropped, the disk keeps its address until it is detached.
    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        disk.options().require_only(&[])?;
        let version = self.examine(disk, id).await?;
        let is_same = |retained: &Allocated| retained.version == version;
        if let Some(address) = self.placement.reuse(disk, is_same)? {
            return Ok(address.into());
        }
        self.survey().await?;
        loop {
            let mut call = self.begin(disk, &version).await?;
            let address @ VpmemAddress { device, range } = call.address();
            let answer = match range {
                None => self.attacher.attach(device, disk, id).await,
                Some(range) => self.attacher.map(device, range, disk, id).await,
            };
            if call.met_conflict(&answer) && self.is_taken(address, disk, id).await {
                continue;
            }
            call.attached(answer)?;
            return Ok(address.into());
        }
    }

    /// If this future is dropped, the disk keeps its address, and can be detached again.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(call) = self.placement.detach(disk)? else {
            return Ok(());
        };
        let VpmemAddress { device, range } = call.address();
        let Some(range) = range else {
            let answer = self.attacher.detach(device).await;
            if answer
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::Unsuitable)
            {
                call.end(Outcome::Retained);
                return Ok(());
            }
            return call.detached(answer);
        };
        call.detached(self.attacher.unmap(device, range).await)
    }

    async fn resize(&self, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable(
            "devices of persistent memory keep their size",
        ))
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let Ok(at) = locator.map(VpmemAddress::try_from).transpose() else {
            return Ok(Presence::Absent);
        };
        let list = self.attacher.list().await;
        // Only a device that is retained needs the size again, and one of no known size is never used again.
        let size = self.attacher.size(disk).await.unwrap_or(0);
        let allocate = |at: &VpmemAddress| {
            let id = id.clone();
            self.devices.allocate_at(at, DiskVersion { id, size })
        };
        let found = self.placement.adopt(disk, id, at, list, allocate, is_in)?;
        Ok(found.map(DeviceLocator::from))
    }
}

/// Whether a disk at the one address is in the way of one at the other.
fn is_in(one: &VpmemAddress, other: &VpmemAddress) -> bool {
    let are_apart = match (one.range, other.range) {
        (Some(one), Some(other)) => one.end() <= other.offset() || other.end() <= one.offset(),
        _ => false,
    };
    one.device == other.device && !are_apart
}

impl<A> fmt::Debug for VpmemTransport<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VpmemTransport")
            .field("geometry", &self.devices.geometry())
            .field("mode", &self.devices.mode())
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}
