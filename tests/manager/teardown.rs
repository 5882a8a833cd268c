//! On the way out: in order, exactly once, resumed where it failed.

use crate::common::{calls, clean, layer, over, ro, rw, scratch, vm};
use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, MountOptions, MountRequest, Step};

const DOWN: [VmStep; 3] = [VmStep::Unmount, VmStep::Unplug, VmStep::Detach];

#[tokio::test(start_paused = true)]
async fn o03_a_failed_release_is_retried_at_the_step_that_failed() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Detach, 2, Gate::Err(ErrorKind::Other));
    let failed = mount.release().await.unwrap_err();
    assert_eq!(failed.error().step(), Step::Detach);
    assert_eq!(calls(&vm, DOWN), [1, 1, 1]);
    let again = failed.retry().await.unwrap_err();
    assert_eq!(
        calls(&vm, DOWN),
        [1, 1, 2],
        "what succeeded is not done again"
    );
    again.retry().await.unwrap();
    assert_eq!(calls(&vm, DOWN), [1, 1, 3]);
    clean(&vm, &manager).await;
    assert_eq!(calls(&vm, DOWN), [1, 1, 3], "nothing is pending any more");
}

#[tokio::test(start_paused = true)]
async fn o04_a_half_detached_disk_is_not_handed_out() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Detach, 1, Gate::Err(ErrorKind::Other));
    let failed = mount.release().await.unwrap_err();
    // The guest has unplugged it: it must be detached and attached anew.
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Detach, VmStep::Mount]),
        [2, 2, 2]
    );
    assert!(vm.device_at(mount.path()).is_some());
    // That has done the pending tear-down; to retry it now changes nothing.
    failed.retry().await.unwrap();
    assert!(vm.device_at(mount.path()).is_some());
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n12_an_ejected_disk_is_attached_again() {
    let (vm, manager) = vm();
    let attachment = manager.attach(&layer(0)).await.unwrap();
    vm.gate_next(VmStep::Detach, 2, Gate::Err(ErrorKind::Other));
    let failed = attachment.release().await.unwrap_err();
    let error = manager.attach(&layer(0)).await.unwrap_err();
    assert_eq!(
        (error.step(), error.kind()),
        (Step::Detach, ErrorKind::Other)
    );
    drop(failed);
    let attachment = manager.attach(&layer(0)).await.unwrap();
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Unplug, VmStep::Detach]),
        [2, 1, 3]
    );
    attachment.release().await.unwrap();
    clean(&vm, &manager).await;
}

/// An unmount without a mount cannot be requested: there is no call for it, only the handle that is
/// consumed. hcsshim's SCSI package takes a path here, which any caller can name.
#[tokio::test(start_paused = true)]
async fn o05_o06_a_release_concerns_its_own_mount_alone() {
    let (vm, manager) = vm();
    let one = manager.add(&layer(0), &ro()).await.unwrap();
    let two = manager.add(&layer(1), &ro()).await.unwrap();
    one.release().await.unwrap();
    assert_eq!(vm.device_at(two.path()).as_ref(), Some(two.locator()));
    assert_eq!(calls(&vm, DOWN), [1, 1, 1]);
    two.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o07_an_attachment_unmounts_nothing() {
    let (vm, manager) = vm();
    let mounted = manager.add(&layer(0), &ro()).await.unwrap();
    let attached = manager.attach(&layer(1)).await.unwrap();
    let shared = manager.attach(&layer(0)).await.unwrap();
    attached.release().await.unwrap();
    shared.release().await.unwrap();
    assert_eq!(calls(&vm, DOWN), [0, 1, 1]);
    assert!(vm.device_at(mounted.path()).is_some());
    mounted.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o17_a_busy_mount_keeps_its_disk_until_a_retry_completes_both() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    let (path, locator) = (mount.path().to_owned(), mount.locator().clone());
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let failed = mount.release().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Busy);
    assert_eq!(calls(&vm, DOWN), [1, 0, 0]);
    assert_eq!(
        vm.device_at(&path),
        Some(locator),
        "it stays usable for who uses it"
    );
    failed.retry().await.unwrap();
    assert_eq!(calls(&vm, DOWN), [2, 1, 1]);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o17_a_forgotten_debt_is_paid_before_the_disk_is_used_again() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    drop(mount.release().await.unwrap_err());
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Mount, VmStep::Unmount]), [2, 2]);
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Detach]),
        [1, 1],
        "it stayed attached meanwhile"
    );
}

