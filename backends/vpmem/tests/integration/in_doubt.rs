//! It is not known whether the disk is there: its address must not be given to another.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::{
    Answer, Event, MODES, Vm, Vpmem, address, disk, entry, occupied, two_addresses,
};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{ErrorKind, Transport};

/// One disk is in doubt at the first address, and only the second is free.
async fn only_detach_frees(vm: &Vm, vpmem: &Vpmem, [at, second]: [&str; 2]) {
    let in_doubt = entry(at, SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(vpmem.slot_map(), std::slice::from_ref(&in_doubt));
    assert_eq!(vm.present(), [address(at)]);
    let kind_of = async |number| {
        vpmem
            .attach_identified(&disk(number))
            .await
            .unwrap_err()
            .kind()
    };
    assert_eq!(kind_of(0).await, ErrorKind::Conflict);
    let locator = vpmem.attach_identified(&disk(1)).await.unwrap();
    assert_eq!(locator.as_str(), format!("vpmem:{second}"));
    assert_eq!(kind_of(2).await, ErrorKind::Full);

    // A detachment that fails, for whatever reason, leaves all as it is.
    for kind in [
        ErrorKind::Uncertain,
        ErrorKind::Busy,
        ErrorKind::Other,
        ErrorKind::NotFound,
    ] {
        vm.next(Answer::Fail(kind));
        assert_eq!(vpmem.detach(&disk(0)).await.unwrap_err().kind(), kind);
        assert_eq!(vpmem.slot_map()[0], in_doubt);
        assert_eq!(kind_of(2).await, ErrorKind::Full);
    }
    vpmem.detach(&disk(0)).await.unwrap();
    assert_eq!(vm.log().last(), Some(&Event::Detach(address(at))));
    let locator = vpmem.attach_identified(&disk(2)).await.unwrap();
    assert_eq!(locator.as_str(), format!("vpmem:{at}"));
}

#[tokio::test]
async fn an_address_in_doubt_is_quarantined() {
    for mode in MODES {
        let (vm, vpmem, addresses) = two_addresses(mode);
        vm.next(Answer::DoneButUncertain);
        let error = vpmem.attach_identified(&disk(0)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain);
        only_detach_frees(&vm, &vpmem, addresses).await;
    }
}

#[tokio::test]
async fn a_panic_of_the_attacher_quarantines() {
    for mode in MODES {
        let (vm, vpmem, addresses) = two_addresses(mode);
        vm.next(Answer::DoneButPanics);
        let task = tokio::spawn({
            let vpmem = vpmem.clone();
            async move { vpmem.attach_identified(&disk(0)).await }
        });
        assert!(task.await.unwrap_err().is_panic());
        only_detach_frees(&vm, &vpmem, addresses).await;
    }
}

#[tokio::test]
async fn a_dropped_attachment_quarantines() {
    for mode in MODES {
        let (vm, vpmem, addresses) = two_addresses(mode);
        vm.next(Answer::DoneButSilent);
        let disk = disk(0);
        tokio::select! {
            biased;
            _ = vpmem.attach_identified(&disk) => unreachable!("the attacher is silent"),
            () = vm.entered.notified() => {}
        }
        only_detach_frees(&vm, &vpmem, addresses).await;
    }
}

#[tokio::test]
async fn a_dropped_or_panicked_detachment_quarantines_and_can_be_repeated() {
    for mode in MODES {
        for answer in [Answer::DoneButSilent, Answer::DoneButPanics] {
            let (vm, vpmem, [at, _]) = two_addresses(mode);
            vpmem.attach_identified(&disk(0)).await.unwrap();
            // The attachment has left its mark.
            vm.entered.notified().await;
            vm.next(answer);
            let task = tokio::spawn({
                let vpmem = vpmem.clone();
                async move { vpmem.detach(&disk(0)).await }
            });
            vm.entered.notified().await;
            task.abort();
            task.await.unwrap_err();
            let in_doubt = entry(at, SlotUse::Quarantined, Some(disk(0)));
            assert_eq!(vpmem.slot_map(), [in_doubt]);
            vpmem.attach_identified(&disk(1)).await.unwrap();
            let error = vpmem.attach_identified(&disk(2)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Full);
            vpmem.detach(&disk(0)).await.unwrap();
            vpmem.detach(&disk(1)).await.unwrap();
            assert_eq!(vpmem.slot_map(), []);
        }
    }
}

#[tokio::test]
async fn a_disk_is_not_detached_while_it_is_being_attached() {
    for mode in MODES {
        let (vm, vpmem, [at, _]) = two_addresses(mode);
        vm.next(Answer::Wait);
        let attach = tokio::spawn({
            let vpmem = vpmem.clone();
            async move { vpmem.attach_identified(&disk(0)).await }
        });
        vm.entered.notified().await;
        let error = vpmem.detach(&disk(0)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(vpmem.slot_map(), [occupied(at, 0)]);
        vm.proceed.notify_one();
        attach.await.unwrap().unwrap();
        vpmem.detach(&disk(0)).await.unwrap();
        assert_eq!(vm.present(), []);
    }
}
