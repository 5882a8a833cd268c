//! What a recovery finds, and what it does with it.

use std::path::Path;

use blockmount::testing::{FakeVm, Gate, Key, VmStep};
use blockmount::{
    Error, ErrorKind, FoundState, HolderName, StackRequest, Step, ViewOptions, ViewRequest,
};

use crate::common::{calls, layer, ro, rw, scratch};
use crate::process::World;

fn name(text: &str) -> HolderName {
    HolderName::new(text).unwrap()
}

fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    outcome.err().map(|error| error.kind()).unwrap()
}

/// A handle of a process that is about to be killed.
fn leave<T>(handle: T) {
    std::mem::forget(handle);
}

#[tokio::test(start_paused = true)]
async fn a_holder_gets_the_very_mount_back_and_others_are_released() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    let web = manager
        .add(&layer(0), &ro().held_by(name("web")))
        .await
        .unwrap();
    let path = web.path().to_owned();
    leave((web, manager.add(&layer(1), &ro()).await.unwrap()));
    assert!(recovery.settle().await.failed.is_empty());

    let next = world.restart();
    let recovery = next.recover().await;
    let states: Vec<_> = recovery
        .report()
        .found
        .iter()
        .map(|one| one.state)
        .collect();
    assert_eq!(states, [FoundState::Up; 4]);
    assert_eq!(calls(&next.vm, [VmStep::Attach, VmStep::Adopt]), [2, 4]);
    // Found again before it is claimed: a newcomer shares it.
    let shared = recovery.manager().add(&layer(0), &ro()).await.unwrap();
    assert_eq!(shared.path(), path);
    let web = recovery.claim(&name("web")).unwrap().into_mount().unwrap();
    assert_eq!(web.path(), path);
    assert_eq!(kind(recovery.claim(&name("web"))), ErrorKind::Conflict);
    assert_eq!(kind(recovery.claim(&name("db"))), ErrorKind::NotFound);
    let manager = recovery.manager().clone();
    let settled = recovery.settle().await;
    assert_eq!((settled.failed.len(), settled.in_use), (0, 2));
    assert_eq!(next.vm.left().len(), 2, "one disk and its mount");
    shared.release().await.unwrap();
    web.release().await.unwrap();
    assert!(manager.drain().await.is_clean());
    next.assert_all_down();
}

