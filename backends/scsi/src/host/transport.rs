//! The SCSI controllers of a VM as a transport.

use std::fmt;

use async_trait::async_trait;
use blockmount::placement::{self, Call, Placement, SlotUse};
use blockmount::slots::{Occupied, Policy, Slot, SlotError, Slots};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Presence, Transport};
use thiserror::Error;

use crate::{Attacher, Geometry, ScsiAddress};

/// The SCSI controllers of a VM, as a [`Transport`].
///
/// It chooses addresses, in turn on all controllers so that attaching many disks at once does not
/// queue on one, and remembers which disk is where. [`Attacher`] does the rest.
///
/// An address is used for one disk until it is certain that the disk is out: after an attachment that
/// was `Uncertain`, whose future was dropped, or in which the attacher panicked, and after any
/// detachment that failed, [`detach`](Transport::detach) of that disk is what frees the address.
///
/// What the VM has and this transport did not put there is foreign: it is never detached, and its address is
/// used for nothing until the hypervisor shows that it has gone.
pub struct ScsiTransport<A> {
    attacher: A,
    geometry: Geometry,
    slots: Slots,
    placement: Placement<(Occupied, ScsiAddress)>,
}

/// A line of [`ScsiTransport::slot_map`].
pub type SlotEntry = placement::SlotEntry<ScsiAddress>;

fn slot_of(address: ScsiAddress) -> Slot {
    Slot {
        group: address.controller.get().into(),
        index: address.lun.get(),
    }
}

fn address_of(slot: Slot) -> ScsiAddress {
    let limits = "a table of slots is no larger than the addresses that there are";
    let controller = u64::from(slot.group).try_into().expect(limits);
    ScsiAddress::new(controller, u64::from(slot.index).try_into().expect(limits))
}

/// Why a transport cannot be made with these reserved addresses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidReserved {
    /// The VM has no such address.
    #[error("address {0} cannot be reserved: the VM has {1} controllers and LUNs")]
    OutOfRange(ScsiAddress, Geometry),
    /// It is in the list twice.
    #[error("address {0} is reserved twice")]
    Twice(ScsiAddress),
}

impl<A: Attacher> ScsiTransport<A> {
    /// All addresses of `geometry` but the `reserved` ones, such as that of the disk which the VM
    /// boots from. A reserved address is never given to a disk, and never detached.
    ///
    /// # Errors
    ///
    /// [`InvalidReserved`] if one of the reserved addresses does not exist or is there twice.
    #[expect(
        clippy::missing_panics_doc,
        reason = "a geometry is within the limits of a table"
    )]
    pub fn new(
        attacher: A,
        geometry: Geometry,
        reserved: &[ScsiAddress],
    ) -> Result<Self, InvalidReserved> {
        let slots = Slots::new(geometry.controllers(), geometry.luns(), Policy::Spread)
            .expect("a geometry is within the limits of a table");
        for address in reserved {
            slots.pin(slot_of(*address)).map_err(|error| match error {
                SlotError::Taken { .. } => InvalidReserved::Twice(*address),
                _ => InvalidReserved::OutOfRange(*address, geometry),
            })?;
        }
        Ok(ScsiTransport {
            attacher,
            geometry,
            slots,
            placement: Placement::new("SCSI address", reserved.iter().copied()),
        })
    }

    /// The size of the VM's SCSI bus.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// All addresses that are not free, in order.
    pub fn slot_map(&self) -> Vec<SlotEntry> {
        self.placement.slot_map()
    }

    /// Begins to attach a disk at an address that is free, or from which a foreign disk has gone.
    async fn begin(&self, disk: &Disk) -> Result<Call<(Occupied, ScsiAddress)>, BackendError> {
        let (list, allocate) = (self.attacher.list(), || self.allocate());
        let call = self
            .placement
            .attach_or_vacate(disk, allocate, list, PartialEq::eq);
        call.await?.ok_or_else(|| self.full())
    }

    /// Whether an attach met something else at the address, and not a disk that was replaced.
    async fn is_taken(&self, address: ScsiAddress, disk: &Disk, id: &DiskId) -> bool {
        if self
            .attacher
            .identify(disk)
            .await
            .is_ok_and(|now| now != *id)
        {
            return false;
        }
        let list = self.attacher.list().await;
        list.map_or(true, |list| {
            list.iter().any(|found| found.address == address)
        })
    }

    fn allocate_at(&self, address: ScsiAddress) -> Option<(Occupied, ScsiAddress)> {
        Some((
            self.slots.reserve_at(slot_of(address)).ok()?.fill(),
            address,
        ))
    }

    fn allocate(&self) -> Option<(Occupied, ScsiAddress)> {
        let slot = self.slots.reserve()?;
        let address = address_of(slot.slot());
        Some((slot.fill(), address))
    }

    fn full(&self) -> BackendError {
        BackendError::full(format!(
            "all {} SCSI addresses are taken ({} controllers and LUNs, {} reserved, {} foreign); \
             release a disk, or use another transport",
            self.geometry.capacity(),
            self.geometry,
            self.placement.reserved(),
            self.placement.foreign().len(),
        ))
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<A: Attacher> Transport for ScsiTransport<A> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.attacher.identify(disk).await
    }

    /// If this future is dropped, the disk keeps its address until it is detached.
    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let list = self.attacher.list();
        self.placement
            .survey(list, |at| self.allocate_at(*at))
            .await?;
        loop {
            let mut call = self.begin(disk).await?;
            let address = call.address();
            let answer = self.attacher.attach(address, disk, id).await;
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
        let answer = self.attacher.detach(call.address()).await;
        call.detached(answer)
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        let found = self.placement.map_disks(|other, (_, address), usage| {
            (other == disk && usage == SlotUse::Occupied).then_some(*address)
        });
        match found.into_iter().flatten().next() {
            Some(address) => self.attacher.resize(address, disk, bytes).await,
            None => Err(BackendError::not_found(format!(
                "disk {disk} is not attached"
            ))),
        }
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let Ok(at) = locator.map(ScsiAddress::try_from).transpose() else {
            return Ok(Presence::Absent);
        };
        let (list, allocate) = (self.attacher.list().await, |at: &_| self.allocate_at(*at));
        let found = self
            .placement
            .adopt(disk, id, at, list, allocate, PartialEq::eq)?;
        Ok(found.map(DeviceLocator::from))
    }
}

impl<A> fmt::Debug for ScsiTransport<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScsiTransport")
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}
