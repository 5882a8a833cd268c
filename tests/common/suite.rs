//! Fixtures for the conformance suite over a fake VM.

use blockmount::testing::FakeVm;
use blockmount::testing::conformance::{Faults, GuestFixture, Snapshot, TransportFixture};
use blockmount::{Disk, Transport};

pub(crate) const CAPACITY: u32 = 3;

pub(crate) fn disk(name: &str) -> Disk {
    Disk::virtual_disk(format!("/images/{name}"))
}

pub(crate) fn transport_fixture(
    vm: &FakeVm,
    faults: impl Faults,
    snapshot: impl Snapshot,
) -> TransportFixture {
    vm.alias("/links/a", "/images/a");
    vm.remove_source("/images/missing");
    let (host, next) = (vm.clone(), vm.clone());
    let successor = move || next.restart();
    TransportFixture::new(["a", "b", "c", "d"].map(disk), disk("missing"), snapshot)
        .aliases(["/links/a", "images/a", "/images/../images/./a"].map(Disk::virtual_disk))
        .capacity(CAPACITY as usize)
        .remove_source(move |disk| host.remove_source(disk.source()))
        .faults(faults)
        .successor(successor)
}

pub(crate) fn guest_fixture(
    vm: &FakeVm,
    transport: impl Transport,
    faults: impl Faults,
    snapshot: impl Snapshot,
) -> GuestFixture {
    let [guest, combiner, binder] = [(); 3].map(|()| vm.clone());
    GuestFixture::new(
        transport,
        vm.clone(),
        ["a", "b"].map(disk),
        "/run/suite",
        snapshot,
    )
    .scratch(disk("scratch"))
    .several(disk("merged"), ["blob-1", "blob-2"].map(disk))
    .faults(faults)
    .next_mounter(move || guest.clone())
    .next_combiner(move || combiner.clone())
    .next_binder(move || binder.clone())
}
