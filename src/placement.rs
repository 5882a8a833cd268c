//! Which disk is attached where: the state that every [`Transport`](crate::Transport) keeps.
//!
//! This module is for authors of transports. A [`Placement`] records what each disk occupies (a slot, a byte range), and
//! for each attach or detach there is a [`Call`] that records how it has ended. What a transport adds is the choice of an
//! address and the calls of its hypervisor:
//!
//! ```
//! use async_trait::async_trait;
//! use blockmount::placement::Placement;
//! use blockmount::slots::{Occupied, Policy, Slot, Slots};
//! use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Presence, Transport};
//!
//! struct Toy {
//!     slots: Slots,
//!     placement: Placement<(Occupied, u16)>,
//! }
//!
//! #[async_trait]
//! impl Transport for Toy {
//!     async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
//!         Ok(DiskId::name(&disk.source().to_string_lossy()))
//!     }
//!     async fn attach(&self, disk: &Disk, _: &DiskId) -> Result<DeviceLocator, BackendError> {
//!         let allocate = || {
//!             let slot = self.slots.reserve()?;
//!             let port = slot.slot().index;
//!             Some((slot.fill(), port))
//!         };
//!         let call = self.placement.attach(disk, allocate)?;
//!         let call = call.ok_or_else(|| BackendError::full("all ports are taken"))?;
//!         let port = call.address();
//!         call.attached(async { /* hypervisor.plug(port, disk).await */ Ok(()) }.await)?;
//!         Ok(DeviceLocator::new("toy", port).expect("a number is an address"))
//!     }
//!     async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
//!         let Some(call) = self.placement.detach(disk)? else { return Ok(()) };
//!         call.detached(async { /* hypervisor.unplug(call.address()).await */ Ok(()) }.await)
//!     }
//!     async fn resize(&self, _: &Disk, _: u64) -> Result<(), BackendError> {
//!         Err(BackendError::unsuitable("toys do not grow"))
//!     }
//!     async fn adopt(
//!         &self,
//!         disk: &Disk,
//!         _: &DiskId,
//!         locator: Option<&DeviceLocator>,
//!     ) -> Result<Presence<DeviceLocator>, BackendError> {
//!         let port = locator.and_then(|locator| locator.address().parse().ok());
//!         let allocate = || {
//!             let slot = Slot { group: 0, index: port? };
//!             Some((self.slots.reserve_at(slot).ok()?.fill(), slot.index))
//!         };
//!         // What is recorded so is in doubt until the hypervisor has been asked.
//!         let Some(call) = self.placement.attach(disk, allocate)? else { return Ok(Presence::Absent) };
//!         // hypervisor.list().await says what is there
//!         call.adopted(match locator {
//!             Some(locator) => Ok(Presence::Present(locator.clone())),
//!             None => Ok(Presence::Absent),
//!         })
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (slots, placement) = (Slots::new(1, 8, Policy::LowestFirst)?, Placement::new("port", []));
//! let toy = Toy { slots, placement };
//! let disk = Disk::virtual_disk("/images/base.erofs");
//! let locator = toy.attach(&disk, &toy.identify(&disk).await?).await?;
//! assert_eq!(locator.as_str(), "toy:0");
//! toy.detach(&disk).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What happens to an allocation
//!
//! | a call | ended with | then |
//! |---|---|---|
//! | attach | success | occupied |
//! | attach | `Uncertain`, a panic, a dropped future | in doubt: only `detach` of the same disk frees it |
//! | attach | any other error | free |
//! | attach, adopt | [`Outcome::Foreign`] | foreign: kept from all disks until [`Placement::vacate_foreign`] hears that the occupant has gone |
//! | adopt | `Present` | occupied |
//! | adopt | `Absent`, `Gone` | free |
//! | adopt | `Unknown`, any other error, a panic, a dropped future | in doubt, as after an attach |
//! | detach | success, `Gone`, `LostWrites` | free |
//! | detach | any other error, a panic, a dropped future | in doubt, and the call may be repeated |
//! | detach | [`Outcome::Retained`] | the disk counts as detached, and its device waits for [`Placement::reuse`] |

mod call;
mod occupant;
mod slot_map;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::OnceCell;

pub use self::call::Call;
pub use self::occupant::Occupant;
pub use self::slot_map::{SlotEntry, SlotUse};

use crate::slots::Occupied;
use crate::{BackendError, Disk};

