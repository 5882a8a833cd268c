//! A process that ends, or drops its manager, while a tear-down is pending: nothing below goes before what is above it.

use std::path::Path;
use std::time::Duration;

use blockmount::testing::{Gate, Key, VmStep};
use blockmount::{
    ErrorKind, FoundState, HolderName, Manager, ReleaseError, StackRequest, ViewOptions,
    ViewRequest,
};

use crate::common::{calls, layer, ro, rw, scratch};
use crate::process::World;

const BELOW: [VmStep; 3] = [VmStep::Unmount, VmStep::Unplug, VmStep::Detach];

fn stack() -> StackRequest {
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let request = request.layer(layer(1), ro()).scratch(scratch(2), rw());
    request.held_by(HolderName::new("s").unwrap())
}

/// Lets everything run that was begun in the background.
async fn settled() {
    tokio::time::sleep(Duration::from_secs(3_600)).await;
}

/// Gives up on what is busy, perhaps after another attempt, and drops its manager.
async fn give_up(manager: Manager, error: ReleaseError, retried: bool) {
    if retried {
        drop(error.retry().await.unwrap_err());
        assert_eq!(manager.drain().await.failed.len(), 1);
    } else {
        drop(error);
    }
    drop(manager);
    settled().await;
}

#[tokio::test(start_paused = true)]
async fn r01_a_manager_that_is_dropped_leaves_what_is_below_a_busy_overlay() {
    for retried in [false, true] {
        let world = World::new();
        let recovery = world.recover().await;
        let manager = recovery.manager().clone();
        let stack = manager.stack(&stack()).await.unwrap();
        assert!(recovery.settle().await.failed.is_empty());
        let busy = Gate::Err(ErrorKind::Busy);
        world.vm.gate_always(VmStep::Separate, busy);
        let before = world.vm.left();
        let error = stack.release().await.unwrap_err();
        give_up(manager, error, retried).await;
        assert_eq!(world.vm.left(), before);
        assert_eq!(calls(&world.vm, BELOW), [0; 3]);

        // The next process finds all of it, and takes it apart from the top.
        let next = world.restart();
        next.vm.open_gates();
        let recovery = next.recover().await;
        let found = recovery.report().found.iter();
        let pending = found.filter(|one| one.state == FoundState::Pending).count();
        assert_eq!(pending, 1, "the overlay");
        assert!(recovery.settle().await.is_clean());
        next.assert_all_down();
    }
}

#[tokio::test(start_paused = true)]
async fn r01_a_recovery_that_is_dropped_leaves_what_is_below_a_pending_overlay() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    std::mem::forget(manager.stack(&stack()).await.unwrap());
    drop((recovery, manager));
    let before = world.vm.left();
    for _ in 0..2 {
        let next = world.restart();
        // Of the overlay nobody can say whether it is there.
        let lost = Gate::Uncertain { happened: true };
        let tree = Key::Target(Path::new("/tree").into());
        next.vm.gate_by(move |call| match call.step {
            VmStep::Adopt if *call.key == tree => lost,
            _ => Gate::Ok,
        });
        let recovery = next.recover().await;
        let found = recovery.report().found.last().unwrap();
        assert_eq!(found.state, FoundState::Pending, "{found:?}");
        drop(recovery);
        settled().await;
        assert_eq!(next.vm.left(), before);
        assert_eq!(calls(&next.vm, BELOW), [0; 3]);
    }
}

#[tokio::test(start_paused = true)]
async fn r01_a_manager_that_is_dropped_leaves_the_disk_below_a_busy_mount() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    assert!(recovery.settle().await.failed.is_empty());
    let busy = Gate::Err(ErrorKind::Busy);
    world.vm.gate_always(VmStep::Unmount, busy);
    drop(mount.release().await.unwrap_err());
    let before = world.vm.left();
    drop(manager);
    settled().await;
    assert_eq!(world.vm.left(), before);
    let next = world.restart();
    next.vm.open_gates();
    assert!(next.recover().await.settle().await.is_clean());
    next.assert_all_down();
}

/// The tables of a manager that is gone are gone too, and with them the lock of its journal.
#[tokio::test(start_paused = true)]
async fn r01_what_is_left_as_it_is_keeps_no_journal_open() {
    let world = World::new();
    let journal = std::sync::Arc::new(world.journal.clone());
    let recovery = world.builder().recover(journal.clone()).await.unwrap();
    let manager = recovery.manager().clone();
    let held = manager.stack(&stack()).await.unwrap();
    world
        .vm
        .gate_always(VmStep::Separate, Gate::Err(ErrorKind::Busy));
    drop(held.release().await.unwrap_err());
    drop((recovery, manager));
    settled().await;
    assert_eq!(std::sync::Arc::strong_count(&journal), 1);
}

fn view() -> ViewRequest {
    ViewRequest::new("/view", ViewOptions::default()).held_by(HolderName::new("v").unwrap())
}

#[tokio::test(start_paused = true)]
async fn r01_a_manager_that_is_dropped_leaves_what_is_below_a_busy_view() {
    for retried in [false, true] {
        let world = World::new();
        let recovery = world.recover().await;
        let manager = recovery.manager().clone();
        let mount = manager.add(&scratch(0), &rw()).await.unwrap();
        let held = manager.view(&mount, &view()).await.unwrap();
        mount.release().await.unwrap();
        assert!(recovery.settle().await.failed.is_empty());
        let busy = Gate::Err(ErrorKind::Busy);
        world.vm.gate_always(VmStep::Unbind, busy);
        let before = world.vm.left();
        let error = held.release().await.unwrap_err();
        give_up(manager, error, retried).await;
        assert_eq!(world.vm.left(), before);
        assert_eq!(calls(&world.vm, BELOW), [0; 3]);
        // The next process finds all of it, and takes it apart from the top.
        let next = world.restart();
        next.vm.open_gates();
        let recovery = next.recover().await;
        let found = recovery.report().found.last().unwrap();
        assert_eq!(found.state, FoundState::Pending, "{found:?}");
        assert!(recovery.settle().await.is_clean());
        next.assert_all_down();
    }
}

#[tokio::test(start_paused = true)]
async fn r01_a_recovery_that_is_dropped_leaves_what_is_below_a_view_in_doubt() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    let mount = manager.add(&scratch(0), &rw()).await.unwrap();
    std::mem::forget(manager.view(&mount, &view()).await.unwrap());
    std::mem::forget(mount);
    drop((recovery, manager));
    let before = world.vm.left();
    let mut next = world;
    for _ in 0..2 {
        next = next.restart();
        // Of the view nobody can say whether it is there.
        let lost = Gate::Uncertain { happened: true };
        let shown = Key::Target(Path::new("/view").into());
        next.vm.gate_by(move |call| match call.step {
            VmStep::Adopt if *call.key == shown => lost,
            _ => Gate::Ok,
        });
        let recovery = next.recover().await;
        let found = recovery.report().found.last().unwrap();
        assert_eq!(found.state, FoundState::Pending, "{found:?}");
        drop(recovery);
        settled().await;
        assert_eq!(next.vm.left(), before);
        assert_eq!(calls(&next.vm, BELOW), [0; 3]);
    }
    let next = next.restart();
    next.vm.open_gates();
    assert!(next.recover().await.settle().await.is_clean());
    next.assert_all_down();
}
