//! Slots: numbered places that are handed out, filled, and given back.
//!
//! Every transport hands out slots (a controller and a LUN, a device number), and so do the mount
//! managers for the paths that they make up. A [`Slots`] table is what they share: `groups` x `per_group` places, each of which is
//! [free, reserved, occupied, quarantined or pinned](SlotState).
//!
//! ```
//! use blockmount::slots::{Policy, SlotState, Slots};
//!
//! let slots = Slots::new(4, 64, Policy::Spread)?;
//! let reservation = slots.reserve().ok_or("all slots are taken")?; // dropped: free again
//! let slot = reservation.slot();
//! let occupied = reservation.fill(); // from here on, something may be in the slot
//! assert_eq!(slots.state(slot)?, SlotState::Occupied);
//! occupied.vacate(); // it is proven to be out
//! assert_eq!(slots.state(slot)?, SlotState::Free);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # No slot is freed twice, or by mistake
//!
//! A slot that is not free belongs to exactly one token, which can be moved and not copied. Only a
//! [`Reservation`] that was never filled frees its slot when it is dropped. An [`Occupied`] has to be
//! [vacated](Occupied::vacate) on purpose: if it gets lost (a panic, a forgotten branch), its slot
//! stays quarantined, because a slot that is lost costs one disk and a slot that is handed out while
//! a device is in it costs data.
//!
//! # Design
//!
//! Taking a slot must cost the same in an empty table of 256 and in a table of 1,048,576 with one place
//! left, so nothing may be scanned. The free slots of a group are a tree of 64-bit words: a bit
//! for each slot, above it a bit for each word that has any, above that one more level
//! (4 x 64 x 64 slots); one more word says which groups have free slots. The lowest free slot is four
//! `trailing_zeros` away, and "the next group with a free slot" is a rotation of that word. A free list would be as
//! fast, but it does not know which slot is lowest, nor can it give out a slot that is asked for.
//!
//! The tree is under one mutex, which is held for a few nanoseconds, never across a call to anybody
//! else, and only for these words. It is `parking_lot`'s because that one spins for a while before it
//! sleeps: with a wait this short, two threads at once cost half of what they do with the standard one.
//! Doing without a lock would need a retry loop over four levels, and could no longer promise the
//! lowest slot, nor that "none is free" was ever true.
//!
//! Memory: a byte of state and a little over a bit for each slot. 4 x 64 slots take 0.6 KiB, 64 x 16,384
//! slots 1.2 MiB. No operation allocates.

mod bitmap;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use thiserror::Error;

use table::Table;

/// The most groups of a table: what fits in one word, and as many controllers as any hypervisor gives.
pub const MAX_GROUPS: u16 = 64;

/// The most slots of a group: the LUNs of a virtio-scsi target (14 bits).
pub const MAX_PER_GROUP: u16 = 16_384;

/// One place in a table of [`Slots`]; on SCSI a controller and a LUN.
///
/// Slots sort by group, then by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// The group, from 0.
    pub group: u16,
    /// The place in the group, from 0.
    pub index: u16,
}

impl fmt::Display for Slot {
    /// Group and index: `0/3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.index)
    }
}

/// What a slot is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum SlotState {
    /// Nothing is in it, and no token holds it.
    Free,
    /// A [`Reservation`] holds it; nothing is in it yet.
    Reserved,
    /// Something is in it, or is about to be.
    Occupied,
    /// Something may be in it. It is not handed out until that is known.
    Quarantined,
    /// Never to be handed out.
    Pinned,
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SlotState::Free => "free",
            SlotState::Reserved => "reserved",
            SlotState::Occupied => "occupied",
            SlotState::Quarantined => "quarantined",
            SlotState::Pinned => "pinned",
        })
    }
}

/// Which free slot is handed out next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Policy {
    /// The lowest: all of group 0, then group 1. For numbers that should stay small.
    LowestFirst,
    /// The lowest of the next group with a free slot, in turn, so that work on several slots at once
    /// does not queue on one controller.
    Spread,
}

