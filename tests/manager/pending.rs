//! Who asks for what is only to be torn down.

use std::time::Duration;

use crate::common::{clean, layer, over, ro, vm};
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{AttachManager, BlockMountManager, ErrorKind, StackRequest};

#[tokio::test(start_paused = true)]
async fn x12_a_path_that_is_pending_is_torn_down_for_whoever_asks_for_it() {
    let (vm, manager) = vm();
    let held = manager.add(&layer(0), &ro().at("/a")).await.unwrap();
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    drop(held.release().await.unwrap_err());
    let next = manager.add(&layer(1), &ro().at("/a")).await.unwrap();
    assert_eq!(next.path().to_str(), Some("/a"));
    next.release().await.unwrap();
    let request = StackRequest::new("/tree").layer(layer(2), ro());
    let stack = manager.stack(&request).await.unwrap();
    vm.gate_next(VmStep::Separate, 1, Gate::Err(ErrorKind::Busy));
    drop(stack.release().await.unwrap_err());
    let stack = manager.stack(&request).await.unwrap();
    stack.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn x12_who_finds_all_slots_taken_waits_for_those_on_their_way_out() {
    let (vm, manager) = over(FakeVm::with_slots(2));
    vm.delay(VmStep::Unmount, Duration::from_secs(3));
    vm.delay(VmStep::Detach, Duration::from_secs(3));
    let first = manager.add(&layer(0), &ro()).await.unwrap();
    let second = manager.attach(&layer(1)).await.unwrap();
    drop(first);
    let next = manager.add(&layer(2), &ro()).await.unwrap();
    // A slot that is pending is torn down once more.
    vm.gate_next(VmStep::Detach, 1, Gate::Err(ErrorKind::Busy));
    drop(second.release().await.unwrap_err());
    let other = manager.attach(&layer(3)).await.unwrap();
    // Nothing is on its way out.
    let full = manager.attach(&layer(4)).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Full);
    next.release().await.unwrap();
    other.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn x12_a_manager_of_attachments_alone_waits_for_slots_on_their_way_out() {
    let vm = FakeVm::with_slots(1);
    let attachments = AttachManager::new(vm.clone(), vm.clone());
    vm.delay(VmStep::Detach, Duration::from_secs(3));
    drop(attachments.attach(&layer(0)).await.unwrap());
    let next = attachments.attach(&layer(1)).await.unwrap();
    // A slot that is pending is torn down once more.
    vm.gate_next(VmStep::Detach, 1, Gate::Err(ErrorKind::Busy));
    drop(next.release().await.unwrap_err());
    let last = attachments.attach(&layer(2)).await.unwrap();
    // Nothing is on its way out.
    let full = attachments.attach(&layer(3)).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Full);
    last.release().await.unwrap();
    assert!(attachments.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn x12_a_manager_of_mounts_alone_waits_for_paths_on_their_way_out() {
    let vm = FakeVm::new();
    let attachments = AttachManager::new(vm.clone(), vm.clone());
    let mounts = BlockMountManager::new(vm.clone(), "/run/m");
    let attach = |number| {
        let attachments = attachments.clone();
        async move { attachments.attach(&layer(number)).await.unwrap() }
    };
    let at = ro().at("/a");
    vm.delay(VmStep::Unmount, Duration::from_secs(3));
    drop(mounts.mount(attach(0).await, &at).await.unwrap());
    let next = mounts.mount(attach(1).await, &at).await.unwrap();
    // A path that is pending is torn down once more.
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    drop(next.release().await.unwrap_err());
    let last = mounts.mount(attach(2).await, &at).await.unwrap();
    let taken = mounts.mount(attach(3).await, &at).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict);
    assert_eq!(attachments.in_use(), 1, "a refused mount keeps no disk");
    last.release().await.unwrap();
    assert!(mounts.drain().await.is_clean() && attachments.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
}
