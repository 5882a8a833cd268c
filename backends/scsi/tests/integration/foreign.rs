//! What the VM has and the transport did not put there: an earlier process, or somebody else.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::{Answer, Event, Scsi, Vm, disk, entry, scsi};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};

fn id(disk: &Disk) -> DiskId {
    DiskId::name(&disk.source().to_string_lossy())
}

async fn adopt(scsi: &Scsi, number: usize, at: Option<&str>) -> Presence<String> {
    let locator = at.map(|at| at.parse::<DeviceLocator>().unwrap());
    let disk = disk(number);
    let found = scsi.adopt(&disk, &id(&disk), locator.as_ref()).await;
    found.unwrap().map(|locator| locator.to_string())
}

fn detached(vm: &Vm) -> usize {
    let log = vm.log();
    log.iter()
        .filter(|event| matches!(event, Event::Detach(_)))
        .count()
}

#[tokio::test]
async fn u03_what_an_earlier_process_has_attached_is_left_alone() {
    for is_shown in [true, false] {
        let (vm, scsi) = scsi(1, 3, &[]);
        vm.put_foreign("0/0", Some(&disk(7)));
        vm.put_foreign("0/2", None);
        if !is_shown {
            vm.show_nothing();
        }
        let locator = scsi.attach_identified(&disk(1)).await.unwrap();
        assert_eq!(locator.as_str(), "scsi:0/1");
        let error = scsi.attach_identified(&disk(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        let foreign = |at| entry(at, SlotUse::Foreign, None);
        let ours = entry("0/1", SlotUse::Occupied, Some(disk(1)));
        assert_eq!(scsi.slot_map(), [foreign("0/0"), ours, foreign("0/2")]);
        scsi.detach(&disk(1)).await.unwrap();
        scsi.detach(&disk(2)).await.unwrap();
        assert_eq!((vm.foreign(), detached(&vm)), (2, 1));
    }
}

#[tokio::test]
async fn u03_the_address_of_a_foreign_disk_is_used_once_it_has_gone() {
    let (vm, scsi) = scsi(1, 1, &[]);
    vm.put_foreign("0/0", Some(&disk(7)));
    let error = scsi.attach_identified(&disk(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert!(error.message().contains("1 foreign"), "{error}");
    vm.take_foreign("0/0");
    scsi.attach_identified(&disk(0)).await.unwrap();
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!(scsi.slot_map(), []);
}

/// What the hypervisor took in between the two questions is noticed when it refuses.
#[tokio::test]
async fn u03_what_comes_later_is_foreign_and_a_replaced_disk_is_not() {
    let (vm, scsi) = scsi(1, 3, &[]);
    scsi.attach_identified(&disk(0)).await.unwrap();
    vm.put_foreign("0/1", None);
    let locator = scsi.attach_identified(&disk(1)).await.unwrap();
    assert_eq!(locator.as_str(), "scsi:0/2");
    scsi.detach(&disk(1)).await.unwrap();
    vm.next(Answer::Fail(ErrorKind::Conflict));
    let error = scsi.attach_identified(&disk(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let uses: Vec<SlotUse> = scsi.slot_map().iter().map(|entry| entry.usage).collect();
    assert_eq!(uses, [SlotUse::Occupied, SlotUse::Foreign]);
}

#[tokio::test]
async fn a_disk_of_an_earlier_process_is_adopted() {
    let (vm, first) = scsi(2, 2, &[]);
    for number in 0..2 {
        first.attach_identified(&disk(number)).await.unwrap();
    }
    let geometry = first.geometry();
    drop(first);
    let second = blockmount_scsi::ScsiTransport::new(vm.clone(), geometry, &[]).unwrap();
    let there = |at: &str| Presence::Present(at.to_owned());
    assert_eq!(adopt(&second, 0, Some("scsi:0/0")).await, there("scsi:0/0"));
    // Its attach was cut off before the answer was written down.
    assert_eq!(adopt(&second, 1, None).await, there("scsi:1/0"));
    assert_eq!(adopt(&second, 2, None).await, Presence::Absent);
    assert_eq!(adopt(&second, 3, Some("scsi:0/1")).await, Presence::Absent);
    assert_eq!(adopt(&second, 4, Some("vpmem:1")).await, Presence::Absent);
    assert_eq!(second.slot_map().len(), 2);
    second.attach_identified(&disk(3)).await.unwrap();
    for number in [0, 1, 3] {
        second.detach(&disk(number)).await.unwrap();
    }
    assert_eq!((vm.present(), second.slot_map()), (vec![], vec![]));
}

#[tokio::test]
async fn another_disk_at_a_remembered_address_is_foreign_and_one_without_a_name_in_doubt() {
    let (vm, scsi) = scsi(1, 4, &[]);
    vm.put_foreign("0/0", Some(&disk(7)));
    vm.put_foreign("0/1", None);
    assert_eq!(adopt(&scsi, 0, Some("scsi:0/0")).await, Presence::Absent);
    assert_eq!(adopt(&scsi, 1, Some("scsi:0/1")).await, Presence::Unknown);
    // It may be the one without a name.
    assert_eq!(adopt(&scsi, 2, None).await, Presence::Unknown);
    let expected = [
        entry("0/0", SlotUse::Foreign, None),
        entry("0/1", SlotUse::Quarantined, Some(disk(1))),
    ];
    assert_eq!(scsi.slot_map(), expected);
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!((vm.foreign(), detached(&vm)), (2, 0));
    // The journal says that the disk was put there, so a detach of it decides.
    scsi.detach(&disk(1)).await.unwrap();
    assert_eq!(vm.foreign(), 1);
}

#[tokio::test]
async fn without_a_list_what_is_remembered_is_in_doubt_and_without_a_vm_absent() {
    let (vm, scsi) = scsi(1, 4, &[]);
    vm.show_nothing();
    assert_eq!(adopt(&scsi, 0, Some("scsi:0/3")).await, Presence::Unknown);
    assert_eq!(adopt(&scsi, 1, None).await, Presence::Unknown);
    let in_doubt = entry("0/3", SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(scsi.slot_map(), [in_doubt]);
}