/// Why a table cannot be made, or a slot not be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SlotError {
    /// A table of this size cannot be.
    #[error(
        "a table of {groups} x {per_group} slots cannot be made; \
         it has 1 to {MAX_GROUPS} groups of 1 to {MAX_PER_GROUP} slots"
    )]
    Size {
        /// The groups asked for.
        groups: u16,
        /// The slots in each that were asked for.
        per_group: u16,
    },
    /// There is no such slot.
    #[error("there is no slot {slot} in a table of {groups} x {per_group}")]
    OutOfRange {
        /// The slot asked for.
        slot: Slot,
        /// The groups that there are.
        groups: u16,
        /// The slots in each.
        per_group: u16,
    },
    /// The slot is not free.
    #[error("slot {slot} is {state}, not free")]
    Taken {
        /// The slot asked for.
        slot: Slot,
        /// What it is used for.
        state: SlotState,
    },
}

/// A table of slots. Clones share the table.
///
/// See the [module](self) for an example and the design.
#[derive(Clone)]
pub struct Slots(Arc<Shared>);

struct Shared {
    groups: u16,
    per_group: u16,
    table: Mutex<Table>,
}

impl Slots {
    /// Makes a table in which all slots are free.
    ///
    /// # Errors
    ///
    /// [`SlotError::Size`] unless it has 1 to [`MAX_GROUPS`] groups of 1 to [`MAX_PER_GROUP`] slots.
    pub fn new(groups: u16, per_group: u16, policy: Policy) -> Result<Self, SlotError> {
        if !(1..=MAX_GROUPS).contains(&groups) || !(1..=MAX_PER_GROUP).contains(&per_group) {
            return Err(SlotError::Size { groups, per_group });
        }
        let table = Mutex::new(Table::new(groups, per_group, policy));
        Ok(Slots(Arc::new(Shared {
            groups,
            per_group,
            table,
        })))
    }

    /// Reserves the free slot that the policy prefers; none if all are taken.
    pub fn reserve(&self) -> Option<Reservation> {
        self.claim(Table::reserve)
    }

    /// Reserves the lowest free slot of one group; none if all of them are taken, or there is no such group.
    pub fn reserve_in(&self, group: u16) -> Option<Reservation> {
        self.claim(|table| table.reserve_in(group))
    }

    /// Reserves a particular slot.
    ///
    /// # Errors
    ///
    /// [`SlotError::OutOfRange`] or [`SlotError::Taken`].
    pub fn reserve_at(&self, slot: Slot) -> Result<Reservation, SlotError> {
        self.take(slot, SlotState::Reserved)?;
        Ok(Reservation(Claim::new(self, slot)))
    }

    /// Takes a slot out of use for good, such as the one of the disk that the VM boots from.
    ///
    /// # Errors
    ///
    /// [`SlotError::OutOfRange`] or [`SlotError::Taken`], also if the slot is pinned already.
    pub fn pin(&self, slot: Slot) -> Result<(), SlotError> {
        self.take(slot, SlotState::Pinned)
    }

    /// What a slot is used for at the moment.
    ///
    /// # Errors
    ///
    /// [`SlotError::OutOfRange`].
    pub fn state(&self, slot: Slot) -> Result<SlotState, SlotError> {
        self.check_range(slot)?;
        Ok(self.table().state(slot))
    }

    /// All slots that are not free, in order. Each group is shown as it was at one moment.
    pub fn taken(&self) -> Vec<(Slot, SlotState)> {
        let mut taken = Vec::new();
        for group in 0..self.0.groups {
            // A copy, so that the lock is not held while the list grows.
            let states = self.table().states_of(group).to_vec();
            let slots = (0..).map(|index| Slot { group, index }).zip(states);
            taken.extend(slots.filter(|(_, state)| *state != SlotState::Free));
        }
        taken
    }

    /// How many slots are not free.
    pub fn len(&self) -> usize {
        self.table().taken()
    }

    /// Whether all slots are free.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many slots there are, free or not.
    pub fn capacity(&self) -> usize {
        usize::from(self.0.groups) * usize::from(self.0.per_group)
    }

