use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::slots::{Policy, Slot, SlotState, Slots};
use crate::{ErrorKind, Presence};

/// Two slots, and a placement of disks in them.
struct Bus {
    slots: Slots,
    placement: Placement<(Occupied, u16)>,
}

impl Bus {
    fn new() -> Self {
        let slots = Slots::new(1, 2, Policy::LowestFirst).unwrap();
        let placement = Placement::new("port", []);
        Bus { slots, placement }
    }

    fn attach(&self, disk: &Disk) -> Result<Option<Call<(Occupied, u16)>>, BackendError> {
        self.placement.attach(disk, || {
            let slot = self.slots.reserve()?;
            let port = slot.slot().index;
            Some((slot.fill(), port))
        })
    }

    fn begin(&self, disk: &Disk) -> Call<(Occupied, u16)> {
        self.attach(disk).unwrap().expect("a port is free")
    }

    fn usage(&self) -> Vec<(u16, SlotUse)> {
        let map = self.placement.slot_map().into_iter();
        map.map(|entry| (entry.address, entry.usage)).collect()
    }

    fn is_free(&self, index: u16) -> bool {
        self.slots.state(Slot { group: 0, index }) == Ok(SlotState::Free)
    }

    /// The first disk is in doubt at port 0.
    fn only_detach_frees(&self) {
        assert_eq!(self.usage(), [(0, SlotUse::Quarantined)]);
        let error = self.attach(&disk(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        let second = self.begin(&disk(1));
        assert_eq!(second.address(), 1);
        assert!(self.attach(&disk(2)).unwrap().is_none());
        second.end(Outcome::Absent);
        for kind in [ErrorKind::Uncertain, ErrorKind::Busy, ErrorKind::Other] {
            let call = self.placement.detach(&disk(0)).unwrap().unwrap();
            let error = call
                .detached(Err(BackendError::new(kind, "no")))
                .unwrap_err();
            assert_eq!(error.kind(), kind);
            assert_eq!(self.usage(), [(0, SlotUse::Quarantined)]);
        }
        let call = self.placement.detach(&disk(0)).unwrap().unwrap();
        call.detached(Ok(())).unwrap();
        assert!(self.usage().is_empty() && self.is_free(0));
    }
}

fn disk(number: usize) -> Disk {
    Disk::virtual_disk(format!("/disks/{number}"))
}

fn answer(kind: ErrorKind) -> Result<(), BackendError> {
    Err(BackendError::new(kind, "the hypervisor refuses"))
}

#[test]
fn an_answer_decides_about_the_allocation() {
    let bus = Bus::new();
    bus.begin(&disk(0)).attached(Ok(())).unwrap();
    assert_eq!(bus.usage(), [(0, SlotUse::Occupied)]);
    for kind in [ErrorKind::Full, ErrorKind::Gone, ErrorKind::Other] {
        bus.begin(&disk(1)).attached(answer(kind)).unwrap_err();
        assert!(bus.is_free(1));
    }
    let call = bus.placement.detach(&disk(0)).unwrap().unwrap();
    call.detached(answer(ErrorKind::Gone)).unwrap_err();
    assert!(bus.usage().is_empty() && bus.slots.is_empty());
    assert!(bus.placement.detach(&disk(0)).unwrap().is_none());
}

#[test]
fn an_uncertain_attach_is_in_doubt() {
    let bus = Bus::new();
    let call = bus.begin(&disk(0));
    call.attached(answer(ErrorKind::Uncertain)).unwrap_err();
    bus.only_detach_frees();
}

#[test]
fn a_panic_during_an_attach_leaves_it_in_doubt() {
    let bus = Bus::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _call = bus.begin(&disk(0));
        panic!("the hypervisor's client is broken");
    }));
    assert!(panicked.is_err());
    bus.only_detach_frees();
}

#[test]
fn a_panic_while_allocating_records_nothing() {
    let bus = Bus::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _reserved = bus.placement.attach(&disk(0), || {
            let _slot = bus.slots.reserve();
            panic!("the allocator is broken");
        });
    }));
    assert!(panicked.is_err());
    assert!(bus.usage().is_empty() && bus.is_free(0));
    assert_eq!(bus.begin(&disk(0)).address(), 0);
}

#[tokio::test]
async fn a_dropped_attach_is_in_doubt() {
    let bus = Bus::new();
    let attach = async {
        let call = bus.begin(&disk(0));
        call.attached(std::future::pending().await)
    };
    tokio::select! {
        biased;
        _ = attach => unreachable!("the hypervisor is silent"),
        () = std::future::ready(()) => {}
    }
    bus.only_detach_frees();
}

#[tokio::test]
async fn a_dropped_or_panicked_detach_is_in_doubt_and_can_be_repeated() {
    for panics in [false, true] {
        let bus = Bus::new();
        bus.begin(&disk(0)).attached(Ok(())).unwrap();
        let placement = bus.placement.clone();
        let task = tokio::spawn(async move {
            let call = placement.detach(&disk(0)).unwrap().unwrap();
            assert!(!panics, "the hypervisor's client is broken");
            call.detached(std::future::pending().await)
        });
        tokio::task::yield_now().await;
        task.abort();
        assert_eq!(task.await.unwrap_err().is_panic(), panics);
        bus.only_detach_frees();
    }
}

#[test]
fn what_is_dropped_can_be_assumed_absent() {
    let bus = Bus::new();
    let mut call = bus.begin(&disk(0));
    call.assume(Outcome::Absent);
    drop(call);
    assert!(bus.usage().is_empty() && bus.is_free(0));
}

