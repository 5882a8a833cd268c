//! What the VM has and the transport did not put there: an earlier process, or somebody else.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use crate::common::{MIB, MODES, Vpmem, disk, entry, two_addresses, vpmem};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{DeviceLocator, ErrorKind, Presence, Transport};
use blockmount_vpmem::{Mode, VpmemTransport};

async fn adopt(
    vpmem: &Vpmem,
    number: usize,
    at: Option<&DeviceLocator>,
) -> Presence<DeviceLocator> {
    let id = vpmem.identify(&disk(number)).await.unwrap();
    vpmem.adopt(&disk(number), &id, at).await.unwrap()
}

#[tokio::test]
async fn u03_what_an_earlier_process_has_attached_is_left_alone() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 2, MIB, &[]);
        vm.put_foreign("0");
        let locator = vpmem.attach_identified(&disk(1)).await.unwrap();
        assert!(locator.as_str().starts_with("vpmem:1"), "{locator}");
        let error = vpmem.attach_identified(&disk(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        assert_eq!(vpmem.slot_map()[0], entry("0", SlotUse::Foreign, None));
        vm.take_foreign("0");
        let locator = vpmem.attach_identified(&disk(2)).await.unwrap();
        assert!(locator.as_str().starts_with("vpmem:0"), "{locator}");
    }
}

#[tokio::test]
async fn u03_what_comes_later_is_foreign_too() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 3, MIB, &[]);
        vpmem.attach_identified(&disk(0)).await.unwrap();
        vm.put_foreign("1");
        let locator = vpmem.attach_identified(&disk(1)).await.unwrap();
        assert!(locator.as_str().starts_with("vpmem:2"), "{locator}");
        assert_eq!(vpmem.slot_map()[1].usage, SlotUse::Foreign);
    }
}

#[tokio::test]
async fn a_disk_of_an_earlier_process_is_adopted() {
    for mode in MODES {
        let (vm, first, places) = two_addresses(mode);
        let mut locators = Vec::new();
        for number in 0..2 {
            locators.push(first.attach_identified(&disk(number)).await.unwrap());
        }
        let second = VpmemTransport::new(vm.clone(), first.geometry(), mode, &[]).unwrap();
        drop(first);
        let there = |at: usize| Presence::Present(locators[at].clone());
        assert_eq!(adopt(&second, 1, Some(&locators[1])).await, there(1));
        assert_eq!(adopt(&second, 0, None).await, there(0));
        let expected = [0, 1].map(|at| entry(places[at], SlotUse::Occupied, Some(disk(at))));
        assert_eq!(second.slot_map(), expected);
        let error = second.attach_identified(&disk(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        for number in 0..2 {
            second.detach(&disk(number)).await.unwrap();
            second.attach_identified(&disk(number + 2)).await.unwrap();
        }
        let left = vm.present();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}

#[tokio::test]
async fn another_disk_at_a_remembered_address_is_foreign_and_one_without_a_name_in_doubt() {
    for mode in MODES {
        let (vm, first, _) = two_addresses(mode);
        let at = first.attach_identified(&disk(0)).await.unwrap();
        let second = VpmemTransport::new(vm.clone(), first.geometry(), mode, &[]).unwrap();
        assert_eq!(adopt(&second, 1, Some(&at)).await, Presence::Absent);
        assert_eq!(second.slot_map()[0].usage, SlotUse::Foreign);
        assert_eq!(adopt(&second, 0, Some(&at)).await, Presence::Absent);
    }
    let (vm, vpmem) = vpmem(Mode::Packed, 2, 4 * MIB, &[]);
    vm.put_foreign("1");
    let at = "vpmem:1@0+1048576".parse().unwrap();
    assert_eq!(adopt(&vpmem, 0, Some(&at)).await, Presence::Unknown);
    let in_doubt = entry("1@0+1048576", SlotUse::Quarantined, Some(disk(0)));
    assert_eq!(vpmem.slot_map(), [in_doubt]);
}
