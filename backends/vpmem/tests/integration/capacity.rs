//! As many disks as fit, as large as fit, and one more.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use blockmount::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::{Answer, GIB, MIB, MODES, Vm, Vpmem, disk, vpmem};
use blockmount::{BackendError, Disk, ErrorKind, Transport};
use blockmount_vpmem::{Geometry, MAX_MAPPINGS, Mode, PAGE};

async fn refused(vpmem: &Vpmem, number: usize) -> BackendError {
    vpmem.attach_identified(&disk(number)).await.unwrap_err()
}

/// Nothing was asked of the VM, and nothing is taken.
fn untouched(vm: &Vm, vpmem: &Vpmem) {
    assert_eq!((vm.log(), vpmem.slot_map()), (vec![], vec![]));
}

#[tokio::test]
async fn v04_a_disk_that_fits_no_device_is_unsuitable_and_changes_nothing() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 128, 4 * GIB, &[]);
        for size in [0, 4 * GIB + 1, u64::MAX] {
            vm.set_size(&disk(0), size);
            let error = refused(&vpmem, 0).await;
            assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
            let said = format!("/images/0.vhd (read-only) of {size} bytes cannot be on VPMEM");
            assert!(error.message().contains(&said), "{error}");
            untouched(&vm, &vpmem);
            vpmem.detach(&disk(0)).await.unwrap();
        }
        vm.set_size(&disk(0), 4 * GIB);
        vpmem.attach_identified(&disk(0)).await.unwrap();
    }
}

#[tokio::test]
async fn v05_a_device_is_as_large_as_it_is_configured() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 1, MIB, &[]);
        for size in [3 * GIB, MIB + 1] {
            vm.set_size(&disk(0), size);
            assert_eq!(refused(&vpmem, 0).await.kind(), ErrorKind::Unsuitable);
        }
        untouched(&vm, &vpmem);
        vm.set_size(&disk(0), MIB);
        vpmem.attach_identified(&disk(0)).await.unwrap();
        assert_eq!(refused(&vpmem, 1).await.kind(), ErrorKind::Full);
    }
}

#[tokio::test]
async fn a_disk_that_is_to_be_written_to_is_unsuitable() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 1, MIB, &[]);
        let scratch = Disk::virtual_disk("/images/0.vhd");
        let error = vpmem.attach_identified(&scratch).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
        untouched(&vm, &vpmem);
    }
}

#[tokio::test]
async fn whole_devices_one_more_than_fits() {
    let (vm, vpmem) = vpmem(Mode::WholeDevices, 128, MIB, &[0, 127]);
    for number in 1..127 {
        let locator = vpmem.attach_identified(&disk(number)).await.unwrap();
        assert_eq!(locator.as_str(), format!("vpmem:{number}"));
    }
    let (map, log) = (vpmem.slot_map(), vm.log());
    assert_eq!((map.len(), log.len()), (128, 126));
    let error = refused(&vpmem, 127).await;
    assert_eq!(error.kind(), ErrorKind::Full);
    assert_eq!(
        error.message(),
        "all 128 VPMEM devices are taken (2 reserved, 0 retained, 0 foreign); \
         release a disk, or use another transport"
    );
    assert_eq!((vpmem.slot_map(), vm.log()), (map, log));
    vpmem.detach(&disk(77)).await.unwrap();
    assert_eq!(
        vpmem.attach_identified(&disk(127)).await.unwrap().as_str(),
        "vpmem:77"
    );
}