/// What a transport has set aside for one disk, such as a slot.
///
/// The implementor must not block, panic or call the [`Placement`] in these functions, because they run with its lock held.
pub trait Allocation: Send + 'static {
    /// Where the disk is, as error messages and [`Placement::slot_map`] show it.
    type Address: Clone + Ord + fmt::Display + Send + Sync;

    /// Where the disk is.
    fn address(&self) -> Self::Address;

    /// Frees what was set aside. Only called when the disk is certain not to be there.
    fn vacate(self);
}

/// A slot and its address.
impl<A: Clone + Ord + fmt::Display + Send + Sync + 'static> Allocation for (Occupied, A) {
    type Address = A;

    fn address(&self) -> A {
        self.1.clone()
    }

    fn vacate(self) {
        self.0.vacate();
    }
}

/// How a call of the hypervisor for one disk has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The disk is there.
    Present,
    /// The disk is not there: its allocation is free.
    Absent,
    /// Whether the disk is there is not known: its allocation is used for nothing but a detach of this disk.
    InDoubt,
    /// The disk is there and cannot be taken out of this VM: for the caller it is detached, and its allocation waits for
    /// [`Placement::reuse`].
    Retained,
    /// The disk is not there, and something is that was put there by others. It is never detached: its allocation waits for
    /// [`Placement::vacate_foreign`], and the transport may begin again for the disk, with another one.
    Foreign,
}

/// Which disk is attached where, of one transport. Clones share it.
///
/// See the [module](self) for an example.
pub struct Placement<P: Allocation>(Arc<Shared<P>>);

struct Shared<P: Allocation> {
    noun: &'static str,
    reserved: Box<[P::Address]>,
    /// Set once the hypervisor has been asked what the VM has already.
    surveyed: OnceCell<()>,
    /// Held for look-ups and changes only, never across a call of a hypervisor.
    table: Mutex<Table<P>>,
}

struct Table<P> {
    /// By the disk as it was given to the transport.
    disks: HashMap<Disk, Record<P>>,
    /// Disks that were detached and are still there.
    retained: Vec<(Disk, P)>,
    /// Where the VM has something that others put there.
    foreign: Vec<P>,
}

struct Record<P> {
    allocation: P,
    /// Whether a call is under way.
    busy: bool,
    in_doubt: bool,
}

impl<P: Allocation> Placement<P> {
    /// A placement with no disks. `noun` is what an address is called in error messages, such as `SCSI address`;
    /// `reserved` are the addresses that belong to the VM, for [`slot_map`](Self::slot_map) and
    /// [`reserved`](Self::reserved): the caller keeps them from being allocated.
    pub fn new(noun: &'static str, reserved: impl IntoIterator<Item = P::Address>) -> Self {
        Placement(Arc::new(Shared {
            noun,
            reserved: reserved.into_iter().collect(),
            surveyed: OnceCell::new(),
            table: Mutex::new(Table {
                disks: HashMap::new(),
                retained: Vec::new(),
                foreign: Vec::new(),
            }),
        }))
    }

    /// Begins to attach or to adopt a disk, with what `allocate` sets aside for it; `None` if that is nothing. `allocate` runs
    /// with the lock held, and must not call this placement. To adopt, it reserves the very slot of the locator.
    ///
    /// The disk is recorded before the hypervisor is called. From then on only its [`Call`]s free the allocation.
    ///
    /// # Errors
    ///
    /// `Conflict` if the disk is attached, or may be.
    pub fn attach(
        &self,
        disk: &Disk,
        allocate: impl FnOnce() -> Option<P>,
    ) -> Result<Option<Call<P>>, BackendError> {
        let mut table = self.table();
        self.refuse_attached(&table, disk)?;
        let Some(allocation) = allocate() else {
            return Ok(None);
        };
        let record = Record {
            allocation,
            busy: true,
            in_doubt: false,
        };
        table.disks.insert(disk.clone(), record);
        Ok(Some(self.call(disk)))
    }

    /// Attaches a disk without any call, if a [retained](Outcome::Retained) device `is_same`, and says where that is.
    ///
    /// # Errors
    ///
    /// `Conflict` if the disk is attached, or may be.
    pub fn reuse(
        &self,
        disk: &Disk,
        is_same: impl Fn(&P) -> bool,
    ) -> Result<Option<P::Address>, BackendError> {
        let mut table = self.table();
        self.refuse_attached(&table, disk)?;
        let mut retained = table.retained.iter();
        let Some(index) = retained.position(|(_, allocation)| is_same(allocation)) else {
            return Ok(None);
        };
        let (_, allocation) = table.retained.swap_remove(index);
        let address = allocation.address();
        let record = Record {
            allocation,
            busy: false,
            in_doubt: false,
        };
        table.disks.insert(disk.clone(), record);
        Ok(Some(address))
    }

