//! Devices that cannot be unplugged: their disks stay on them, and are offered again to nobody else.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use blockmount::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::guest::Guest;
use crate::common::{Answer, Event, GIB, MIB, Vm, Vpmem, address, disk, entry, occupied, vpmem};
use blockmount::placement::SlotUse;
use blockmount::{Disk, ErrorKind, MountOptions, MountRequest, Transport};
use blockmount_vpmem::Mode;

fn fixed(devices: u16) -> (Arc<Vm>, Arc<Vpmem>) {
    let (vm, vpmem) = vpmem(Mode::WholeDevices, devices, GIB, &[]);
    vm.fix_devices();
    (vm, vpmem)
}

fn retained(text: &str, number: usize) -> blockmount_vpmem::SlotEntry {
    entry(text, SlotUse::Retained, Some(disk(number)))
}

#[tokio::test]
async fn a_device_that_cannot_be_unplugged_is_offered_to_the_same_disk() {
    let (vm, vpmem) = fixed(2);
    for round in 0..3 {
        let locator = vpmem.attach_identified(&disk(0)).await.unwrap();
        assert_eq!(locator.as_str(), "vpmem:0");
        assert_eq!(
            (vpmem.slot_map(), vpmem.retained()),
            (vec![occupied("0", 0)], 0)
        );
        vpmem.detach(&disk(0)).await.unwrap();
        assert_eq!(
            (vpmem.slot_map(), vpmem.retained()),
            (vec![retained("0", 0)], 1)
        );
        vpmem.detach(&disk(0)).await.unwrap();
        // It was attached once; each round asks whether it can be taken out.
        assert_eq!(vm.log().len(), 2 + round);
    }
    let attached = |event: &&Event| matches!(event, Event::Attach(..));
    assert_eq!(vm.log().iter().filter(attached).count(), 1);
}

#[tokio::test]
async fn a_retained_device_is_never_given_to_another_disk() {
    let (vm, vpmem) = fixed(2);
    for number in 0..2 {
        vpmem.attach_identified(&disk(number)).await.unwrap();
        vpmem.detach(&disk(number)).await.unwrap();
    }
    let error = vpmem.attach_identified(&disk(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(
        error.message().contains("0 reserved, 2 retained"),
        "{error}"
    );
    assert_eq!(
        vpmem.attach_identified(&disk(1)).await.unwrap().as_str(),
        "vpmem:1"
    );
    assert_eq!(vpmem.slot_map(), [retained("0", 0), occupied("1", 1)]);
    let addresses = [address("0"), address("1")];
    assert_eq!(vm.present(), addresses);
}

#[tokio::test]
async fn the_same_disk_is_the_same_file_and_not_the_same_name() {
    let (vm, vpmem) = fixed(3);
    vpmem.attach_identified(&disk(0)).await.unwrap();
    vpmem.detach(&disk(0)).await.unwrap();
    let link = Disk::virtual_disk("/links/0.vhd").read_only();
    vm.link(&link, &disk(0));
    assert_eq!(
        vpmem.attach_identified(&link).await.unwrap().as_str(),
        "vpmem:0"
    );
    vpmem.detach(&link).await.unwrap();
    // A new file under the old name would read as the old one.
    vm.replace(&disk(0));
    assert_eq!(
        vpmem.attach_identified(&disk(0)).await.unwrap().as_str(),
        "vpmem:1"
    );
    vpmem.detach(&disk(0)).await.unwrap();
    // And so would what was added to it.
    vm.set_size(&disk(0), 2 * MIB);
    assert_eq!(
        vpmem.attach_identified(&disk(0)).await.unwrap().as_str(),
        "vpmem:2"
    );
    assert_eq!(vpmem.retained(), 2);
}

#[tokio::test]
async fn an_attachment_in_doubt_that_turns_out_fixed_is_retained() {
    let (vm, vpmem) = fixed(1);
    vm.next(Answer::DoneButUncertain);
    vpmem.attach_identified(&disk(0)).await.unwrap_err();
    let in_doubt = entry("0", SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(vpmem.slot_map(), [in_doubt]);
    vpmem.detach(&disk(0)).await.unwrap();
    assert_eq!(vpmem.slot_map(), [retained("0", 0)]);
    assert_eq!(
        vpmem.attach_identified(&disk(0)).await.unwrap().as_str(),
        "vpmem:0"
    );
    assert_eq!(vm.log().len(), 2);
}

#[tokio::test]
async fn a_retained_device_is_free_when_the_vm_is_gone() {
    let (vm, vpmem) = fixed(1);
    vpmem.attach_identified(&disk(0)).await.unwrap();
    vpmem.detach(&disk(0)).await.unwrap();
    vpmem.attach_identified(&disk(0)).await.unwrap();
    vm.next(Answer::Fail(ErrorKind::Gone));
    vpmem.detach(&disk(0)).await.unwrap_err();
    assert_eq!((vpmem.slot_map(), vpmem.retained()), (vec![], 0));
}

#[tokio::test]
async fn a_range_that_cannot_be_unmapped_is_an_error() {
    let (vm, vpmem) = vpmem(Mode::Packed, 1, GIB, &[]);
    vpmem.attach_identified(&disk(0)).await.unwrap();
    vm.next(Answer::Fail(ErrorKind::Unsuitable));
    let error = vpmem.detach(&disk(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable);
    let in_doubt = entry("0@0+1048576", SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(vpmem.slot_map(), [in_doubt]);
}

#[tokio::test]
async fn for_a_manager_the_disk_is_detached() {
    let (vm, vpmem) = fixed(2);
    let guest = Guest::default();
    let (manager, log) = guest.manager(vec![vpmem.clone()]);
    let request = MountRequest::new(MountOptions::read_only());
    for _ in 0..3 {
        let mount = manager.add(&disk(0), &request).await.unwrap();
        mount.release().await.unwrap();
        let one_round = [
            "attach vpmem:0",
            "mount vpmem:0",
            "unmount",
            "unplug vpmem:0",
            "detach",
        ];
        assert_eq!(log.take(), one_round);
    }
    assert!(manager.drain().await.is_clean());
    assert_eq!((vpmem.retained(), vm.present().len()), (1, 1));
}
