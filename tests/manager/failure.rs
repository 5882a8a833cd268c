//! Backends that fail, lie in doubt, or panic on the way up.

use std::error::Error as _;
use std::time::Duration;

use crate::common::{calls, clean, layer, ro, soon, vm};
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{ErrorKind, Manager};

/// Asks for one disk `callers` times at once.
async fn all_at_once(
    manager: &Manager,
    callers: usize,
) -> Vec<Result<blockmount::Mount, blockmount::Error>> {
    let asking: Vec<_> = (0..callers)
        .map(|_| {
            let manager = manager.clone();
            tokio::spawn(async move { manager.add(&layer(0), &ro()).await })
        })
        .collect();
    let mut outcomes = Vec::new();
    for caller in asking {
        outcomes.push(soon(caller).await.unwrap());
    }
    outcomes
}

fn slow(vm: &FakeVm) {
    for step in VmStep::ALL {
        vm.delay(step, Duration::from_millis(10));
    }
}

/// In hcsshim's SCSI package the fix for waiters of a failed attachment dereferenced nil (history 1 and 2).
#[tokio::test(start_paused = true)]
async fn waiters_get_the_one_outcome() {
    for (step, attaches) in [
        (VmStep::Attach, 1),
        (VmStep::Mount, 1),
        (VmStep::Resolve, 1),
    ] {
        let (vm, manager) = vm();
        slow(&vm);
        vm.gate_next(step, 1, Gate::Err(ErrorKind::Other));
        for outcome in all_at_once(&manager, 8).await {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Other);
            assert!(error.source().is_some());
        }
        assert_eq!(vm.calls(VmStep::Attach), attaches);
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn o13_a_panic_is_an_error_for_everybody() {
    for step in [
        VmStep::Identify,
        VmStep::Attach,
        VmStep::Resolve,
        VmStep::Mount,
    ] {
        for happened in [false, true] {
            let (vm, manager) = vm();
            slow(&vm);
            vm.gate_next(step, 1, Gate::Panic { happened });
            let outcomes = all_at_once(&manager, 4).await;
            let failed = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
            let kinds: Vec<_> = failed.map(blockmount::Error::kind).collect();
            // Each caller identifies the disk for itself; the rest is done once for all.
            let expected = if step == VmStep::Identify { 1 } else { 4 };
            assert_eq!(kinds, vec![ErrorKind::Uncertain; expected], "{step}");
            drop(outcomes);
            clean(&vm, &manager).await;
            let mount = manager
                .add(&layer(0), &ro())
                .await
                .expect("the disk can be had again");
            mount.release().await.unwrap();
            clean(&vm, &manager).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn o15_what_is_in_doubt_is_detached_before_its_slot_is_used() {
    for happened in [false, true] {
        let (vm, manager) = vm();
        vm.gate_next(VmStep::Attach, 1, Gate::Uncertain { happened });
        vm.gate_next(VmStep::Detach, 1, Gate::Err(ErrorKind::Other));
        let error = manager.attach(&layer(0)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain);
        assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Detach]), [1, 1]);
        // The detach failed too, so the slot stays out of use: others get another one.
        let other = manager.attach(&layer(1)).await.unwrap();
        // The next request for the disk detaches it first.
        let again = manager.attach(&layer(0)).await.unwrap();
        assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Detach]), [3, 2]);
        assert_ne!(other.locator(), again.locator());
        drop((other, again));
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn n14_an_uncertain_mount_is_unmounted_before_its_disk_goes() {
    for happened in [false, true] {
        let (vm, manager) = vm();
        vm.gate_next(VmStep::Mount, 1, Gate::Uncertain { happened });
        let error = manager.add(&layer(0), &ro()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain);
        let steps = [VmStep::Unmount, VmStep::Unplug, VmStep::Detach];
        assert_eq!(
            calls(&vm, steps),
            [1, 1, 1],
            "all of it is gone when the caller hears of it"
        );
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn n01_a_failed_mount_is_out_of_the_way() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::Other));
    manager.add(&layer(0), &ro()).await.unwrap_err();
    assert_eq!(
        vm.left(),
        Vec::<String>::new(),
        "the disk is detached, its slot is free"
    );
    manager
        .add(&layer(0), &ro())
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n07_the_failure_of_one_does_not_poison_the_next() {
    let (vm, manager) = vm();
    let holder = manager.attach(&layer(0)).await.unwrap();
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::Other));
    manager.add(&layer(0), &ro()).await.unwrap_err();
    let mount = manager
        .add(&layer(0), &ro())
        .await
        .expect("the guest has recovered");
    assert_eq!(mount.locator(), holder.locator());
    drop((holder, mount));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_not_there_leaves_nothing() {
    let (vm, manager) = vm();
    vm.remove_source("/images/0.img");
    let error = manager.add(&layer(0), &ro()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        error
            .to_string()
            .starts_with("cannot identify disk /images/0.img"),
        "{error}"
    );
    assert_eq!(vm.calls(VmStep::Attach), 0);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_disk_too_many_changes_nothing() {
    let (vm, manager) = vm();
    let mut live = Vec::new();
    for n in 0..256 {
        live.push(manager.add(&layer(n), &ro()).await.unwrap());
    }
    let before = vm.left();
    let error = manager.add(&layer(256), &ro()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert_eq!(vm.left(), before);
    live.pop().unwrap().release().await.unwrap();
    live.push(manager.add(&layer(256), &ro()).await.unwrap());
    drop(live);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn errors_name_the_step_the_disk_the_device_and_the_path() {
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::Other));
    let error = manager
        .add(&layer(0), &ro().at("/there"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot mount disk /images/0.img (read-only) as fake:0 at /there"
    );
    let cause = error.source().unwrap().to_string();
    assert!(
        !error.to_string().contains(&cause),
        "the cause is said once"
    );
    clean(&vm, &manager).await;
}

/// When the VM is gone, so is everything in it: tear-down succeeds, set-up says so (history 26).
#[tokio::test(start_paused = true)]
async fn a_vm_that_is_gone_owes_nothing() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    let dropped = manager.add(&layer(1), &ro()).await.unwrap();
    vm.kill();
    drop(dropped);
    soon(mount.release()).await.unwrap();
    let error = soon(manager.add(&layer(2), &ro())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(soon(manager.drain()).await.is_clean());
    vm.check().unwrap();
}
