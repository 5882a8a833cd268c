use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;

fn slot(group: u16, index: u16) -> Slot {
    Slot { group, index }
}

fn slots(groups: u16, per_group: u16, policy: Policy) -> Slots {
    Slots::new(groups, per_group, policy).unwrap()
}

#[test]
fn size_is_validated() {
    for (groups, per_group) in [(0, 1), (1, 0), (65, 1), (1, 16_385), (u16::MAX, u16::MAX)] {
        let error = Slots::new(groups, per_group, Policy::Spread).unwrap_err();
        assert_eq!(error, SlotError::Size { groups, per_group });
    }
    for (groups, per_group) in [(1, 1), (64, 1), (1, 16_384), (64, 16_384)] {
        let capacity = usize::from(groups) * usize::from(per_group);
        assert_eq!(
            slots(groups, per_group, Policy::Spread).capacity(),
            capacity
        );
    }
}

#[test]
fn lowest_first_gives_the_lowest_after_frees_in_any_order() {
    let slots = slots(2, 70, Policy::LowestFirst);
    let mut held: Vec<_> = (0..140).map(|_| slots.reserve()).collect();
    assert!(slots.reserve().is_none());
    for freed in [130, 3, 68, 0, 71, 64] {
        held[freed] = None;
    }
    let expected = [
        slot(0, 0),
        slot(0, 3),
        slot(0, 64),
        slot(0, 68),
        slot(1, 1),
        slot(1, 60),
    ];
    let again: Vec<_> = (0..6).map(|_| slots.reserve().unwrap()).collect();
    assert!(again.iter().map(Reservation::slot).eq(expected));
    assert!(slots.reserve().is_none());
}

#[test]
fn spread_fills_groups_evenly_and_skips_full_ones() {
    let slots = slots(4, 64, Policy::Spread);
    let mut held = Vec::new();
    for round in 0..64 {
        let groups: HashSet<_> = (0..4)
            .map(|_| {
                let reservation = slots.reserve().unwrap();
                assert_eq!(reservation.slot().index, round);
                let group = reservation.slot().group;
                held.push(reservation);
                group
            })
            .collect();
        assert_eq!(groups.len(), 4);
    }
    assert!(slots.reserve().is_none());
    held.retain(|reservation| reservation.slot().group % 2 == 1);
    let groups: Vec<_> = (0..4)
        .map(|_| {
            let reservation = slots.reserve().unwrap();
            let group = reservation.slot().group;
            held.push(reservation);
            group
        })
        .collect();
    assert_eq!(groups, [0, 2, 0, 2]);
}

#[test]
fn reserves_the_lowest_of_one_group() {
    for policy in [Policy::LowestFirst, Policy::Spread] {
        let slots = slots(3, 2, policy);
        let first = slots.reserve_in(1).unwrap();
        let second = slots.reserve_in(1).unwrap();
        assert_eq!((first.slot(), second.slot()), (slot(1, 0), slot(1, 1)));
        assert!(slots.reserve_in(1).is_none(), "the group is full");
        assert!(slots.reserve_in(3).is_none(), "there is no such group");
        drop(first);
        assert_eq!(
            slots.reserve_in(1).map(|again| again.slot()),
            Some(slot(1, 0))
        );
        assert_eq!(slots.len(), 1, "the other groups are as they were");
    }
}

#[test]
fn the_largest_table_hands_out_every_slot_once() {
    for policy in [Policy::LowestFirst, Policy::Spread] {
        let slots = slots(MAX_GROUPS, MAX_PER_GROUP, policy);
        let held: Vec<_> = std::iter::from_fn(|| slots.reserve()).collect();
        assert_eq!(held.len(), 1_048_576);
        assert_eq!(slots.len(), slots.capacity());
        let distinct: HashSet<_> = held.iter().map(Reservation::slot).collect();
        assert_eq!(distinct.len(), held.len());
        drop(held);
        assert!(slots.is_empty() && slots.taken().is_empty());
    }
}

