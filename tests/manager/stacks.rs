//! Layers as one tree: all or nothing, and taken apart in reverse.

use std::time::Duration;

use crate::common::{calls, clean, layer, ro, rw, scratch, soon, vm};
use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, Manager, OverlayOptions, StackRequest, Step};

/// Container `n`: three layers that all containers share, and a scratch disk of its own.
fn container(n: usize) -> StackRequest {
    StackRequest::new(format!("/containers/{n}"))
        .layer(layer(0), ro())
        .layer(layer(1), ro())
        .layer(layer(2), ro())
        .scratch(scratch(100 + n), rw())
}

#[tokio::test(start_paused = true)]
async fn two_containers_share_their_layers() {
    let (vm, manager) = vm();
    let (one_wanted, two_wanted) = (container(1), container(2));
    let (one, two) = tokio::join!(manager.stack(&one_wanted), manager.stack(&two_wanted));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.layers(), two.layers());
    assert_ne!(one.scratch(), two.scratch());
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Mount, VmStep::Combine]),
        [5, 5, 2]
    );
    one.release().await.unwrap();
    assert_eq!(
        calls(&vm, [VmStep::Separate, VmStep::Unmount, VmStep::Detach]),
        [1, 1, 1]
    );
    two.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_layers_are_in_the_order_that_was_asked_for() {
    let (vm, manager) = vm();
    // The first is the slowest to come up.
    vm.delay_by(|call| match (call.step, call.nth) {
        (VmStep::Attach, nth) => Duration::from_millis(100 / nth as u64),
        _ => Duration::ZERO,
    });
    let mut request = StackRequest::new("/tree");
    for n in 0..64 {
        request = request.layer(layer(n), ro().at(format!("/layers/{n}")));
    }
    let stack = manager.stack(&request).await.unwrap();
    let paths: Vec<_> = stack
        .layers()
        .iter()
        .map(|layer| layer.path().to_owned())
        .collect();
    let expected: Vec<_> = (0..64)
        .map(|n| std::path::PathBuf::from(format!("/layers/{n}")))
        .collect();
    assert_eq!(paths, expected);
    assert!(stack.scratch().is_none());
    stack.release().await.unwrap();
    clean(&vm, &manager).await;
}

async fn refused(manager: &Manager, step: Step, kind: ErrorKind) {
    let error = soon(manager.stack(&container(1))).await.unwrap_err();
    assert_eq!((error.step(), error.kind()), (step, kind));
}

#[tokio::test(start_paused = true)]
async fn a_stack_is_all_or_nothing() {
    let steps = [
        (VmStep::Attach, Step::Attach),
        (VmStep::Mount, Step::Mount),
        (VmStep::Combine, Step::Combine),
    ];
    for (gated, failed) in steps {
        for kind in [ErrorKind::Other, ErrorKind::Conflict] {
            let (vm, manager) = vm();
            vm.gate_next(gated, 1, Gate::Err(kind));
            refused(&manager, failed, kind).await;
            assert_eq!(vm.left(), Vec::<String>::new(), "after {gated} failed");
            clean(&vm, &manager).await;
        }
        let (vm, manager) = vm();
        vm.gate_next(gated, 1, Gate::Uncertain { happened: true });
        refused(&manager, failed, ErrorKind::Uncertain).await;
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_overlay_in_use_keeps_everything_below_it() {
    let (vm, manager) = vm();
    let stack = manager.stack(&container(1)).await.unwrap();
    vm.gate_next(VmStep::Separate, 1, Gate::Err(ErrorKind::Busy));
    let failed = stack.release().await.unwrap_err();
    assert_eq!(
        (failed.kind(), failed.error().step()),
        (ErrorKind::Busy, Step::Separate)
    );
    assert_eq!(
        calls(&vm, [VmStep::Unmount, VmStep::Unplug, VmStep::Detach]),
        [0, 0, 0]
    );
    failed.retry().await.unwrap();
    clean(&vm, &manager).await;
}

/// In the newer controller a list was not cleared on success, and the retry failed for ever (N15).
#[tokio::test(start_paused = true)]
async fn n15_a_stack_is_released_from_where_it_failed() {
    let (vm, manager) = vm();
    let stack = manager.stack(&container(1)).await.unwrap();
    vm.gate_next(VmStep::Unmount, 2, Gate::Err(ErrorKind::Busy));
    let failed = stack.release().await.unwrap_err();
    assert_eq!(failed.errors().count(), 2, "{failed:?}");
    assert!(failed.to_string().ends_with("(and 1 more)"), "{failed}");
    assert_eq!(vm.calls(VmStep::Detach), 2, "what can go goes");
    failed.retry().await.unwrap();
    assert_eq!(
        calls(&vm, [VmStep::Separate, VmStep::Unmount, VmStep::Detach]),
        [1, 6, 4]
    );
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_target_is_for_one_stack() {
    let (vm, manager) = vm();
    let stack = manager.stack(&container(1)).await.unwrap();
    for target in ["/containers/1", "/containers/1/below", "/containers"] {
        let other = StackRequest::new(target).layer(layer(7), ro());
        let error = manager.stack(&other).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{target}");
    }
    let error = manager
        .add(&layer(7), &ro().at("/containers/1"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(vm.calls(VmStep::Combine), 1);
    stack.release().await.unwrap();
    manager
        .stack(&container(1))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

/// As Hyper-V's runtimes have it: the scratch disk at the container's directory, the tree inside it.
#[tokio::test(start_paused = true)]
async fn a_tree_may_lie_inside_its_own_scratch_disk() {
    let (vm, manager) = vm();
    let request = StackRequest::new("/run/gcs/c/1/rootfs")
        .layer(layer(0), ro())
        .scratch(scratch(1), rw().at("/run/gcs/c/1"))
        .scratch_directory("scratch/1");
    let stack = manager.stack(&request).await.unwrap();
    stack.release().await.unwrap();
    // But inside a layer it is refused.
    let inside = StackRequest::new("/l/rootfs").layer(layer(0), ro().at("/l"));
    let error = manager.stack(&inside).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_scratch_directory_stays_inside_the_scratch_disk() {
    let (vm, manager) = vm();
    for directory in ["/etc", "..", "a/../../b", "./a"] {
        let request = container(1).scratch_directory(directory);
        let error = manager.stack(&request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{directory}");
    }
    assert_eq!(vm.calls(VmStep::Combine), 0);
    clean(&vm, &manager).await;
}

/// The lock of one target is no lock of another.
#[tokio::test(start_paused = true)]
async fn a_slow_stack_delays_no_other() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Combine, 1, Gate::Never);
    let slow = tokio::spawn({
        let manager = manager.clone();
        async move { manager.stack(&container(1)).await }
    });
    vm.until_called(VmStep::Combine, 1).await;
    soon(soon(manager.stack(&container(2))).await.unwrap().release())
        .await
        .unwrap();
    vm.open_gates();
    soon(slow).await.unwrap().unwrap().release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn options_of_an_overlay_reach_the_guest_or_are_refused_before() {
    let (vm, manager) = vm();
    let volatile = OverlayOptions::new(["volatile"]).unwrap();
    let without = StackRequest::new("/tree").layer(layer(0), ro());
    let error = manager.stack(&without.options(volatile.clone())).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(vm.calls(VmStep::Attach), 0);
    let stack = manager
        .stack(&container(1).options(volatile))
        .await
        .unwrap();
    assert_eq!(
        vm.overlay_at(stack.target()).unwrap().options.as_slice(),
        ["volatile"]
    );
    stack.release().await.unwrap();
    clean(&vm, &manager).await;
}
