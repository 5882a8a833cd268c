//! Which devices are free, and which ranges of the others.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockmount::placement::{Allocation, Placement};
use blockmount::slots::{Occupied, Policy, Slot, SlotError, Slots};
use blockmount::{BackendError, DiskId};
use thiserror::Error;

use super::packing::{MAX_MAPPINGS, PackedRange, Packing};
use crate::{DeviceNumber, Geometry, VpmemAddress};

/// How the devices of a transport are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Each disk is a device of its own.
    WholeDevices,
    /// Disks are mapped to ranges of devices, up to [`MAX_MAPPINGS`](crate::MAX_MAPPINGS) on each. A range is as long
    /// as the disk, rounded up to whole pages. A device is filled before the next one is begun, and a
    /// device with nothing on it is free again.
    Packed,
}

/// Why a transport cannot be made with these reserved devices.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidReserved {
    /// The VM has no such device.
    #[error("VPMEM device {0} cannot be reserved: the VM has {1} devices, from 0")]
    OutOfRange(DeviceNumber, u16),
    /// It is in the list twice.
    #[error("VPMEM device {0} is reserved twice")]
    Twice(DeviceNumber),
}

/// The devices of a VM. Clones share them.
#[derive(Clone)]
pub(super) struct Devices(Arc<Shared>);

struct Shared {
    mode: Mode,
    geometry: Geometry,
    slots: Slots,
    /// The devices that disks are mapped to, each with at least one range taken.
    packed: Mutex<BTreeMap<DeviceNumber, (Occupied, Packing)>>,
}

/// What a disk was when it was attached. A file that was replaced under its name, or has grown, differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskVersion {
    pub(super) id: DiskId,
    /// In bytes; not 0.
    pub(super) size: u64,
}

/// What a disk has been given: a device, or a range of one.
pub(super) struct Allocated {
    position: Position,
    pub(super) version: DiskVersion,
}

enum Position {
    Device(Occupied),
    Range(Devices, DeviceNumber, PackedRange),
}

impl Allocation for Allocated {
    type Address = VpmemAddress;

    fn address(&self) -> VpmemAddress {
        match &self.position {
            Position::Device(slot) => VpmemAddress {
                device: device_of(slot.slot()),
                range: None,
            },
            Position::Range(_, device, packed) => VpmemAddress {
                device: *device,
                range: Some(packed.range()),
            },
        }
    }

    fn vacate(self) {
        match self.position {
            Position::Device(slot) => slot.vacate(),
            Position::Range(devices, device, range) => {
                let mut packed = devices.packed();
                range.vacate();
                // With nothing on it, the device may be used again for anything.
                if let Entry::Occupied(packed) = packed.entry(device)
                    && packed.get().1.is_empty()
                {
                    packed.remove().0.vacate();
                }
            }
        }
    }
}

fn device_of(slot: Slot) -> DeviceNumber {
    let number = u64::from(slot.index);
    DeviceNumber::try_from(number).expect("a geometry has no more devices than there are numbers")
}

impl Devices {
    pub(super) fn new(
        mode: Mode,
        geometry: Geometry,
        reserved: &[DeviceNumber],
    ) -> Result<Self, InvalidReserved> {
        let slots = Slots::new(1, geometry.devices(), Policy::LowestFirst)
            .expect("128 devices are within the limits of a table");
        for device in reserved {
            let index = device.get().into();
            slots
                .pin(Slot { group: 0, index })
                .map_err(|error| match error {
                    SlotError::Taken { .. } => InvalidReserved::Twice(*device),
                    _ => InvalidReserved::OutOfRange(*device, geometry.devices()),
                })?;
        }
        Ok(Devices(Arc::new(Shared {
            mode,
            geometry,
            slots,
            packed: Mutex::default(),
        })))
    }

    pub(super) fn mode(&self) -> Mode {
        self.0.mode
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// A free device or range for a disk.
    pub(super) fn allocate(&self, version: DiskVersion) -> Option<Allocated> {
        let position = match self.0.mode {
            Mode::WholeDevices => Position::Device(self.0.slots.reserve()?.fill()),
            Mode::Packed => self.allocate_range(version.size)?,
        };
        Some(Allocated { position, version })
    }

    /// A particular device or range, which an earlier process may have used.
    pub(super) fn allocate_at(&self, at: &VpmemAddress, version: DiskVersion) -> Option<Allocated> {
        let index = at.device.get().into();
        let reserve = || self.0.slots.reserve_at(Slot { group: 0, index }).ok();
        let position = match at.range {
            None => Position::Device(reserve()?.fill()),
            Some(range) => {
                let mut packed = self.packed();
                if let Entry::Vacant(vacant) = packed.entry(at.device) {
                    vacant.insert((reserve()?.fill(), Packing::new(self.0.geometry)));
                }
                let (_, packing) = packed.get(&at.device)?;
                Position::Range(self.clone(), at.device, packing.reserve_at(range)?)
            }
        };
        Some(Allocated { position, version })
    }

    fn allocate_range(&self, size: u64) -> Option<Position> {
        let mut packed = self.packed();
        // Devices in use first: a device costs the guest more than a range.
        for (device, (_, packing)) in packed.iter() {
            if let Some(range) = packing.reserve(size) {
                return Some(Position::Range(self.clone(), *device, range));
            }
        }
        let slot = self.0.slots.reserve()?;
        let packing = Packing::new(self.0.geometry);
        let range = packing.reserve(size)?;
        let device = device_of(slot.slot());
        packed.insert(device, (slot.fill(), packing));
        Some(Position::Range(self.clone(), device, range))
    }

    /// Why there was nothing for a disk of so many bytes.
    pub(super) fn full(&self, size: u64, placement: &Placement<Allocated>) -> BackendError {
        let (reserved, retained) = (placement.reserved(), placement.retained());
        let foreign = placement.foreign().len();
        let devices = self.0.geometry.devices();
        let rest = "release a disk, or use another transport";
        BackendError::full(match self.0.mode {
            Mode::WholeDevices => format!(
                "all {devices} VPMEM devices are taken ({reserved} reserved, {retained} retained, {foreign} foreign); {rest}"
            ),
            Mode::Packed => {
                let packed = self.packed();
                let packings = packed.values().map(|(_, packing)| packing);
                let free = packings.clone().map(Packing::free).max().unwrap_or(0);
                let mapped: usize = packings.map(Packing::len).sum();
                format!(
                    "none of the {devices} VPMEM devices has {size} bytes free in one piece ({reserved} reserved, {foreign} foreign, \
                     {mapped} disks mapped, at most {MAX_MAPPINGS} on a device, {free} bytes free on the \
                     emptiest); {rest}"
                )
            }
        })
    }

    fn packed(&self) -> MutexGuard<'_, BTreeMap<DeviceNumber, (Occupied, Packing)>> {
        self.0.packed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
