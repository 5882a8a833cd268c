//! Who is where: the book that a transport keeps of its devices and ranges.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use blockmount::slots::{Occupied, Policy, Slot, SlotError, SlotState, Slots};
use blockmount::{BackendError, Disk, DiskId};

use super::packing::{MAX_MAPPINGS, PackedRange, Packing};
use super::transport::{InvalidReserved, Mode, SlotEntry, SlotUse};
use crate::{DeviceNumber, Geometry, VpmemAddress};

/// What a disk was when it was attached. A file that was replaced under its name, or has grown, is
/// another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) id: DiskId,
    /// In bytes; not 0.
    pub(crate) size: u64,
}

/// How a call of the attacher has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The disk is there.
    Present,
    /// The disk is not there.
    Absent,
    /// The disk is there, and nobody can take it out.
    Fixed,
    /// Nobody knows.
    InDoubt,
}

/// Where a disk was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entered {
    /// At a free place: the attacher is to put it there.
    Anew(VpmemAddress),
    /// On the retained device that it is on already.
    Retained(VpmemAddress),
}

pub(crate) struct Places {
    mode: Mode,
    geometry: Geometry,
    reserved: usize,
    slots: Slots,
    /// By the disk as it was given.
    disks: HashMap<Disk, Place>,
    /// Disks that were detached and are still there.
    retained: Vec<(Disk, Place)>,
    /// The devices that disks are mapped to. One with no range taken is not in here.
    packed: BTreeMap<DeviceNumber, (Occupied, Packing)>,
}

/// A disk that is somewhere, or may be.
struct Place {
    seat: Seat,
    known: Known,
    /// Whether the attacher is working on it.
    busy: bool,
    in_doubt: bool,
}

enum Seat {
    Device(Occupied),
    Range(DeviceNumber, PackedRange),
}

impl Seat {
    fn address(&self) -> VpmemAddress {
        match self {
            Seat::Device(slot) => VpmemAddress {
                device: device_of(slot.slot()),
                range: None,
            },
            Seat::Range(device, packed) => VpmemAddress {
                device: *device,
                range: Some(packed.range()),
            },
        }
    }
}

fn device_of(slot: Slot) -> DeviceNumber {
    let number = u64::from(slot.index);
    DeviceNumber::try_from(number).expect("a geometry has no more devices than there are numbers")
}

fn slot_of(device: DeviceNumber) -> Slot {
    Slot {
        group: 0,
        index: device.get().into(),
    }
}

impl Places {
    pub(crate) fn new(
        mode: Mode,
        geometry: Geometry,
        reserved: &[DeviceNumber],
    ) -> Result<Self, InvalidReserved> {
        let slots = Slots::new(1, geometry.devices(), Policy::LowestFirst)
            .expect("128 devices are within the limits of a table");
        for device in reserved {
            slots.pin(slot_of(*device)).map_err(|error| match error {
                SlotError::Taken { .. } => InvalidReserved::Twice(*device),
                _ => InvalidReserved::OutOfRange(*device, geometry.devices()),
            })?;
        }
        Ok(Places {
            mode,
            geometry,
            reserved: reserved.len(),
            slots,
            disks: HashMap::new(),
            retained: Vec::new(),
            packed: BTreeMap::new(),
        })
    }

    /// Finds a place for a disk, and enters it there before the attacher hears of it: from then on
    /// the place is only freed by somebody who knows that the disk is not there.
    pub(crate) fn enter(&mut self, disk: &Disk, known: Known) -> Result<Entered, BackendError> {
        if let Some(place) = self.disks.get(disk) {
            let at = place.seat.address();
            let message =
                format!("disk {disk} is or may be on VPMEM device {at} already; detach it first");
            return Err(BackendError::conflict(message));
        }
        if let Some(index) = self.retained.iter().position(|(_, at)| at.known == known) {
            let (_, place) = self.retained.swap_remove(index);
            let address = place.seat.address();
            self.disks.insert(disk.clone(), place);
            return Ok(Entered::Retained(address));
        }
        let seat = self.seat(known.size).ok_or_else(|| self.full(known.size))?;
        let address = seat.address();
        let place = Place {
            seat,
            known,
            busy: true,
            in_doubt: false,
        };
        self.disks.insert(disk.clone(), place);
        Ok(Entered::Anew(address))
    }

