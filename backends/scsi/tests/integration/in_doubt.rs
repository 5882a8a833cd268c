//! It is not known whether the disk is there: its address must not be given to another.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use blockmount::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::{Answer, Event, Scsi, Vm, address, disk, entry, scsi};
use blockmount::placement::SlotUse;
use blockmount::{ErrorKind, Transport};

/// One disk is in doubt at 0/0, the bus is full but for 0/1.
async fn only_detach_frees(vm: &Vm, scsi: &Scsi) {
    let in_doubt = entry("0/0", SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(scsi.slot_map(), std::slice::from_ref(&in_doubt));
    assert_eq!(vm.present(), [address("0/0")]);
    assert_eq!(
        scsi.attach_identified(&disk(0)).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );
    assert_eq!(
        scsi.attach_identified(&disk(1)).await.unwrap().as_str(),
        "scsi:0/1"
    );
    assert_eq!(
        scsi.attach_identified(&disk(2)).await.unwrap_err().kind(),
        ErrorKind::Full
    );

    // A detachment that fails, for whatever reason, leaves all as it is.
    for kind in [
        ErrorKind::Uncertain,
        ErrorKind::Busy,
        ErrorKind::Other,
        ErrorKind::NotFound,
    ] {
        vm.next(Answer::Fail(kind));
        assert_eq!(scsi.detach(&disk(0)).await.unwrap_err().kind(), kind);
        assert_eq!(scsi.slot_map()[0], in_doubt);
        assert_eq!(
            scsi.attach_identified(&disk(2)).await.unwrap_err().kind(),
            ErrorKind::Full
        );
    }
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!(vm.log().last(), Some(&Event::Detach(address("0/0"))));
    assert_eq!(
        scsi.attach_identified(&disk(2)).await.unwrap().as_str(),
        "scsi:0/0"
    );
}

#[tokio::test]
async fn o15_slot_in_doubt_is_quarantined() {
    let (vm, scsi) = scsi(1, 2, &[]);
    vm.next(Answer::DoneButUncertain);
    assert_eq!(
        scsi.attach_identified(&disk(0)).await.unwrap_err().kind(),
        ErrorKind::Uncertain
    );
    only_detach_frees(&vm, &scsi).await;
}

#[tokio::test]
async fn n14_a_timeout_is_followed_by_a_detach_before_the_slot_is_used() {
    let (vm, scsi) = scsi(1, 1, &[]);
    vm.next(Answer::DoneButUncertain);
    scsi.attach_identified(&disk(0)).await.unwrap_err();
    assert_eq!(
        scsi.attach_identified(&disk(1)).await.unwrap_err().kind(),
        ErrorKind::Full
    );
    scsi.detach(&disk(0)).await.unwrap();
    scsi.attach_identified(&disk(1)).await.unwrap();
    let at = address("0/0");
    let expected = [
        Event::Attach(at, disk(0)),
        Event::Detach(at),
        Event::Attach(at, disk(1)),
    ];
    assert_eq!(vm.log(), expected);
}

#[tokio::test]
async fn a_panic_of_the_attacher_quarantines() {
    let (vm, scsi) = scsi(1, 2, &[]);
    vm.next(Answer::DoneButPanics);
    let task = tokio::spawn({
        let scsi = scsi.clone();
        async move { scsi.attach_identified(&disk(0)).await }
    });
    assert!(task.await.unwrap_err().is_panic());
    only_detach_frees(&vm, &scsi).await;
}

#[tokio::test]
async fn a_dropped_attachment_quarantines() {
    let (vm, scsi) = scsi(1, 2, &[]);
    vm.next(Answer::DoneButSilent);
    let disk = disk(0);
    tokio::select! {
        biased;
        _ = scsi.attach_identified(&disk) => unreachable!("the attacher is silent"),
        () = vm.entered.notified() => {}
    }
    only_detach_frees(&vm, &scsi).await;
}

#[tokio::test]
async fn a_dropped_or_panicked_detachment_quarantines_and_can_be_repeated() {
    for answer in [Answer::DoneButSilent, Answer::DoneButPanics] {
        let (vm, scsi) = scsi(1, 1, &[]);
        scsi.attach_identified(&disk(0)).await.unwrap();
        // The attachment has left its mark.
        vm.entered.notified().await;
        vm.next(answer);
        let task = tokio::spawn({
            let scsi = scsi.clone();
            async move { scsi.detach(&disk(0)).await }
        });
        vm.entered.notified().await;
        task.abort();
        task.await.unwrap_err();
        assert_eq!(
            scsi.slot_map(),
            [entry("0/0", SlotUse::Quarantined, Some(disk(0)))]
        );
        assert_eq!(
            scsi.attach_identified(&disk(1)).await.unwrap_err().kind(),
            ErrorKind::Full
        );
        scsi.detach(&disk(0)).await.unwrap();
        assert_eq!(scsi.slot_map(), []);
    }
}

#[tokio::test]
async fn a_disk_is_not_detached_while_it_is_being_attached() {
    let (vm, scsi) = scsi(1, 1, &[]);
    vm.next(Answer::Wait);
    let attach = tokio::spawn({
        let scsi: Arc<Scsi> = scsi.clone();
        async move { scsi.attach_identified(&disk(0)).await }
    });
    vm.entered.notified().await;
    assert_eq!(
        scsi.detach(&disk(0)).await.unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert_eq!(
        scsi.slot_map(),
        [entry("0/0", SlotUse::Occupied, Some(disk(0)))]
    );
    vm.proceed.notify_one();
    attach.await.unwrap().unwrap();
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!(vm.present(), []);
}