#[tokio::test(start_paused = true)]
async fn o20_two_releases_at_once_are_two_shares() {
    let (vm, manager) = vm();
    let one = manager.add(&layer(0), &ro()).await.unwrap();
    let two = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let (one, two) = tokio::join!(one.release(), two.release());
    // Only one of them was the last, and it alone hears how the tear-down went.
    let failures: Vec<_> = [one, two].into_iter().filter_map(Result::err).collect();
    assert_eq!(failures.len(), 1);
    for failure in failures {
        failure.retry().await.unwrap();
    }
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o21_tearing_down_what_is_absent_succeeds() {
    let (vm, manager) = vm();
    assert!(manager.drain().await.is_clean());
    assert_eq!(calls(&vm, DOWN), [0, 0, 0]);
}

/// The unmount names the target and nothing else: what lies over the device is the guest's to know.
#[tokio::test(start_paused = true)]
async fn o22_unmounting_needs_no_options() {
    let (vm, manager) = vm();
    let encrypted = MountOptions::builder()
        .encryption(blockmount::Encryption::Ephemeral)
        .build()
        .unwrap();
    let mount = manager
        .add(&scratch(0), &MountRequest::new(encrypted))
        .await
        .unwrap();
    let path = mount.path().to_owned();
    mount.release().await.unwrap();
    let unmounts = vm
        .log()
        .into_iter()
        .filter(|event| event.step == VmStep::Unmount);
    assert!(
        unmounts
            .map(|event| event.key.to_string())
            .all(|key| key == path.to_str().unwrap())
    );
    clean(&vm, &manager).await;
}

/// Sharing a disk asks nothing of the host but which disk is meant: no access is granted again.
#[tokio::test(start_paused = true)]
async fn o23_sharing_a_disk_repeats_nothing() {
    let (vm, manager) = vm();
    let mut shares = Vec::new();
    for _ in 0..100 {
        shares.push(manager.add(&layer(0), &ro()).await.unwrap());
    }
    let once = [VmStep::Attach, VmStep::Resolve, VmStep::Mount];
    assert_eq!(calls(&vm, once), [1, 1, 1]);
    drop(shares);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o24_a_stale_debt_never_touches_what_took_its_place() {
    let (vm, manager) = over(blockmount::testing::FakeVm::with_slots(1));
    let old = manager.add(&layer(0), &ro().at("/a")).await.unwrap();
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let pending = old.release().await.unwrap_err();
    assert!(
        manager.drain().await.is_clean(),
        "the other release tears down"
    );
    // Another disk takes the only slot and the path.
    let new = manager.add(&layer(1), &ro().at("/a")).await.unwrap();
    pending.retry().await.unwrap();
    assert_eq!(vm.device_at("/a").as_ref(), Some(new.locator()));
    new.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n02_the_slot_is_free_after_the_last_share() {
    let (vm, manager) = over(blockmount::testing::FakeVm::with_slots(1));
    for n in 0..64 {
        manager
            .attach(&layer(n))
            .await
            .unwrap()
            .release()
            .await
            .unwrap();
    }
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n03_a_partition_that_failed_does_not_keep_the_disk() {
    let (vm, manager) = vm();
    let partition = |n: u32| {
        let number = std::num::NonZeroU32::new(n).unwrap();
        MountRequest::new(MountOptions::builder().partition(number).build().unwrap())
    };
    let one = manager.add(&scratch(0), &partition(1)).await.unwrap();
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::NotFound));
    manager.add(&scratch(0), &partition(2)).await.unwrap_err();
    one.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Detach), 1);
    clean(&vm, &manager).await;
}

/// Two shares of one attempt that failed; then a stranger has the slot.
#[tokio::test(start_paused = true)]
async fn n04_n05_who_shared_a_failure_has_no_claim_on_the_slot() {
    let (vm, manager) = over(blockmount::testing::FakeVm::with_slots(1));
    vm.delay(VmStep::Attach, std::time::Duration::from_millis(1));
    vm.gate_next(VmStep::Attach, 1, Gate::Err(ErrorKind::Other));
    let disk = layer(0);
    let (one, two) = tokio::join!(manager.attach(&disk), manager.attach(&disk));
    let failed = [one.unwrap_err(), two.unwrap_err()];
    let stranger = manager.add(&layer(1), &ro()).await.unwrap();
    drop(failed);
    assert!(manager.drain().await.failed.is_empty());
    assert!(vm.device_at(stranger.path()).is_some());
    stranger.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n06_a_retry_takes_no_share_of_somebody_else() {
    let (vm, manager) = vm();
    let one = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Unplug, 1, Gate::Err(ErrorKind::Busy));
    let pending = one.release().await.unwrap_err();
    assert_eq!(pending.error().step(), Step::Unplug);
    let two = manager.add(&layer(0), &ro()).await.unwrap();
    pending.retry().await.unwrap();
    assert!(vm.device_at(two.path()).is_some());
    two.release().await.unwrap();
    clean(&vm, &manager).await;
}

/// A handle is consumed by its release, so it cannot be released twice; a pending tear-down that is done can be retried.
#[tokio::test(start_paused = true)]
async fn n15_a_release_that_was_completed_elsewhere_is_complete() {
    let (vm, manager) = vm();
    let mount = manager.add(&scratch(0), &rw()).await.unwrap();
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let pending = mount.release().await.unwrap_err();
    assert!(manager.drain().await.is_clean());
    pending.retry().await.expect("there is nothing left to do");
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn drain_reports_what_it_cannot_tear_down_and_what_is_in_use() {
    let (vm, manager) = vm();
    let held = manager.add(&layer(0), &ro()).await.unwrap();
    drop(manager.add(&layer(1), &ro()).await.unwrap());
    vm.gate_always(VmStep::Unmount, Gate::Err(ErrorKind::Busy));
    let drained = manager.drain().await;
    assert_eq!(drained.failed.len(), 1);
    assert_eq!(drained.failed[0].disk(), Some(&layer(1)));
    // The held mount and its attachment, and the attachment of the one that could not be unmounted.
    assert_eq!(drained.in_use, 3);
    vm.gate_always(VmStep::Unmount, Gate::Ok);
    drop(held);
    clean(&vm, &manager).await;
}