    fn claim(&self, choose: impl FnOnce(&mut Table) -> Option<Slot>) -> Option<Reservation> {
        let mut table = self.table();
        let slot = choose(&mut table)?;
        // Counted under the lock: two threads that each counted after it would take that line from one another once more.
        let claim = Claim::new(self, slot);
        drop(table);
        Some(Reservation(claim))
    }

    fn take(&self, slot: Slot, state: SlotState) -> Result<(), SlotError> {
        self.check_range(slot)?;
        let mut table = self.table();
        match table.state(slot) {
            SlotState::Free => {
                table.take(slot, state);
                Ok(())
            }
            state => Err(SlotError::Taken { slot, state }),
        }
    }

    fn check_range(&self, slot: Slot) -> Result<(), SlotError> {
        let Shared {
            groups, per_group, ..
        } = *self.0;
        if slot.group < groups && slot.index < per_group {
            return Ok(());
        }
        Err(SlotError::OutOfRange {
            slot,
            groups,
            per_group,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock()
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = format_args!("{} x {}", self.0.groups, self.0.per_group);
        f.debug_struct("Slots")
            .field("size", &size)
            .field("taken", &self.len())
            .finish()
    }
}

/// The holder of a slot, and what becomes of the slot when it is dropped.
struct Claim {
    slots: Slots,
    held: Held,
}

/// A slot, and whether it is free or quarantined when its token is dropped. In one word, a token is passed in two registers; several
/// fields would be written one by one and read back as one, for which a processor waits.
#[derive(Clone, Copy)]
struct Held(u32);

impl Held {
    const IS_FILLED: u32 = 1 << 31;
    const GROUP: u32 = 16;

    fn empty(slot: Slot) -> Self {
        Held(u32::from(slot.group) << Self::GROUP | u32::from(slot.index))
    }

    fn filled(self) -> Self {
        Held(self.0 | Self::IS_FILLED)
    }

    fn emptied(self) -> Self {
        Held(self.0 & !Self::IS_FILLED)
    }

    fn is_filled(self) -> bool {
        self.0 & Self::IS_FILLED != 0
    }

    fn slot(self) -> Slot {
        Slot {
            group: (self.emptied().0 >> Self::GROUP) as u16,
            index: self.0 as u16,
        }
    }
}

impl Claim {
    fn new(slots: &Slots, slot: Slot) -> Self {
        Claim {
            slots: slots.clone(),
            held: Held::empty(slot),
        }
    }

    fn set(&self, state: SlotState) {
        self.slots.table().set(self.held.slot(), state);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        match self.held.is_filled() {
            false => self.slots.table().give_back(self.held.slot()),
            true => self.set(SlotState::Quarantined),
        }
    }
}

/// A slot that is yours and empty. Dropping it gives the slot back.
#[must_use = "a reservation that is dropped is given back"]
pub struct Reservation(Claim);

impl Reservation {
    /// The slot.
    pub fn slot(&self) -> Slot {
        self.0.held.slot()
    }

    /// Says that something is about to be put in the slot. From here on, dropping the token does not
    /// free it; do this before the first step that could fill the slot.
    pub fn fill(self) -> Occupied {
        let mut claim = self.0;
        claim.held = claim.held.filled();
        claim.set(SlotState::Occupied);
        Occupied(claim)
    }
}

/// A slot that is yours and in which something may be.
///
/// Dropping it leaves the slot quarantined for good, since it may not be empty.
#[must_use = "an occupied slot that is dropped is lost; vacate it when it is empty"]
pub struct Occupied(Claim);

impl Occupied {
    /// The slot.
    pub fn slot(&self) -> Slot {
        self.0.held.slot()
    }

    /// Marks the slot as in doubt: whether anything is in it is not known. It stays yours and can
    /// still be [vacated](Self::vacate) when it is known.
    pub fn quarantine(&mut self) {
        self.0.set(SlotState::Quarantined);
    }

    /// Frees the slot. Only call this when it is certain that nothing is in it.
    pub fn vacate(mut self) {
        self.0.held = self.0.held.emptied();
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({})", self.slot())
    }
}

impl fmt::Debug for Occupied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Occupied({})", self.slot())
    }
}
