//! The checks that every transport must pass.

mod common;

use blockmount::Disk;
use blockmount::testing::conformance::{self, TransportFixture};
use common::{VmFaults, disk, scsi};

const ADOPTIONS: [&str; 6] = [
    "a disk that an earlier process attached is present where it was",
    "a disk that an earlier process attached is found without its locator",
    "an adoption changes nothing",
    "an adopted disk can be detached and leaves nothing",
    "a disk that is not attached is absent",
    "a disk is absent where another one is, and a detach of it leaves that one alone",
];

#[tokio::test]
async fn scsi_passes_the_checks_of_a_transport() {
    let (vm, scsi) = scsi(2, 2, &["0/0"]);
    let (host, slots) = (vm.clone(), scsi.clone());
    let snapshot = move || {
        let present = host.present().into_iter().map(|at| format!("present {at}"));
        // Not its state: whether the transport is sure of a slot changes with every error.
        let taken = slots.slot_map().into_iter();
        let taken = taken.map(|entry| format!("{} {:?}", entry.address, entry.disk));
        present.chain(taken).collect()
    };
    let missing = Disk::virtual_disk("/images/none.vhdx");
    let fixture = TransportFixture::new((0..4).map(disk), missing, snapshot)
        .capacity(3)
        .remove_source(|_| {})
        .faults(VmFaults(vm));
    let passed = conformance::transport(&scsi, &fixture).await;
    assert!(passed.successes > 20, "{passed}");
    // The model knows a disk by one name only.
    let not_run: Vec<_> = passed.not_run.iter().map(|check| check.name()).collect();
    // Adoptions need a second transport over the same VM.
    assert_eq!(not_run[0], "a disk has one id under all its names");
    assert_eq!(not_run[1..], ADOPTIONS);
}