#[tokio::test(start_paused = true)]
async fn one_name_has_one_handle() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    let held = manager
        .add(&layer(0), &ro().held_by(name("x")))
        .await
        .unwrap();
    let again = manager.add(&layer(1), &ro().held_by(name("x"))).await;
    assert_eq!(kind(again), ErrorKind::Conflict);
    let stack = StackRequest::new("/tree").layer(layer(1), ro());
    assert_eq!(
        kind(manager.stack(&stack.clone().held_by(name("x"))).await),
        ErrorKind::Conflict
    );
    assert_eq!(
        kind(manager.attach_held_by(&layer(1), &name("x")).await),
        ErrorKind::Conflict
    );
    assert_eq!(
        world.vm.calls(VmStep::Attach),
        1,
        "refused before anything was set up"
    );
    let layers = StackRequest::new("/tree").layer(layer(1), ro().held_by(name("y")));
    assert_eq!(kind(manager.stack(&layers).await), ErrorKind::Invalid);
    held.release().await.unwrap();
    let stack = manager.stack(&stack.held_by(name("x"))).await.unwrap();
    stack.release().await.unwrap();
    assert!(recovery.settle().await.is_clean() && world.journal.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_is_dropped_leaves_everything_to_the_next_one() {
    let world = World::new();
    let recovery = world.recover().await;
    let request = StackRequest::new("/tree")
        .layer(layer(0), ro())
        .scratch(scratch(1), rw());
    let manager = recovery.manager();
    leave(manager.stack(&request.held_by(name("s"))).await.unwrap());
    leave(manager.attach(&layer(2)).await.unwrap());
    let before = world.vm.left();
    drop(recovery);

    let mut next = world.restart();
    for _ in 0..2 {
        let recovery = next.recover().await;
        drop(recovery);
        assert_eq!(next.vm.left(), before);
        next = next.restart();
    }
    let recovery = next.recover().await;
    let stack = recovery.claim(&name("s")).unwrap().into_stack().unwrap();
    assert_eq!(stack.layers().len(), 1);
    assert!(stack.scratch().is_some());
    stack.release().await.unwrap();
    assert!(recovery.settle().await.is_clean());
    next.assert_all_down();
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_told_is_torn_down_from_the_top() {
    let world = World::new();
    let recovery = world.recover().await;
    let request = StackRequest::new("/tree")
        .layer(layer(0), ro())
        .held_by(name("s"));
    leave(recovery.manager().stack(&request).await.unwrap());
    drop(recovery);

    // The transport, the mounter or the combiner does not know.
    for unknown in 0..3 {
        let world = World::new();
        let recovery = world.recover().await;
        leave(recovery.manager().stack(&request).await.unwrap());
        drop(recovery);
        let next = world.restart();
        next.vm.gate_next(VmStep::Adopt, unknown, Gate::Ok);
        let lost = Gate::Uncertain { happened: true };
        next.vm.gate_next(VmStep::Adopt, 1, lost);
        let recovery = next.recover().await;
        assert_eq!(kind(recovery.claim(&name("s"))), ErrorKind::NotFound);
        // Nobody can have it half done, and nothing below it goes before it.
        let manager = recovery.manager().clone();
        let asked = manager.attach(&layer(0)).await;
        assert_eq!(asked.is_ok(), unknown > 0, "{asked:?}");
        drop(asked);
        assert!(recovery.settle().await.is_clean());
        next.vm.check().unwrap();
        next.vm.assert_empty();
        assert!(next.journal.is_empty());
        let steps = [VmStep::Separate, VmStep::Unmount, VmStep::Detach];
        assert_eq!(calls(&next.vm, steps), [1, 1, 1]);
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_vm_that_is_gone_nothing_is_left() {
    let world = World::new();
    let recovery = world.recover().await;
    let request = StackRequest::new("/tree")
        .layer(layer(0), ro())
        .held_by(name("s"));
    leave(recovery.manager().stack(&request).await.unwrap());
    drop(recovery);
    let next = world.restart();
    next.vm.kill();
    let recovery = next.recover().await;
    let found = &recovery.report().found;
    assert!(
        found.iter().all(|one| one.state == FoundState::Gone),
        "{found:?}"
    );
    let error = recovery.claim(&name("s")).unwrap_err();
    assert_eq!(
        (error.kind(), error.step()),
        (ErrorKind::NotFound, Step::Recover)
    );
    assert!(
        error
            .cause()
            .message()
            .contains("has lost the stack at /tree")
    );
    assert!(recovery.settle().await.is_clean() && next.journal.is_empty());
}

/// Somebody else has put a disk where ours was.
#[tokio::test(start_paused = true)]
async fn u03_a_foreign_disk_in_our_slot_is_not_touched() {
    let world = World::new();
    let recovery = world.recover().await;
    let held = recovery
        .manager()
        .attach_held_by(&layer(0), &name("a"))
        .await
        .unwrap();
    let locator = held.locator().clone();
    leave(held);
    drop(recovery);
    let next = world.restart();
    next.vm.take_out(&layer(0));
    assert_eq!(next.vm.attach_foreign(&layer(7)), locator);
    let before = next.vm.left();
    let recovery = next.recover().await;
    assert_eq!(kind(recovery.claim(&name("a"))), ErrorKind::NotFound);
    let manager = recovery.manager().clone();
    let other = manager.attach(&layer(0)).await.unwrap();
    assert_ne!(*other.locator(), locator);
    other.release().await.unwrap();
    assert!(recovery.settle().await.is_clean());
    assert_eq!(next.vm.left(), before);
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_fails_sets_up_nothing_and_keeps_nothing_up() {
    for writes in 0..12 {
        let world = World::new();
        let recovery = world.recover().await;
        let manager = recovery.manager().clone();
        world.journal.fail_after(writes);
        let added = manager.add(&layer(0), &ro().held_by(name("x"))).await;
        match added {
            Err(error) => {
                assert!(writes < 5, "{writes}: {error:?}");
                assert!(matches!(
                    error.kind(),
                    ErrorKind::Other | ErrorKind::Uncertain
                ));
            }
            Ok(mount) => {
                assert!(writes >= 5, "{writes}");
                mount.release().await.unwrap();
            }
        }
        if writes == 0 {
            assert_eq!(world.vm.calls(VmStep::Attach), 0);
        }
        world.vm.check().unwrap();
        world.vm.assert_empty();
        let behind = (1..11).contains(&writes);
        let drained = manager.drain().await;
        assert_eq!(!behind, drained.is_clean(), "{writes}: {drained:?}");
        let mut failed = drained.failed.iter();
        assert!(failed.all(|error| error.step() == Step::Record));
        if behind {
            let refused = manager.attach(&layer(1)).await.unwrap_err();
            assert_eq!(refused.step(), Step::Record);
        }
        world.journal.mend();
        assert!(manager.drain().await.is_clean(), "{writes}");
        assert!(world.journal.is_empty(), "{writes}: {:?}", world.journal);
        drop(recovery);
    }
}

/// A detach frees a locator for the next disk, also if the journal could not be told of it.
#[tokio::test(start_paused = true)]
async fn a_journal_that_is_behind_catches_up_before_the_next_disk() {
    let world = World::over(FakeVm::with_slots(1));
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    let first = manager.attach(&layer(0)).await.unwrap();
    world.journal.fail_after(0);
    first.release().await.unwrap();
    world.vm.assert_empty();
    manager.attach(&layer(1)).await.unwrap_err();
    world.journal.mend();
    let second = manager.attach_held_by(&layer(1), &name("a")).await.unwrap();
    leave(second);
    drop(recovery);
    let next = world.restart();
    let recovery = next.recover().await;
    let held = recovery.claim(&name("a")).unwrap();
    assert_eq!(recovery.report().found.len(), 1);
    assert!(recovery.settle().await.failed.is_empty());
    held.release().await.unwrap();
    next.vm.assert_empty();
    assert!(next.journal.is_empty());
}

#[tokio::test(start_paused = true)]
async fn u04_a_mount_of_several_devices_keeps_all_of_them() {
    let world = World::new();
    let recovery = world.recover().await;
    let blobs = ro().with_device(layer(2)).with_device(layer(1));
    let request = blobs.clone().held_by(name("web"));
    let mount = recovery.manager().add(&layer(0), &request).await.unwrap();
    let left = world.vm.left();
    leave(mount);
    drop(recovery);

    let next = world.restart();
    let recovery = next.recover().await;
    let web = recovery.claim(&name("web")).unwrap().into_mount().unwrap();
    let manager = recovery.manager().clone();
    assert!(recovery.settle().await.failed.is_empty());
    assert_eq!(next.vm.left(), left);
    let shared = manager.add(&layer(0), &blobs).await.unwrap();
    assert_eq!(shared.point(), web.point());
    web.release().await.unwrap();
    assert_eq!(next.vm.left(), left);
    shared.release().await.unwrap();
    assert!(manager.drain().await.is_clean());
    next.assert_all_down();
}

#[tokio::test(start_paused = true)]
async fn u04_a_mount_whose_device_is_gone_is_torn_down_before_the_others() {
    for gone in 1..3 {
        let world = World::new();
        let recovery = world.recover().await;
        let request = ro().with_device(layer(1)).with_device(layer(2));
        let request = request.held_by(name("web"));
        leave(recovery.manager().add(&layer(0), &request).await.unwrap());
        drop(recovery);
        world.vm.take_out(&layer(gone));

        // Twice, because what is found the first time is written down.
        let mut next = world.restart();
        for _ in 0..2 {
            let recovery = next.recover().await;
            let states: Vec<_> = recovery
                .report()
                .found
                .iter()
                .map(|one| one.state)
                .collect();
            assert_eq!(
                states
                    .iter()
                    .filter(|one| **one == FoundState::Pending)
                    .count(),
                1
            );
            assert_eq!(kind(recovery.claim(&name("web"))), ErrorKind::NotFound);
            drop(recovery);
            next = next.restart();
        }
        let recovery = next.recover().await;
        let manager = recovery.manager().clone();
        assert!(recovery.settle().await.is_clean());
        assert!(manager.drain().await.is_clean() && next.journal.is_empty());
        next.vm.assert_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn u15_a_view_is_found_again_and_goes_before_its_mount() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager();
    let mount = manager.add(&scratch(0), &rw()).await.unwrap();
    let options = ViewOptions::new(["ro"]).unwrap();
    let request = |at: &str| ViewRequest::new(at, options.clone());
    let web = request("/web").held_by(name("web"));
    leave(manager.view(&mount, &web).await.unwrap());
    leave(manager.view(&mount, &request("/other")).await.unwrap());
    leave(mount);
    drop(recovery);

    let next = world.restart();
    let recovery = next.recover().await;
    let web = recovery.claim(&name("web")).unwrap().into_view().unwrap();
    assert_eq!(web.target(), Path::new("/web"));
    assert_eq!(web.options(), &options);
    let manager = recovery.manager().clone();
    assert!(recovery.settle().await.failed.is_empty());
    assert_eq!(next.vm.left().len(), 3, "the other view is released");
    assert_eq!(calls(&next.vm, [VmStep::Unbind, VmStep::Unmount]), [1, 0]);
    web.release().await.unwrap();
    assert!(manager.drain().await.is_clean());
    next.assert_all_down();
}

#[tokio::test(start_paused = true)]
async fn u15_a_view_in_doubt_keeps_its_mount_until_it_is_removed() {
    let world = World::new();
    let recovery = world.recover().await;
    let mount = recovery.manager().add(&scratch(0), &rw()).await.unwrap();
    world
        .vm
        .gate_next(VmStep::Bind, 1, Gate::Uncertain { happened: true });
    world
        .vm
        .gate_next(VmStep::Unbind, 1, Gate::Err(ErrorKind::Busy));
    let view = ViewRequest::new("/web", ViewOptions::default());
    let error = recovery.manager().view(&mount, &view).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    leave(mount);
    drop(recovery);

    let next = world.restart();
    let recovery = next.recover().await;
    let found = recovery.report().found.last().map(|found| found.state);
    assert_eq!(found, Some(FoundState::Pending));
    assert!(recovery.settle().await.is_clean());
    next.assert_all_down();
}

#[tokio::test(start_paused = true)]
async fn u15_a_view_of_a_stack_is_found_again_and_goes_before_it() {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager();
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let stack = manager.stack(&request).await.unwrap();
    let seen = ViewRequest::new("/seen", ViewOptions::default()).held_by(name("seen"));
    leave(manager.view(&stack, &seen).await.unwrap());
    leave(stack);
    drop(recovery);

    // Of the stack, which has no holder, nobody can say whether it is there: its view is not handed out, and goes first.
    let mut next = world.restart();
    let tree = Key::Target(Path::new("/tree").into());
    next.vm.gate_by(move |call| match call.step {
        VmStep::Adopt if *call.key == tree => Gate::Uncertain { happened: true },
        _ => Gate::Ok,
    });
    let before = next.vm.left();
    let recovery = next.recover().await;
    assert_eq!(kind(recovery.claim(&name("seen"))), ErrorKind::NotFound);
    assert_eq!(next.vm.left(), before);
    drop(recovery);
    next = next.restart();
    next.vm.open_gates();
    let recovery = next.recover().await;
    assert_eq!(kind(recovery.claim(&name("seen"))), ErrorKind::NotFound);
    assert!(recovery.settle().await.is_clean());
    next.assert_all_down();
    let steps = [VmStep::Unbind, VmStep::Separate, VmStep::Unmount];
    assert_eq!(calls(&next.vm, steps), [1, 1, 1]);
}