#[test]
fn a_dropped_reservation_is_free_and_a_lost_occupant_is_not() {
    let slots = slots(1, 2, Policy::LowestFirst);
    let reservation = slots.reserve().unwrap();
    assert_eq!(slots.state(slot(0, 0)), Ok(SlotState::Reserved));
    drop(reservation);
    assert_eq!(slots.state(slot(0, 0)), Ok(SlotState::Free));

    let occupied = slots.reserve().unwrap().fill();
    assert_eq!(slots.state(slot(0, 0)), Ok(SlotState::Occupied));
    drop(occupied);
    assert_eq!(slots.state(slot(0, 0)), Ok(SlotState::Quarantined));
    assert_eq!(slots.reserve().unwrap().slot(), slot(0, 1));
    let taken = slots.reserve_at(slot(0, 0)).unwrap_err();
    assert_eq!(taken.to_string(), "slot 0/0 is quarantined, not free");
}

#[test]
fn a_forgotten_occupant_keeps_its_slot() {
    let slots = slots(1, 1, Policy::LowestFirst);
    std::mem::forget(slots.reserve().unwrap().fill());
    assert!(slots.reserve().is_none());
}

#[test]
fn a_quarantined_slot_is_free_only_once_vacated() {
    let slots = slots(1, 1, Policy::Spread);
    let mut occupied = slots.reserve().unwrap().fill();
    occupied.quarantine();
    assert_eq!(slots.state(occupied.slot()), Ok(SlotState::Quarantined));
    assert!(slots.reserve().is_none());
    occupied.vacate();
    assert_eq!(slots.len(), 0);
    assert_eq!(slots.reserve().unwrap().slot(), slot(0, 0));
}

#[test]
fn pinned_slots_are_never_handed_out() {
    let slots = slots(2, 2, Policy::Spread);
    slots.pin(slot(0, 0)).unwrap();
    let held = slots.reserve_at(slot(1, 1)).unwrap();
    let again = slots.pin(slot(0, 0)).unwrap_err();
    assert_eq!(
        again,
        SlotError::Taken {
            slot: slot(0, 0),
            state: SlotState::Pinned
        }
    );
    let taken = slots.pin(slot(1, 1)).unwrap_err();
    assert_eq!(
        taken,
        SlotError::Taken {
            slot: slot(1, 1),
            state: SlotState::Reserved
        }
    );
    for out in [slot(2, 0), slot(0, 2), slot(u16::MAX, u16::MAX)] {
        let expected = SlotError::OutOfRange {
            slot: out,
            groups: 2,
            per_group: 2,
        };
        assert_eq!(slots.pin(out), Err(expected.clone()));
        assert_eq!(slots.state(out), Err(expected.clone()));
        assert_eq!(slots.reserve_at(out).err(), Some(expected));
    }
    let rest: Vec<_> = std::iter::from_fn(|| slots.reserve()).collect();
    let places: HashSet<_> = rest.iter().map(Reservation::slot).collect();
    assert_eq!(places, HashSet::from([slot(0, 1), slot(1, 0)]));
    drop((held, rest));
    let pinned = vec![(slot(0, 0), SlotState::Pinned)];
    assert_eq!(slots.taken(), pinned);
    assert_eq!(slots.state(slot(0, 0)).unwrap().to_string(), "pinned");
}

#[test]
fn threads_never_have_the_same_slot() {
    for policy in [Policy::LowestFirst, Policy::Spread] {
        let slots = slots(2, 3, policy);
        let in_use: [AtomicBool; 6] = Default::default();
        let start = Barrier::new(2);
        let work = || {
            start.wait();
            for round in 0..50_000 {
                // Two at a time from two threads: the table is often nearly full, never over-full.
                let held = [slots.reserve().unwrap(), slots.reserve().unwrap()];
                let places = held.each_ref().map(|held| held.slot());
                let places = places.map(|slot| usize::from(slot.group * 3 + slot.index));
                assert!(
                    places
                        .iter()
                        .all(|place| !in_use[*place].swap(true, Ordering::AcqRel))
                );
                places
                    .iter()
                    .for_each(|place| in_use[*place].store(false, Ordering::Release));
                if round % 2 == 0 {
                    held.into_iter()
                        .for_each(|reservation| reservation.fill().vacate());
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(work);
            scope.spawn(work);
        });
        assert!(slots.is_empty());
    }
}

#[derive(Debug, Clone)]
enum Step {
    Reserve,
    ReserveAt(usize),
    Pin(usize),
    Drop(usize),
    FillAndVacate(usize),
    FillAndLose(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Reserve),
        1 => any::<usize>().prop_map(Step::ReserveAt),
        1 => any::<usize>().prop_map(Step::Pin),
        3 => any::<usize>().prop_map(Step::Drop),
        1 => any::<usize>().prop_map(Step::FillAndVacate),
        1 => any::<usize>().prop_map(Step::FillAndLose),
    ]
}

