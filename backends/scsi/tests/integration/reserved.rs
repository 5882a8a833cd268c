//! Addresses that belong to the VM, such as that of the disk it boots from.

use crate::common::{Event, Vm, address, disk, entry, scsi};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, ErrorKind, Transport};
use blockmount_scsi::{Geometry, InvalidReserved, ScsiAddress, ScsiTransport};

#[tokio::test]
async fn o09_reserved_slots_are_never_detached() {
    let (vm, scsi) = scsi(2, 8, &["0/0", "1/5"]);
    let disks: Vec<_> = (0..14).map(disk).collect();
    for disk in &disks {
        scsi.attach_identified(disk).await.unwrap();
    }
    assert_eq!(
        scsi.attach_identified(&disk(14)).await.unwrap_err().kind(),
        ErrorKind::Full
    );
    // The whole bus, twice over, and disks by every name that the reserved ones could have.
    for disk in disks.iter().chain(&disks) {
        scsi.detach(disk).await.unwrap();
    }
    for name in ["", "0/0", "1/5", "/dev/sda", "scsi:0/0"] {
        scsi.detach(&Disk::virtual_disk(name)).await.unwrap();
        scsi.detach(&Disk::physical_disk(name)).await.unwrap();
    }
    let reserved = [address("0/0"), address("1/5")];
    let touched = |event: &Event| match event {
        Event::Attach(address, _) | Event::Detach(address) => reserved.contains(address),
    };
    assert_eq!(vm.log().len(), 28);
    assert!(!vm.log().iter().any(touched));
    let pinned = |text| entry(text, SlotUse::Pinned, None);
    assert_eq!(scsi.slot_map(), [pinned("0/0"), pinned("1/5")]);
}

#[test]
fn o10_geometry_and_reserved_slots_are_validated_at_construction() {
    for (controllers, luns) in [(0, 64), (4, 0), (65, 1), (1, 16_385), (u16::MAX, u16::MAX)] {
        let error = Geometry::new(controllers, luns).unwrap_err().to_string();
        assert!(
            error.contains("1 to 64 controllers of 1 to 16384"),
            "{error}"
        );
    }
    assert_eq!(Geometry::new(4, 64).unwrap(), Geometry::HYPER_V);
    assert_eq!(Geometry::HYPER_V.capacity(), 256);
    assert!(Geometry::HYPER_V.contains(address("3/63")));
    let new = |reserved: &[&str]| {
        let reserved: Vec<ScsiAddress> = reserved.iter().map(|text| address(text)).collect();
        ScsiTransport::new(Vm::default(), Geometry::HYPER_V, &reserved).map(drop)
    };
    for out in ["4/0", "63/63"] {
        let expected = InvalidReserved::OutOfRange(address(out), Geometry::HYPER_V);
        assert_eq!(new(&["0/0", out]), Err(expected));
    }
    assert_eq!(new(&["3/63", "0/0"]), Ok(()));
}

#[tokio::test]
async fn n09_a_lun_beyond_the_last_is_not_one_of_the_next_controller() {
    let new = |reserved: &[ScsiAddress]| {
        ScsiTransport::new(Vm::default(), Geometry::HYPER_V, reserved).map(drop)
    };
    let beyond = address("0/64");
    assert!(!Geometry::HYPER_V.contains(beyond));
    let error = new(&[beyond]).unwrap_err();
    assert_eq!(
        error,
        InvalidReserved::OutOfRange(beyond, Geometry::HYPER_V)
    );
    assert_eq!(
        error.to_string(),
        "address 0/64 cannot be reserved: the VM has 4 x 64 controllers and LUNs"
    );
    let twice = new(&[address("0/0"), address("1/0"), address("0/0")]);
    assert_eq!(twice, Err(InvalidReserved::Twice(address("0/0"))));
}

#[tokio::test]
async fn n10_a_reserved_slot_is_occupied_from_the_start() {
    let (vm, scsi) = scsi(1, 2, &["0/0"]);
    for round in 0..10 {
        let locator = scsi.attach_identified(&disk(round)).await.unwrap();
        assert_eq!(locator.as_str(), "scsi:0/1");
        scsi.detach(&disk(round)).await.unwrap();
    }
    assert_eq!(vm.log().len(), 20);
    assert_eq!(scsi.slot_map(), [entry("0/0", SlotUse::Pinned, None)]);
}
