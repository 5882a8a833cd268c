//! Taking disks out: of those that are there, that are not, in any order, and when the VM is gone.

use crate::common::{
    Answer, Event, GIB, MIB, MODES, Question, Vm, address, device, disk, entry, occupied,
    two_addresses, vpmem,
};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, ErrorKind, Transport};
use blockmount_vpmem::{InvalidReserved, Mode, PAGE, VpmemTransport};

#[tokio::test]
async fn v06_a_late_detach_never_reaches_the_next_disk_in_the_place() {
    for mode in MODES {
        let (vm, vpmem, [at, _]) = two_addresses(mode);
        vpmem.attach_identified(&disk(0)).await.unwrap();
        vpmem.detach(&disk(0)).await.unwrap();
        vpmem.attach_identified(&disk(1)).await.unwrap();
        vpmem.detach(&disk(0)).await.unwrap();
        assert_eq!(vpmem.slot_map(), [occupied(at, 1)]);
        assert_eq!((vm.present(), vm.log().len()), (vec![address(at)], 3));
    }
}

#[tokio::test]
async fn v07_a_step_that_fails_is_the_answer_and_the_last_step() {
    let kinds = [
        ErrorKind::NotFound,
        ErrorKind::Gone,
        ErrorKind::Busy,
        ErrorKind::Unsuitable,
        ErrorKind::Other,
    ];
    for mode in MODES {
        let (vm, vpmem, _) = two_addresses(mode);
        for kind in kinds {
            for question in [Question::Identify, Question::Size] {
                vm.refuse(question, kind);
                let error = vpmem.attach_identified(&disk(0)).await.unwrap_err();
                let said = format!("{question:?}, as told");
                assert_eq!((error.kind(), error.message()), (kind, &*said));
                assert_eq!((vm.log(), vpmem.slot_map()), (vec![], vec![]));
            }
        }
        for (calls, kind) in (1..).zip(kinds) {
            vm.next(Answer::Fail(kind));
            let error = vpmem.attach_identified(&disk(0)).await.unwrap_err();
            assert_eq!((error.kind(), vm.log().len()), (kind, calls));
            assert_eq!(vpmem.slot_map(), []);
            vpmem.detach(&disk(0)).await.unwrap();
        }
        vpmem.attach_identified(&disk(0)).await.unwrap();
    }
}

#[tokio::test]
async fn detaching_a_disk_that_was_never_attached_changes_nothing() {
    for mode in MODES {
        let (vm, vpmem, [at, _]) = two_addresses(mode);
        vpmem.detach(&disk(0)).await.unwrap();
        vpmem.attach_identified(&disk(1)).await.unwrap();
        vpmem.detach(&disk(0)).await.unwrap();
        vpmem
            .detach(&Disk::virtual_disk(at).read_only())
            .await
            .unwrap();
        assert_eq!(vm.log(), [Event::Attach(address(at), disk(1))]);
        assert_eq!(vpmem.slot_map(), [occupied(at, 1)]);
    }
}

#[tokio::test]
async fn with_the_vm_gone_the_place_is_free() {
    for mode in MODES {
        let (vm, vpmem, _) = two_addresses(mode);
        vpmem.attach_identified(&disk(0)).await.unwrap();
        vm.next(Answer::Fail(ErrorKind::Gone));
        let error = vpmem.detach(&disk(0)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
        assert_eq!(vpmem.slot_map(), []);
        vpmem.detach(&disk(0)).await.unwrap();
        assert_eq!(vm.log().len(), 2);
    }
}

/// All orders of four things.
fn orders() -> Vec<[usize; 4]> {
    let mut orders = Vec::new();
    for code in 0..256_usize {
        let order = [code >> 6, (code >> 4) & 3, (code >> 2) & 3, code & 3];
        if (0..4).all(|thing| order.contains(&thing)) {
            orders.push(order);
        }
    }
    orders
}

#[tokio::test]
async fn four_disks_leave_in_every_order() {
    let orders = orders();
    assert_eq!(orders.len(), 24);
    for mode in MODES {
        for order in &orders {
            let (vm, vpmem) = vpmem(mode, 4, 16 * MIB, &[]);
            // One of them at offset 0, and of different sizes.
            for (number, pages) in [300, 1, 700, 20].into_iter().enumerate() {
                vm.set_size(&disk(number), pages * PAGE - 512);
            }
            for round in 0..2 {
                let mut locators = Vec::new();
                for number in 0..4 {
                    locators.push(vpmem.attach_identified(&disk(number)).await.unwrap());
                }
                for (gone, leaving) in order.iter().enumerate() {
                    vpmem.detach(&disk(*leaving)).await.unwrap();
                    for (number, locator) in locators.iter().enumerate() {
                        let there = !order[..=gone].contains(&number);
                        let found = vm.disk_at(locator.as_str());
                        assert_eq!(found, there.then(|| disk(number)), "{order:?} {round}");
                    }
                    assert_eq!(vpmem.slot_map().len(), 3 - gone);
                }
            }
        }
    }
}

#[tokio::test]
async fn reserved_devices_are_never_touched() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 4, MIB, &[0, 2]);
        for number in 0..2 {
            vpmem.attach_identified(&disk(number)).await.unwrap();
        }
        let error = vpmem.attach_identified(&disk(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full);
        for name in ["", "0", "2", "/dev/pmem0", "vpmem:0", "0@0+1048576"] {
            vpmem
                .detach(&Disk::virtual_disk(name).read_only())
                .await
                .unwrap();
        }
        for number in [0, 1, 0, 1] {
            vpmem.detach(&disk(number)).await.unwrap();
        }
        let touched = |event: &Event| {
            let (Event::Attach(at, _) | Event::Detach(at)) = event;
            [device(0), device(2)].contains(&at.device)
        };
        assert!(!vm.log().iter().any(touched));
        assert_eq!(vm.log().len(), 4);
        let pinned = |text| entry(text, SlotUse::Pinned, None);
        assert_eq!(vpmem.slot_map(), [pinned("0"), pinned("2")]);
    }
}

#[test]
fn reserved_devices_are_checked_when_the_transport_is_made() {
    let new = |reserved: &[u64]| {
        let reserved: Vec<_> = reserved.iter().map(|number| device(*number)).collect();
        let geometry = blockmount_vpmem::Geometry::new(4, GIB).unwrap();
        VpmemTransport::new(Vm::default(), geometry, Mode::Packed, &reserved).map(drop)
    };
    assert_eq!(new(&[3, 0]), Ok(()));
    assert_eq!(new(&[0, 4]), Err(InvalidReserved::OutOfRange(device(4), 4)));
    assert_eq!(new(&[0, 1, 0]), Err(InvalidReserved::Twice(device(0))));
    assert_eq!(
        new(&[127]).unwrap_err().to_string(),
        "VPMEM device 127 cannot be reserved: the VM has 4 devices, from 0"
    );
}
