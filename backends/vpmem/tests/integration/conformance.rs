//! The checks that every transport must pass.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use crate::common::{MODES, Vm, VmFaults, Vpmem, disk, two_addresses};
use blockmount::testing::conformance::{self, Snapshot, TransportFixture};
use blockmount::{Disk, Transport};
use blockmount_vpmem::VpmemTransport;

/// What the VM has, and what the transport of the process takes for taken that works with the VM now.
fn snapshot(vm: &Arc<Vm>, latest: &Arc<Mutex<Arc<Vpmem>>>) -> impl Snapshot + use<> {
    let (vm, latest) = (vm.clone(), latest.clone());
    move || {
        let present = vm.disks().into_iter();
        let present = present.map(|(at, disk)| format!("present {at} {disk}"));
        // Not its use, nor whether it knows the disk as its own: these change with every error, and from process to process.
        let taken = latest.lock().unwrap().slot_map().into_iter();
        let taken = taken.map(|entry| format!("taken {}", entry.address));
        present.chain(taken).collect()
    }
}

#[tokio::test]
async fn both_modes_pass_the_checks_of_transports() {
    for mode in MODES {
        let (vm, vpmem, _) = two_addresses(mode);
        let link = Disk::virtual_disk("/links/0.vhd").read_only();
        vm.link(&link, &disk(0));
        let latest = Arc::new(Mutex::new(vpmem.clone()));
        let (host, slots, geometry) = (vm.clone(), latest.clone(), vpmem.geometry());
        let successor = move || {
            let next = VpmemTransport::new(host.clone(), geometry, mode, &[]).unwrap();
            let next = Arc::new(next);
            *slots.lock().unwrap() = next.clone();
            next
        };
        let fixture = TransportFixture::new(
            (0..4).map(disk),
            Disk::virtual_disk("/images/none.vhd").read_only(),
            snapshot(&vm, &latest),
        )
        .aliases([link])
        .capacity(2)
        .remove_source({
            let vm = vm.clone();
            move |disk| vm.remove(disk)
        })
        .faults(VmFaults(vm.clone()))
        .successor(successor);
        let transport: &dyn Transport = &vpmem;
        let passed = conformance::transport(transport, &fixture).await;
        assert!(passed.successes > 20, "{passed}");
        assert!(passed.not_run.is_empty(), "{passed}");
    }
}
