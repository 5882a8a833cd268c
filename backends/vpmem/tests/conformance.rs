//! The checks that every transport must pass.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use blockmount::testing::conformance::{self, Snapshot, TransportFixture};
use blockmount::{Disk, Transport};
use common::{MODES, Vm, VmFaults, Vpmem, disk, two_addresses};

/// What the VM has, and what the transport takes for taken.
fn snapshot(vm: &Arc<Vm>, vpmem: &Arc<Vpmem>) -> impl Snapshot + use<> {
    let (vm, vpmem) = (vm.clone(), vpmem.clone());
    move || {
        let present = vm.present().into_iter().map(|at| format!("present {at}"));
        // Not its use: whether the transport is sure of a slot changes with every error.
        let taken = vpmem.slot_map().into_iter();
        let taken = taken.map(|entry| format!("{} {:?}", entry.address, entry.disk));
        present.chain(taken).collect()
    }
}

/// They need a second transport over the same VM.
const ADOPTIONS: [&str; 6] = [
    "a disk that an earlier process attached is present where it was",
    "a disk that an earlier process attached is found without its locator",
    "an adoption changes nothing",
    "an adopted disk can be detached and leaves nothing",
    "a disk that is not attached is absent",
    "a disk is absent where another one is, and a detach of it leaves that one alone",
];

#[tokio::test]
async fn both_modes_pass_the_checks_of_transports() {
    for mode in MODES {
        let (vm, vpmem, _) = two_addresses(mode);
        let link = Disk::virtual_disk("/links/0.vhd").read_only();
        vm.link(&link, &disk(0));
        let fixture = TransportFixture::new(
            (0..4).map(disk),
            Disk::virtual_disk("/images/none.vhd").read_only(),
            snapshot(&vm, &vpmem),
        )
        .aliases([link])
        .capacity(2)
        .remove_source({
            let vm = vm.clone();
            move |disk| vm.remove(disk)
        })
        .faults(VmFaults(vm.clone()));
        let transport: &dyn Transport = &vpmem;
        let passed = conformance::transport(transport, &fixture).await;
        assert!(passed.successes > 20, "{passed}");
        let not_run = passed.not_run.iter().map(|check| check.name());
        let not_run: Vec<_> = not_run.filter(|name| !ADOPTIONS.contains(name)).collect();
        assert!(not_run.is_empty(), "{passed}");
    }
}
