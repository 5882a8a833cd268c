//! Taking disks out: of those that are there, that are not, and when the VM is gone.

use crate::common::{Answer, Event, address, disk, entry, scsi};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, ErrorKind, Transport};

#[tokio::test]
async fn o21_detach_of_a_disk_never_attached() {
    let (vm, scsi) = scsi(1, 2, &[]);
    scsi.detach(&disk(0)).await.unwrap();
    scsi.attach_identified(&disk(1)).await.unwrap();
    scsi.detach(&disk(0)).await.unwrap();
    scsi.detach(&Disk::virtual_disk("0/0")).await.unwrap();
    assert_eq!(vm.log(), [Event::Attach(address("0/0"), disk(1))]);
    assert_eq!(
        scsi.slot_map(),
        [entry("0/0", SlotUse::Occupied, Some(disk(1)))]
    );
}

#[tokio::test]
async fn a_failed_attachment_leaves_nothing() {
    let (vm, scsi) = scsi(1, 1, &[]);
    for kind in [
        ErrorKind::NotFound,
        ErrorKind::Gone,
        ErrorKind::Busy,
        ErrorKind::Other,
    ] {
        vm.next(Answer::Fail(kind));
        assert_eq!(
            scsi.attach_identified(&disk(0)).await.unwrap_err().kind(),
            kind
        );
        assert_eq!(scsi.slot_map(), []);
        scsi.detach(&disk(0)).await.unwrap();
    }
    assert_eq!(
        scsi.attach_identified(&disk(1)).await.unwrap().as_str(),
        "scsi:0/0"
    );
    assert_eq!(vm.log().len(), 5);
}

#[tokio::test]
async fn with_the_vm_gone_the_slot_is_free() {
    let (vm, scsi) = scsi(1, 1, &[]);
    scsi.attach_identified(&disk(0)).await.unwrap();
    vm.next(Answer::Fail(ErrorKind::Gone));
    assert_eq!(
        scsi.detach(&disk(0)).await.unwrap_err().kind(),
        ErrorKind::Gone
    );
    assert_eq!(scsi.slot_map(), []);
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!(vm.log().len(), 2);
}

#[tokio::test]
async fn o24_a_late_detach_never_reaches_the_next_disk_in_the_slot() {
    let (vm, scsi) = scsi(1, 1, &[]);
    scsi.attach_identified(&disk(0)).await.unwrap();
    scsi.detach(&disk(0)).await.unwrap();
    scsi.attach_identified(&disk(1)).await.unwrap();
    scsi.detach(&disk(0)).await.unwrap();
    assert_eq!(vm.present(), [address("0/0")]);
    assert_eq!(vm.log().len(), 3);
}