#[tokio::test]
async fn v10_the_1025th_disk_goes_to_the_next_device() {
    let (vm, vpmem) = vpmem(Mode::Packed, 2, 4 * GIB, &[]);
    for number in 0..MAX_MAPPINGS {
        let locator = vpmem.attach_identified(&disk(number)).await.unwrap();
        let offset = number as u64 * MIB;
        assert_eq!(locator.as_str(), format!("vpmem:0@{offset}+1048576"));
    }
    // A mapping that fails leaves no device behind.
    vm.next(Answer::Fail(ErrorKind::Other));
    assert_eq!(refused(&vpmem, MAX_MAPPINGS).await.kind(), ErrorKind::Other);
    assert_eq!(vpmem.slot_map().len(), MAX_MAPPINGS);
    for number in MAX_MAPPINGS..2 * MAX_MAPPINGS {
        let locator = vpmem.attach_identified(&disk(number)).await.unwrap();
        assert!(locator.as_str().starts_with("vpmem:1@"));
    }
    let error = refused(&vpmem, 2 * MAX_MAPPINGS).await;
    assert_eq!(error.kind(), ErrorKind::Full);
    assert_eq!(
        error.message(),
        "none of the 2 VPMEM devices has 1048576 bytes free in one piece (0 reserved, 0 foreign, 2048 disks mapped, \
         at most 1024 on a device, 3221225472 bytes free on the emptiest); \
         release a disk, or use another transport"
    );
    // Room on an earlier device is used before a later one.
    vpmem.detach(&disk(1500)).await.unwrap();
    vpmem.detach(&disk(5)).await.unwrap();
    let locator = vpmem.attach_identified(&disk(3000)).await.unwrap();
    assert_eq!(locator.as_str(), "vpmem:0@5242880+1048576");
}

#[tokio::test]
async fn a_packed_device_with_nothing_on_it_is_free_again() {
    let (vm, vpmem) = vpmem(Mode::Packed, 1, 3 * MIB, &[]);
    for round in 0..3 {
        vm.set_size(&disk(round), MIB + 1);
        let locator = vpmem.attach_identified(&disk(round)).await.unwrap();
        assert_eq!(locator.as_str(), "vpmem:0@0+1052672");
        vpmem.detach(&disk(round)).await.unwrap();
        assert_eq!(vpmem.slot_map(), []);
    }
}

#[tokio::test]
async fn v09_a_layer_with_a_footer_costs_one_page_more() {
    let (vm, vpmem) = vpmem(Mode::Packed, 1, 20 * MIB, &[]);
    for number in 0..20 {
        vm.set_size(&disk(number), MIB + 512);
    }
    let mut held = 0;
    while vpmem.attach_identified(&disk(held)).await.is_ok() {
        held += 1;
    }
    // The four-way split holds 5 of them: four times 4 MiB each in 16 MiB, and one in the rest.
    assert_eq!(held as u64, 20 * MIB / (MIB + PAGE));
}

#[tokio::test]
async fn a_slow_disk_keeps_no_other_waiting() {
    for mode in MODES {
        let (vm, vpmem) = vpmem(mode, 2, 2 * MIB, &[]);
        vm.next(Answer::Wait);
        let slow = tokio::spawn({
            let vpmem = Arc::clone(&vpmem);
            async move { vpmem.attach_identified(&disk(0)).await }
        });
        vm.entered.notified().await;
        vpmem.attach_identified(&disk(1)).await.unwrap();
        vpmem.detach(&disk(1)).await.unwrap();
        assert!(!slow.is_finished());
        vm.proceed.notify_one();
        slow.await.unwrap().unwrap();
    }
}

#[test]
fn a_geometry_is_checked_when_it_is_made() {
    for (devices, size) in [
        (0, GIB),
        (129, GIB),
        (u16::MAX, GIB),
        (64, 0),
        (64, PAGE - 1),
        (64, GIB + 512),
    ] {
        let error = Geometry::new(devices, size).unwrap_err().to_string();
        assert!(error.contains("1 to 128"), "{error}");
    }
    let largest = Geometry::new(128, u64::MAX - PAGE + 1).unwrap();
    assert_eq!(largest.device_size(), u64::MAX - PAGE + 1);
    assert_eq!(Geometry::default().to_string(), "64 x 4294967296");
}
