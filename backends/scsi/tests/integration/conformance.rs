//! The checks that every transport must pass.

use std::sync::{Arc, Mutex};

use crate::common::{VmFaults, address, disk, scsi};
use blockmount::Disk;
use blockmount::testing::conformance::{self, TransportFixture};
use blockmount_scsi::{Geometry, ScsiTransport};

#[tokio::test]
async fn scsi_passes_the_checks_of_a_transport() {
    let (vm, scsi) = scsi(2, 2, &["0/0"]);
    // The transport of the process that works with the VM now.
    let latest = Arc::new(Mutex::new(scsi.clone()));
    let (host, slots) = (vm.clone(), latest.clone());
    let snapshot = move || {
        let present = host.disks().into_iter();
        let present = present.map(|(at, disk)| format!("present {at} {disk}"));
        // Not its state, nor whether it knows the disk as its own: these change with every error, and from process to process.
        let taken = slots.lock().unwrap().slot_map().into_iter();
        let taken = taken.map(|entry| format!("taken {}", entry.address));
        present.chain(taken).collect()
    };
    let host = vm.clone();
    let successor = move || {
        let geometry = Geometry::new(2, 2).unwrap();
        let next = ScsiTransport::new(host.clone(), geometry, &[address("0/0")]).unwrap();
        let next = Arc::new(next);
        *latest.lock().unwrap() = next.clone();
        next
    };
    let missing = Disk::virtual_disk("/images/none.vhdx");
    let fixture = TransportFixture::new((0..4).map(disk), missing, snapshot)
        .capacity(3)
        .remove_source(|_| {})
        .faults(VmFaults(vm))
        .successor(successor);
    let passed = conformance::transport(&scsi, &fixture).await;
    assert!(passed.successes > 20, "{passed}");
    // The model knows a disk by one name only.
    let not_run: Vec<_> = passed.not_run.iter().map(|check| check.name()).collect();
    assert_eq!(not_run, ["a disk has one id under all its names"]);
}