#[test]
fn one_call_at_a_time_for_one_disk() {
    let bus = Bus::new();
    let call = bus.begin(&disk(0));
    assert_eq!(
        bus.placement.detach(&disk(0)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert_eq!(
        bus.attach(&disk(0)).unwrap_err().kind(),
        ErrorKind::Conflict
    );
    assert_eq!(bus.usage(), [(0, SlotUse::Occupied)]);
    call.attached(Ok(())).unwrap();
    let call = bus.placement.detach(&disk(0)).unwrap().unwrap();
    let error = bus.placement.detach(&disk(0)).unwrap_err();
    assert_eq!(
        error.message(),
        "disk /disks/0 (read-write) is being attached or detached at port 0; wait for that"
    );
    call.detached(Ok(())).unwrap();
}

#[test]
fn an_address_may_become_known_during_the_call() {
    let bus = Bus::new();
    let call = bus.begin(&disk(0));
    call.update(|(_, port)| *port = 7);
    assert_eq!(call.address(), 7);
    call.attached(Ok(())).unwrap();
    let error = bus.attach(&disk(0)).unwrap_err();
    assert_eq!(
        error.message(),
        "disk /disks/0 (read-write) is or may be at port 7 already; \
         detach it first, also if its file was replaced"
    );
}

#[test]
fn a_retained_device_is_reused_by_the_same_disk_only() {
    let bus = Bus::new();
    bus.begin(&disk(0)).attached(Ok(())).unwrap();
    let call = bus.placement.detach(&disk(0)).unwrap().unwrap();
    call.end(Outcome::Retained);
    assert_eq!(
        (bus.usage(), bus.placement.retained()),
        (vec![(0, SlotUse::Retained)], 1)
    );
    assert!(bus.placement.detach(&disk(0)).unwrap().is_none());
    assert!(!bus.is_free(0));

    assert_eq!(bus.placement.reuse(&disk(1), |_| false).unwrap(), None);
    let link = disk(2);
    let found = bus.placement.reuse(&link, |(_, port)| *port == 0);
    assert_eq!(found.unwrap(), Some(0));
    assert_eq!(
        (bus.usage(), bus.placement.retained()),
        (vec![(0, SlotUse::Occupied)], 0)
    );
    let again = bus.placement.reuse(&link, |_| true).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Conflict);
    let call = bus.placement.detach(&link).unwrap().unwrap();
    call.detached(Ok(())).unwrap();
    assert!(bus.is_free(0));
}

#[test]
fn the_map_is_in_order_and_has_what_is_reserved() {
    let slots = Slots::new(1, 4, Policy::LowestFirst).unwrap();
    let placement = Placement::new("port", [9, 1]);
    for number in 0..2_u16 {
        let slot = slots.reserve().map(|slot| (slot.fill(), 5 - number));
        let call = placement.attach(&disk(number.into()), || slot);
        call.unwrap().unwrap().attached(Ok(())).unwrap();
    }
    let map = placement.slot_map();
    let lines = map
        .iter()
        .map(|entry| (entry.address, entry.usage, entry.disk.clone()));
    let expected = [
        (1, SlotUse::Pinned, None),
        (4, SlotUse::Occupied, Some(disk(1))),
        (5, SlotUse::Occupied, Some(disk(0))),
        (9, SlotUse::Pinned, None),
    ];
    assert_eq!(lines.collect::<Vec<_>>(), expected);
    assert_eq!(placement.reserved(), 2);
}

#[test]
fn an_adoption_ends_as_it_was_answered() {
    let found = |bus: &Bus, answer| {
        let call = bus.begin(&disk(0));
        drop(call.adopted(answer));
        bus.usage()
    };
    let bus = Bus::new();
    assert_eq!(found(&bus, Ok(Presence::Absent)), []);
    assert_eq!(found(&bus, Err(BackendError::gone("no VM"))), []);
    assert_eq!(
        found(&bus, Ok(Presence::Present(()))),
        [(0, SlotUse::Occupied)]
    );
    for unknown in [
        Ok(Presence::Unknown),
        Err(BackendError::other("no line")),
        Err(BackendError::uncertain("no answer")),
    ] {
        let bus = Bus::new();
        assert_eq!(found(&bus, unknown), [(0, SlotUse::Quarantined)]);
        bus.only_detach_frees();
    }
}

#[test]
fn u03_a_foreign_occupant_keeps_its_slot_until_it_has_gone() {
    let bus = Bus::new();
    bus.begin(&disk(0)).end(Outcome::Foreign);
    assert_eq!(bus.usage(), [(0, SlotUse::Foreign)]);
    // The disk goes on with another slot, and a detach of it touches only that one.
    bus.begin(&disk(0)).attached(Ok(())).unwrap();
    assert_eq!(bus.usage(), [(0, SlotUse::Foreign), (1, SlotUse::Occupied)]);
    let call = bus.placement.detach(&disk(0)).unwrap().unwrap();
    assert_eq!(call.address(), 1);
    call.detached(Err(BackendError::lost_writes("EIO")))
        .unwrap_err();
    assert_eq!(bus.usage(), [(0, SlotUse::Foreign)]);
    assert!(!bus.is_free(0) && bus.is_free(1));
    assert_eq!(bus.placement.vacate_foreign(|_| false), 0);
    assert_eq!(bus.placement.foreign(), [0]);
    assert_eq!(bus.placement.vacate_foreign(|kept| kept.1 == 0), 1);
    assert!(bus.usage().is_empty() && bus.is_free(0));
}
