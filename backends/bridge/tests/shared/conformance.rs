//! The checks of the guest's contracts, and the managers, across the bridge.

use blockmount::testing::conformance::{self, GuestFixture, WithoutGone};
use blockmount::testing::{FakeVm, VmStep};
use blockmount::{Disk, Manager, MountOptions, MountRequest, StackRequest};

use crate::harness::{ScsiVm, bridged};

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

#[tokio::test]
async fn the_contracts_hold_across_the_bridge() {
    let vm = ScsiVm::default();
    let (guest, _server) = bridged(&vm).await;
    let fixture = fixture(&vm, guest.clone());
    let mounter = conformance::mounter(&guest, &fixture).await;
    let unplugger = conformance::unplugger(&guest, Some(&guest), &fixture).await;
    let combiner = conformance::combiner(&guest, &guest, &fixture).await;
    for passed in [mounter, unplugger, combiner] {
        println!("{passed}");
        assert!(passed.successes > 5, "{passed}");
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