    /// Begins to detach a disk; `None` if it is not attached.
    ///
    /// # Errors
    ///
    /// `Busy` if a call for the disk is under way.
    pub fn detach(&self, disk: &Disk) -> Result<Option<Call<P>>, BackendError> {
        let mut table = self.table();
        let Some(record) = table.disks.get_mut(disk) else {
            return Ok(None);
        };
        if record.busy {
            let (noun, address) = (self.0.noun, record.allocation.address());
            return Err(BackendError::busy(format!(
                "disk {disk} is being attached or detached at {noun} {address}; wait for that"
            )));
        }
        record.busy = true;
        Ok(Some(self.call(disk)))
    }

    /// Keeps an allocation from all disks because the VM has something there that others put there, such as what the
    /// hypervisor lists before the first attach.
    pub fn add_foreign(&self, allocation: P) {
        self.table().foreign.push(allocation);
    }

    /// Frees the foreign allocations whose occupant `has_gone`, as the hypervisor has shown, and says how many those are. It
    /// runs with the lock held, and must not call this placement.
    pub fn vacate_foreign(&self, has_gone: impl Fn(&P) -> bool) -> usize {
        let mut table = self.table();
        let gone: Vec<P> = table
            .foreign
            .extract_if(.., |kept| has_gone(kept))
            .collect();
        let count = gone.len();
        gone.into_iter().for_each(P::vacate);
        count
    }

    /// Where the VM has something that others put there, in no order.
    pub fn foreign(&self) -> Vec<P::Address> {
        self.table().foreign.iter().map(P::address).collect()
    }

    /// All addresses that are not free, in order.
    pub fn slot_map(&self) -> Vec<SlotEntry<P::Address>> {
        let entry = |address, usage, disk| SlotEntry {
            address,
            usage,
            disk,
        };
        let mut map = self.map_disks(|disk, allocation, usage| {
            entry(allocation.address(), usage, Some(disk.clone()))
        });
        let reserved = self.0.reserved.iter().cloned();
        map.extend(reserved.map(|address| entry(address, SlotUse::Pinned, None)));
        let foreign = self.foreign().into_iter();
        map.extend(foreign.map(|address| entry(address, SlotUse::Foreign, None)));
        map.sort_by(|one, other| one.address.cmp(&other.address));
        map
    }

    /// What `line` makes of each disk that is recorded, in no order. It runs with the lock held, and must not call this
    /// placement.
    pub fn map_disks<T>(&self, mut line: impl FnMut(&Disk, &P, SlotUse) -> T) -> Vec<T> {
        let table = self.table();
        let mut lines = Vec::with_capacity(table.disks.len() + table.retained.len());
        for (disk, record) in &table.disks {
            let usage = match record.in_doubt {
                true => SlotUse::Quarantined,
                false => SlotUse::Occupied,
            };
            lines.push(line(disk, &record.allocation, usage));
        }
        for (disk, allocation) in &table.retained {
            lines.push(line(disk, allocation, SlotUse::Retained));
        }
        lines
    }

    /// How many addresses are reserved for the VM.
    pub fn reserved(&self) -> usize {
        self.0.reserved.len()
    }

    /// How many devices are [retained](Outcome::Retained).
    pub fn retained(&self) -> usize {
        self.table().retained.len()
    }

    fn refuse_attached(&self, table: &Table<P>, disk: &Disk) -> Result<(), BackendError> {
        let Some(record) = table.disks.get(disk) else {
            return Ok(());
        };
        let (noun, address) = (self.0.noun, record.allocation.address());
        Err(BackendError::conflict(format!(
            "disk {disk} is or may be at {noun} {address} already; detach it first, also if its file was replaced"
        )))
    }

    fn call(&self, disk: &Disk) -> Call<P> {
        Call {
            placement: self.clone(),
            disk: disk.clone(),
            outcome: Outcome::InDoubt,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table<P>> {
        self.0.table.lock()
    }
}

impl<P: Allocation> Clone for Placement<P> {
    fn clone(&self) -> Self {
        Placement(Arc::clone(&self.0))
    }
}

impl<P: Allocation> fmt::Debug for Placement<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table();
        f.debug_struct("Placement")
            .field("disks", &table.disks.len())
            .field("retained", &table.retained.len())
            .field("foreign", &table.foreign.len())
            .field("reserved", &self.reserved())
            .finish()
    }
}
