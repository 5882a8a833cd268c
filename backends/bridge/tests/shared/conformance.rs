//! The checks of the guest's contracts, and the managers, across the bridge.

use blockmount::testing::conformance::{self, GuestFixture, WithoutGone};
use blockmount::testing::{FakeVm, VmStep};
use blockmount::{Disk, Manager, MountOptions, MountRequest, StackRequest};

use tokio::runtime::Handle;
use tokio::task::block_in_place;

use crate::harness::{ScsiVm, bridged, dial};
use crate::wire::{
    BridgeGuest, GuestConnection, GuestServer, HAS_FURTHER_DEVICES, HAS_VIEWS, NO_ADOPTIONS,
};

/// Words of the names of all checks of adoptions.
const ADOPTIONS: [&str; 3] = ["earlier process", "adopted", "is absent"];

fn fixture(vm: &ScsiVm, unplugger: impl blockmount::Unplugger) -> GuestFixture {
    let left = vm.clone();
    GuestFixture::new(
        vm.clone(),
        unplugger,
        ["/a.img", "/b.img"].map(Disk::virtual_disk),
        "/run/suite",
        move || left.left(),
    )
    .scratch(Disk::virtual_disk("/scratch.img"))
    .faults(WithoutGone(FakeVm::clone(vm)))
}

/// The guest as the next process of its host has it: over a connection of its own. For a multi-threaded runtime.
fn reached_anew(server: &GuestServer) -> BridgeGuest {
    let connecting = GuestConnection::connect(dial(server).stream);
    let connected = block_in_place(|| Handle::current().block_on(connecting));
    BridgeGuest::new(connected.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contracts_hold_across_the_bridge() {
    let vm = ScsiVm::default();
    let (guest, server) = bridged(&vm).await;
    let mut fixture = fixture(&vm, guest.clone());
    if NO_ADOPTIONS.is_none() {
        let servers = [(); 3].map(|()| server.clone());
        let [mounters, combiners, binders] = servers.map(|server| move || reached_anew(&server));
        fixture = fixture.next_mounter(mounters).next_combiner(combiners);
        fixture = fixture.next_binder(binders);
    }
    if HAS_FURTHER_DEVICES {
        let disk = |name: &str| Disk::virtual_disk(format!("/{name}.erofs")).read_only();
        fixture = fixture.several(disk("merged"), ["one", "other"].map(disk));
    }
    let mounter = conformance::mounter(&guest, &fixture).await;
    let unplugger = conformance::unplugger(&guest, Some(&guest), &fixture).await;
    let combiner = conformance::combiner(&guest, &guest, &fixture).await;
    let mut all = vec![mounter, unplugger, combiner];
    if HAS_VIEWS {
        all.push(conformance::binder(&guest, &guest, &fixture).await);
    }
    let mut not_run = Vec::new();
    for passed in all {
        println!("{passed}");
        assert!(passed.successes > 5, "{passed}");
        not_run.extend(passed.not_run.into_iter().map(|check| check.name()));
    }
    let is_adoption = |name: &&str| ADOPTIONS.iter().any(|words| name.contains(words));
    let adoptions: Vec<&str> = not_run.into_iter().filter(is_adoption).collect();
    match NO_ADOPTIONS {
        Some(reason) => {
            println!("not run, because {reason}: {adoptions:?}");
            assert_eq!(adoptions.len(), 7, "{adoptions:?}");
        }
        None => assert_eq!(adoptions, [""; 0]),
    }
    vm.assert_empty();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_share_and_release_across_the_bridge() {
    let vm = ScsiVm::default();
    let (guest, _server) = bridged(&vm).await;
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest.clone())
        .combiner(guest)
        .build();
    let layer = |name: String| {
        (
            Disk::virtual_disk(name).read_only(),
            MountRequest::new(MountOptions::read_only()),
        )
    };
    let mut adding = tokio::task::JoinSet::new();
    for number in 0..128 {
        let manager = manager.clone();
        let (disk, request) = layer(format!("/layers/{}", number / 2));
        adding.spawn(async move { manager.add(&disk, &request).await.unwrap() });
    }
    let mounts = adding.join_all().await;
    assert_eq!(vm.calls(VmStep::Mount), 64, "two callers share each disk");
    let layers = (0..40).map(|number| layer(format!("/layers/{number}")));
    let request = layers.fold(
        StackRequest::new("/run/container"),
        |request, (disk, mount)| request.layer(disk, mount),
    );
    let stack = manager.stack(&request).await.unwrap();
    stack.release().await.unwrap();
    for mount in mounts {
        mount.release().await.unwrap();
    }
    assert!(manager.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
}
