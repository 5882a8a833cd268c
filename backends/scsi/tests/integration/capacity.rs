//! As many disks as fit, and one more.

use blockmount::testing::AttachIdentified as _;
use std::collections::HashSet;
use std::sync::Arc;

use crate::common::{Answer, address, disk, scsi, scsi_without};
use blockmount::{ErrorKind, Transport};

#[tokio::test]
async fn the_257th_disk_is_refused_with_nothing_changed() {
    let (vm, scsi) = scsi(4, 64, &[]);
    for number in 0..256 {
        scsi.attach_identified(&disk(number)).await.unwrap();
    }
    let (map, log) = (scsi.slot_map(), vm.log());
    assert_eq!((map.len(), log.len(), vm.present().len()), (256, 256, 256));
    let error = scsi.attach_identified(&disk(256)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert_eq!(
        error.message(),
        "all 256 SCSI addresses are taken (4 x 64 controllers and LUNs, 0 reserved, 0 foreign); \
         release a disk, or use another transport"
    );
    assert_eq!((scsi.slot_map(), vm.log()), (map, log));
    scsi.detach(&disk(77)).await.unwrap();
    scsi.attach_identified(&disk(256)).await.unwrap();
}

#[tokio::test]
async fn the_largest_buses_give_every_address_once() {
    let first = [address("0/0")];
    // All of the largest one would take minutes: some of each controller, with the first and the last LUN.
    let most = (0..64 * 16_384_u32).filter(|place| ![0, 255].contains(&(place % 256)));
    let most: Vec<_> = most
        .map(|place| address(&format!("{}/{}", place / 16_384, place % 16_384)))
        .chain(first)
        .collect();
    for (controllers, luns, reserved) in [
        (1, 16_384, &first[..]),
        (64, 512, &first),
        (64, 16_384, &most),
    ] {
        let (vm, scsi) = scsi_without(controllers, luns, reserved);
        let last = usize::from(controllers) * usize::from(luns) - reserved.len() + 1;
        let mut locators = HashSet::new();
        for number in 1..last {
            assert!(locators.insert(scsi.attach_identified(&disk(number)).await.unwrap()));
        }
        assert_eq!(
            scsi.attach_identified(&disk(0)).await.unwrap_err().kind(),
            ErrorKind::Full
        );
        assert_eq!(vm.present().len(), last - 1);
        for number in 1..last {
            scsi.detach(&disk(number)).await.unwrap();
        }
        assert_eq!(
            (vm.present().len(), scsi.slot_map().len()),
            (0, reserved.len())
        );
    }
}

#[tokio::test]
async fn disks_in_a_row_go_to_different_controllers() {
    let (_, scsi) = scsi(4, 64, &["0/0"]);
    let mut addresses = Vec::new();
    for number in 0..8 {
        addresses.push(
            scsi.attach_identified(&disk(number))
                .await
                .unwrap()
                .to_string(),
        );
    }
    let expected = ["0/1", "1/0", "2/0", "3/0", "0/2", "1/1", "2/1", "3/1"];
    assert_eq!(addresses, expected.map(|address| format!("scsi:{address}")));
}

#[tokio::test]
async fn o14_a_slow_disk_keeps_no_other_waiting() {
    let (vm, scsi) = scsi(1, 2, &[]);
    vm.next(Answer::Wait);
    let slow = tokio::spawn({
        let scsi = Arc::clone(&scsi);
        async move { scsi.attach_identified(&disk(0)).await }
    });
    vm.entered.notified().await;
    scsi.attach_identified(&disk(1)).await.unwrap();
    scsi.detach(&disk(1)).await.unwrap();
    assert!(!slow.is_finished());
    vm.proceed.notify_one();
    assert_eq!(slow.await.unwrap().unwrap().as_str(), "scsi:0/0");
}
