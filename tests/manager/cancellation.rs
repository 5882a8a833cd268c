//! Callers who give up, at every moment.

use std::time::Duration;

use crate::common::{begin, calls, clean, layer, ro, soon, vm};
use blockmount::ErrorKind;
use blockmount::testing::{Gate, VmStep};

const WAY_IN_AND_OUT: [VmStep; 5] = [
    VmStep::Attach,
    VmStep::Mount,
    VmStep::Unmount,
    VmStep::Unplug,
    VmStep::Detach,
];

#[tokio::test(start_paused = true)]
async fn o01_a_waiter_that_gives_up_gives_its_share_back() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Attach, 1, Gate::Never);
    let owner = tokio::spawn({
        let manager = manager.clone();
        async move { manager.attach(&layer(0)).await }
    });
    vm.until_called(VmStep::Attach, 1).await;
    let waiter = tokio::time::timeout(Duration::from_secs(1), manager.attach(&layer(0))).await;
    assert!(waiter.is_err(), "the waiter gives up");
    vm.open_gates();
    soon(owner).await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(calls(&vm, WAY_IN_AND_OUT), [1, 0, 0, 1, 1]);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o02_a_waiter_outlives_the_caller_that_began() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Attach, 1, Gate::Slow(Duration::from_secs(10)));
    let first = tokio::spawn({
        let manager = manager.clone();
        async move { manager.add(&layer(0), &ro()).await }
    });
    vm.until_called(VmStep::Attach, 1).await;
    let waiter = tokio::spawn({
        let manager = manager.clone();
        async move { manager.add(&layer(0), &ro()).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    first.abort();
    let mount = soon(waiter).await.unwrap();
    let mount = mount.expect("the attempt of one is not the fate of another");
    assert_eq!(vm.device_at(mount.path()).as_ref(), Some(mount.locator()));
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o08_no_detach_while_mounted() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Mount, 1, Gate::Slow(Duration::from_secs(10)));
    let first = tokio::spawn({
        let manager = manager.clone();
        async move { manager.add(&layer(0), &ro()).await }
    });
    vm.until_called(VmStep::Mount, 1).await;
    let second = tokio::time::timeout(Duration::from_secs(1), manager.add(&layer(0), &ro())).await;
    assert!(
        second.is_err(),
        "the second caller gives up while the mount is under way"
    );
    let mount = soon(first).await.unwrap().unwrap();
    assert_eq!(vm.device_at(mount.path()).as_ref(), Some(mount.locator()));
    mount.release().await.unwrap();
    let order: Vec<VmStep> = vm.log().iter().map(|event| event.step).collect();
    let last = |step| order.iter().rposition(|other| *other == step).unwrap();
    assert!(last(VmStep::Unmount) < last(VmStep::Unplug));
    assert!(last(VmStep::Unplug) < last(VmStep::Detach));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o18_cleaning_up_has_its_own_time() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Mount, 1, Gate::Slow(Duration::from_secs(20)));
    vm.gate_next(VmStep::Detach, 1, Gate::Slow(Duration::from_secs(20)));
    let hurried = tokio::time::timeout(Duration::from_secs(5), manager.add(&layer(0), &ro())).await;
    assert!(hurried.is_err());
    // No caller holds the mount when it comes up, so it is torn down again in the background.
    clean(&vm, &manager).await;
    assert_eq!(calls(&vm, WAY_IN_AND_OUT), [1, 1, 1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_gives_up_at_any_poll_leaves_nothing() {
    for polls in 0..40 {
        let (vm, manager) = vm();
        for step in VmStep::ALL {
            vm.delay(step, Duration::from_millis(1));
        }
        let request = blockmount::StackRequest::new("/tree")
            .layer(layer(0), ro())
            .layer(layer(1), ro())
            .scratch(crate::common::scratch(2), crate::common::rw());
        let limit = Duration::from_micros(250 * polls);
        drop(tokio::time::timeout(limit, manager.stack(&request)).await);
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_nobody_waits_for_goes_on() {
    let (vm, manager) = vm();
    vm.delay(VmStep::Unmount, Duration::from_secs(1));
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    begin(mount.release()).await;
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_timeout_of_a_manager_ends_the_wait_and_not_the_work() {
    let vm = blockmount::testing::FakeVm::new();
    let manager = blockmount::Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .timeout(Duration::from_secs(7))
        .build();
    vm.gate_next(VmStep::Attach, 1, Gate::Never);
    let began = tokio::time::Instant::now();
    let error = manager.attach(&layer(0)).await.unwrap_err();
    assert_eq!(
        (error.kind(), began.elapsed()),
        (ErrorKind::Uncertain, Duration::from_secs(7))
    );
    assert_eq!(error.disk(), Some(&layer(0)));
    vm.open_gates();
    clean(&vm, &manager).await;
    assert_eq!(vm.calls(VmStep::Attach), 1);
}

/// A lease may be dropped where no runtime is.
#[test]
fn a_mount_dropped_outside_of_the_runtime_is_released_in_it() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let (vm, manager) = vm();
    let mount = runtime.block_on(manager.add(&layer(0), &ro())).unwrap();
    std::thread::spawn(move || drop(mount)).join().unwrap();
    runtime.block_on(clean(&vm, &manager));
}

/// A runtime that ends in the middle of a call leaves the state as it was.
#[test]
fn a_runtime_that_ends_leaves_its_debts_to_the_next() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Attach, 1, Gate::Never);
    let first = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    first.block_on(async {
        let manager = manager.clone();
        tokio::spawn(async move { drop(manager.attach(&layer(0)).await) });
        vm.until_called(VmStep::Attach, 1).await;
    });
    drop(first);
    let second = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    second.block_on(async {
        let attachment = manager.attach(&layer(0)).await.unwrap();
        assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Detach]), [2, 1]);
        attachment.release().await.unwrap();
        assert!(manager.drain().await.is_clean());
        vm.assert_empty();
    });
}