    fn seat(&mut self, size: u64) -> Option<Seat> {
        if self.mode == Mode::WholeDevices {
            return Some(Seat::Device(self.slots.reserve()?.fill()));
        }
        // Devices in use first: a device costs the guest more than a range.
        for (device, (_, packing)) in &self.packed {
            if let Some(range) = packing.reserve(size) {
                return Some(Seat::Range(*device, range));
            }
        }
        let slot = self.slots.reserve()?;
        let packing = Packing::new(self.geometry);
        let range = packing.reserve(size)?;
        let device = device_of(slot.slot());
        self.packed.insert(device, (slot.fill(), packing));
        Some(Seat::Range(device, range))
    }

    /// Marks a disk as about to be detached, and says where it is; nothing if it is nowhere.
    pub(crate) fn leave(&mut self, disk: &Disk) -> Result<Option<VpmemAddress>, BackendError> {
        let Some(place) = self.disks.get_mut(disk) else {
            return Ok(None);
        };
        let address = place.seat.address();
        if place.busy {
            let message = format!(
                "disk {disk} is being attached to or detached from VPMEM device {address}; wait for that"
            );
            return Err(BackendError::busy(message));
        }
        place.busy = true;
        Ok(Some(address))
    }

    /// Enters how a call for a disk has ended.
    pub(crate) fn settle(&mut self, disk: &Disk, outcome: Outcome) {
        let Some(mut place) = self.disks.remove(disk) else {
            return;
        };
        place.busy = false;
        match outcome {
            Outcome::Absent => self.vacate(place.seat),
            Outcome::Fixed => {
                place.in_doubt = false;
                self.retained.push((disk.clone(), place));
            }
            Outcome::Present | Outcome::InDoubt => {
                place.in_doubt = outcome == Outcome::InDoubt;
                self.disks.insert(disk.clone(), place);
            }
        }
    }

    fn vacate(&mut self, seat: Seat) {
        match seat {
            Seat::Device(slot) => slot.vacate(),
            Seat::Range(device, range) => {
                range.vacate();
                // With nothing on it, its number may become anybody's.
                if let Entry::Occupied(packed) = self.packed.entry(device)
                    && packed.get().1.is_empty()
                {
                    packed.remove().0.vacate();
                }
            }
        }
    }

    pub(crate) fn retained(&self) -> usize {
        self.retained.len()
    }

    pub(crate) fn slot_map(&self) -> Vec<SlotEntry> {
        let pinned = self.slots.taken().into_iter().filter_map(|(slot, state)| {
            let address = VpmemAddress {
                device: device_of(slot),
                range: None,
            };
            (state == SlotState::Pinned).then_some(SlotEntry {
                address,
                usage: SlotUse::Pinned,
                disk: None,
            })
        });
        let entry = |disk: &Disk, place: &Place, usage| SlotEntry {
            address: place.seat.address(),
            usage,
            disk: Some(disk.clone()),
        };
        let disks = self.disks.iter().map(|(disk, place)| {
            let usage = if place.in_doubt {
                SlotUse::Quarantined
            } else {
                SlotUse::Occupied
            };
            entry(disk, place, usage)
        });
        let retained = self
            .retained
            .iter()
            .map(|(disk, place)| entry(disk, place, SlotUse::Retained));
        let mut map: Vec<SlotEntry> = pinned.chain(disks).chain(retained).collect();
        map.sort_by_key(|line| line.address);
        map
    }

    fn full(&self, size: u64) -> BackendError {
        let (devices, reserved) = (self.geometry.devices(), self.reserved);
        let rest = "release a disk, or use another transport";
        BackendError::full(match self.mode {
            Mode::WholeDevices => format!(
                "all {devices} VPMEM devices are taken ({reserved} reserved, {} retained); {rest}",
                self.retained.len()
            ),
            Mode::Packed => {
                let packings = self.packed.values().map(|(_, packing)| packing);
                let free = packings.clone().map(Packing::free).max().unwrap_or(0);
                let mapped: usize = packings.map(Packing::len).sum();
                format!(
                    "none of the {devices} VPMEM devices has room for {size} bytes ({reserved} reserved, \
                     {mapped} disks mapped, at most {MAX_MAPPINGS} on a device, {free} bytes free on the \
                     emptiest); {rest}"
                )
            }
        })
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places")
            .field("mode", &self.mode)
            .field("geometry", &self.geometry)
            .field("disks", &self.disks.len())
            .field("retained", &self.retained.len())
            .finish_non_exhaustive()
    }
}
