//! Which disk is at which address.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blockmount::slots::{Occupied, Policy, Slot, SlotError, SlotState, Slots};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Transport};
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
pub struct ScsiTransport<A> {
    attacher: A,
    geometry: Geometry,
    reserved: usize,
    slots: Slots,
    /// By the disk as it was given. Never locked across a call of the attacher.
    disks: Mutex<HashMap<Disk, Place>>,
}

/// A disk that is at an address, or may be.
struct Place {
    slot: Occupied,
    /// Whether the attacher is working on it.
    busy: bool,
}

impl Place {
    fn address(&self) -> ScsiAddress {
        address_of(self.slot.slot())
    }
}

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

/// A line of [`ScsiTransport::slot_map`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotEntry {
    /// The address.
    pub address: ScsiAddress,
    /// What it is used for. Quarantined: whether the disk is there is not known.
    pub state: SlotState,
    /// The disk; none at a reserved address.
    pub disk: Option<Disk>,
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
        let disks = Mutex::default();
        Ok(ScsiTransport {
            attacher,
            geometry,
            reserved: reserved.len(),
            slots,
            disks,
        })
    }

    /// The size of the VM's SCSI bus.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// All addresses that are not free, in order. While disks come and go, a disk may be missing
    /// from its line for a moment.
    pub fn slot_map(&self) -> Vec<SlotEntry> {
        let taken = self.slots.taken();
        let disks = self.disks();
        let at: HashMap<_, _> = disks
            .iter()
            .map(|(disk, place)| (place.address(), disk))
            .collect();
        let line = |(slot, state)| {
            let address = address_of(slot);
            SlotEntry {
                address,
                state,
                disk: at.get(&address).copied().cloned(),
            }
        };
        taken.into_iter().map(line).collect()
    }

    /// Finds a place for a disk, and enters it there before the attacher hears of it: from then on
    /// the place is only freed by somebody who knows that the disk is not there.
    fn place(&self, disk: &Disk) -> Result<Call<'_, A>, BackendError> {
        let mut disks = self.disks();
        if let Some(place) = disks.get(disk) {
            let at = place.address();
            let message = format!("disk {disk} is or may be at {at} already; detach it first");
            return Err(BackendError::conflict(message));
        }
        let slot = self.slots.reserve().ok_or_else(|| self.full())?.fill();
        let place = Place { slot, busy: true };
        let address = place.address();
        disks.insert(disk.clone(), place);
        Ok(Call {
            transport: self,
            disk: disk.clone(),
            address,
            outcome: Outcome::InDoubt,
        })
    }

    /// Finds a disk that is to be detached.
    fn find(&self, disk: &Disk) -> Result<Option<Call<'_, A>>, BackendError> {
        let mut disks = self.disks();
        let Some(place) = disks.get_mut(disk) else {
            return Ok(None);
        };
        let address = place.address();
        if place.busy {
            let message =
                format!("disk {disk} is being attached or detached at {address}; wait for that");
            return Err(BackendError::busy(message));
        }
        place.busy = true;
        Ok(Some(Call {
            transport: self,
            disk: disk.clone(),
            address,
            outcome: Outcome::InDoubt,
        }))
    }

    fn full(&self) -> BackendError {
        BackendError::full(format!(
            "all {} SCSI addresses are taken ({} controllers and LUNs, {} reserved); \
             release a disk, or use another transport",
            self.geometry.capacity(),
            self.geometry,
            self.reserved,
        ))
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<Disk, Place>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call of the attacher for one disk. It is made before the call and settled when it is dropped, so
/// that a future which is dropped and a panic leave the truth: the place is in doubt.
struct Call<'a, A: Attacher> {
    transport: &'a ScsiTransport<A>,
    disk: Disk,
    address: ScsiAddress,
    outcome: Outcome,
}

#[derive(Clone, Copy)]
enum Outcome {
    Present,
    Absent,
    InDoubt,
}

impl<A: Attacher> Drop for Call<'_, A> {
    fn drop(&mut self) {
        let mut disks = self.transport.disks();
        if let Outcome::Absent = self.outcome {
            if let Some(place) = disks.remove(&self.disk) {
                place.slot.vacate();
            }
        } else if let Some(place) = disks.get_mut(&self.disk) {
            place.busy = false;
            if let Outcome::InDoubt = self.outcome {
                place.slot.quarantine();
            }
        }
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
        let mut call = self.place(disk)?;
        let result = self.attacher.attach(call.address, disk, id).await;
        call.outcome = match &result {
            Ok(()) => Outcome::Present,
            Err(error) if error.kind() == ErrorKind::Uncertain => Outcome::InDoubt,
            Err(_) => Outcome::Absent,
        };
        result.map(|()| call.address.into())
    }

    /// If this future is dropped, the disk keeps its address, and can be detached again.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(mut call) = self.find(disk)? else {
            return Ok(());
        };
        let result = self.attacher.detach(call.address).await;
        let gone = |error: &BackendError| error.kind() == ErrorKind::Gone;
        if result.is_ok() || result.as_ref().is_err_and(gone) {
            call.outcome = Outcome::Absent;
        }
        result
    }
}

impl<A> fmt::Debug for ScsiTransport<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScsiTransport")
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}