/// The same promises, kept by scanning.
struct Model {
    taken: Vec<bool>,
    per_group: usize,
    policy: Policy,
    next_group: usize,
}

impl Model {
    fn reserve(&mut self) -> Option<usize> {
        let groups = self.taken.len() / self.per_group;
        let first = if self.policy == Policy::Spread {
            self.next_group
        } else {
            0
        };
        let place = (first..first + groups).find_map(|group| {
            let start = group % groups * self.per_group;
            (start..start + self.per_group).find(|place| !self.taken[*place])
        })?;
        self.next_group = (place / self.per_group + 1) % groups;
        self.taken[place] = true;
        Some(place)
    }
}

proptest! {
    #[test]
    fn behaves_like_a_scan(
        (groups, per_group) in prop_oneof![
            (1_u16..=4, 1_u16..=70),
            (60_u16..=64, 1_u16..=3),
            (1_u16..=2, 4_090_u16..=4_100),
        ],
        spread: bool,
        prefilled in 0.0..=1.0,
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let policy = if spread { Policy::Spread } else { Policy::LowestFirst };
        let slots = slots(groups, per_group, policy);
        let capacity = slots.capacity();
        let mut model =
            Model { taken: vec![false; capacity], per_group: per_group.into(), policy, next_group: 0 };
        let place = |slot: Slot| usize::from(slot.group) * usize::from(per_group) + usize::from(slot.index);
        let slot_at = |place: usize| slot((place / usize::from(per_group)) as u16, (place % usize::from(per_group)) as u16);
        let mut held = Vec::new();
        let prefill = (prefilled * capacity as f64) as usize;
        for step in std::iter::repeat_n(Step::Reserve, prefill).chain(steps) {
            let pick = |from: usize, held: &mut Vec<Reservation>| {
                (!held.is_empty()).then(|| held.swap_remove(from % held.len()))
            };
            match step {
                Step::Reserve => {
                    let got = slots.reserve();
                    prop_assert_eq!(got.as_ref().map(|held| place(held.slot())), model.reserve());
                    held.extend(got);
                }
                Step::ReserveAt(at) => {
                    let got = slots.reserve_at(slot_at(at % capacity));
                    prop_assert_eq!(got.is_err(), model.taken[at % capacity]);
                    model.taken[at % capacity] = true;
                    held.extend(got);
                }
                Step::Pin(at) => {
                    let got = slots.pin(slot_at(at % capacity));
                    prop_assert_eq!(got.is_err(), model.taken[at % capacity]);
                    model.taken[at % capacity] = true;
                }
                Step::Drop(from) => {
                    let freed = pick(from, &mut held).map(|held| place(held.slot()));
                    freed.into_iter().for_each(|place| model.taken[place] = false);
                }
                Step::FillAndVacate(from) => {
                    if let Some(reservation) = pick(from, &mut held) {
                        model.taken[place(reservation.slot())] = false;
                        reservation.fill().vacate();
                    }
                }
                Step::FillAndLose(from) => drop(pick(from, &mut held).map(Reservation::fill)),
            }
            prop_assert_eq!(slots.len(), model.taken.iter().filter(|taken| **taken).count());
        }
        let taken = slots.taken().into_iter().map(|(slot, _)| place(slot));
        prop_assert!(taken.eq((0..capacity).filter(|place| model.taken[*place])));
    }
}
