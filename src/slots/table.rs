//! What the lock of [`Slots`](super::Slots) protects: states, free sets, and the choice of a slot.

use super::bitmap::Bitmap;
use super::{MAX_GROUPS, Policy, Slot, SlotState};

/// Every operation is a fixed number of steps, so that the lock is held for nanoseconds.
#[derive(Debug)]
pub(super) struct Table {
    per_group: u16,
    policy: Policy,
    /// One byte for each slot, group by group.
    states: Box<[SlotState]>,
    free: Box<[Bitmap]>,
    /// A bit for each group that has a free slot.
    with_free: u64,
    /// Where [`Policy::Spread`] looks first.
    next_group: u32,
    taken: usize,
}

impl Table {
    pub(super) fn new(groups: u16, per_group: u16, policy: Policy) -> Self {
        let capacity = usize::from(groups) * usize::from(per_group);
        Table {
            per_group,
            policy,
            states: vec![SlotState::Free; capacity].into(),
            free: (0..groups).map(|_| Bitmap::full(per_group)).collect(),
            with_free: u64::MAX >> (MAX_GROUPS - groups),
            next_group: 0,
            taken: 0,
        }
    }

    /// Takes the slot that the policy prefers.
    pub(super) fn reserve(&mut self) -> Option<Slot> {
        if self.with_free == 0 {
            return None;
        }
        let group = match self.policy {
            Policy::LowestFirst => self.with_free.trailing_zeros(),
            Policy::Spread => self.next_with_free(),
        };
        self.reserve_in(group as u16)
    }

    /// Takes the lowest slot of a group.
    pub(super) fn reserve_in(&mut self, group: u16) -> Option<Slot> {
        let free = self.free.get(usize::from(group))?;
        if free.is_empty() {
            return None;
        }
        let index = free.lowest();
        let slot = Slot { group, index };
        self.take(slot, SlotState::Reserved);
        Some(slot)
    }

    /// The groups are a ring of 64, most of which may not exist: those are never in the set.
    fn next_with_free(&mut self) -> u32 {
        let ahead = self
            .with_free
            .rotate_right(self.next_group)
            .trailing_zeros();
        let group = (self.next_group + ahead) % u64::BITS;
        self.next_group = (group + 1) % u64::BITS;
        group
    }

    /// Takes a slot that is free.
    pub(super) fn take(&mut self, slot: Slot, state: SlotState) {
        let group = &mut self.free[usize::from(slot.group)];
        group.remove(slot.index);
        if group.is_empty() {
            self.with_free &= !(1 << slot.group);
        }
        self.taken += 1;
        self.set(slot, state);
    }

    /// Gives back a slot that is not free.
    pub(super) fn give_back(&mut self, slot: Slot) {
        self.set(slot, SlotState::Free);
        self.free[usize::from(slot.group)].insert(slot.index);
        self.with_free |= 1 << slot.group;
        self.taken -= 1;
    }

    /// Changes the state of a slot that is not free to another that is not.
    pub(super) fn set(&mut self, slot: Slot, state: SlotState) {
        self.states[self.position(slot)] = state;
    }

    pub(super) fn state(&self, slot: Slot) -> SlotState {
        self.states[self.position(slot)]
    }

    pub(super) fn states_of(&self, group: u16) -> &[SlotState] {
        let start = self.position(Slot { group, index: 0 });
        &self.states[start..start + usize::from(self.per_group)]
    }

    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    fn position(&self, slot: Slot) -> usize {
        usize::from(slot.group) * usize::from(self.per_group) + usize::from(slot.index)
    }
}
