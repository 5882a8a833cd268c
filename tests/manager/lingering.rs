//! What is kept after its last release: who gets it again, and who must never notice it.

use std::time::Duration;

use crate::common::{calls, clean, layer, ro, rw, scratch, with};
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{
    BackendError, Disk, ErrorKind, Linger, Manager, ManagerBuilder, MountOptions, MountRequest,
    StackRequest,
};

const MINUTE: Duration = Duration::from_secs(60);

const UP_AND_DOWN: [VmStep; 5] = [
    VmStep::Attach,
    VmStep::Mount,
    VmStep::Unmount,
    VmStep::Unplug,
    VmStep::Detach,
];

fn builder(vm: &FakeVm) -> ManagerBuilder {
    let builder = Manager::builder().transport(vm.clone());
    let builder = builder.unplugger(vm.clone()).mounter(vm.clone());
    let builder = builder.combiner(vm.clone()).binder(vm.clone());
    builder.mount_root("/run/m")
}

/// A VM with so many slots, and a manager that keeps so many disks for a minute.
fn keeping(how_many: usize, slots: u32) -> (FakeVm, Manager) {
    let vm = FakeVm::with_slots(slots);
    let at_most = MINUTE;
    let manager = builder(&vm).linger(Linger { at_most, how_many }).build();
    (vm, manager)
}

/// Adds a disk and releases it.
async fn pass(manager: &Manager, disk: &Disk, request: &MountRequest) {
    let mount = manager.add(disk, request).await.unwrap();
    mount.release().await.unwrap();
}

/// Lets everything that is torn down in the background come to its end.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_was_released_is_had_again_without_a_call() {
    let (vm, manager) = keeping(4, 8);
    let first = manager.add(&layer(0), &ro()).await.unwrap();
    let path = first.path().to_owned();
    first.release().await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 0, 0, 0]);
    assert_eq!(
        (manager.attachments().in_use(), manager.mounts().in_use()),
        (1, 0),
        "the mount that lingers has the disk"
    );
    let again = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(again.path(), path);
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 0, 0, 0]);
    drop(again);
    let attachment = manager.attach(&layer(1)).await.unwrap();
    drop(attachment);
    settle().await;
    drop(manager.attach(&layer(1)).await.unwrap());
    settle().await;
    assert_eq!(calls(&vm, UP_AND_DOWN), [2, 1, 0, 0, 0]);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_lingers_unless_it_is_asked_for() {
    let (vm, manager) = crate::common::vm();
    pass(&manager, &layer(0), &ro()).await;
    vm.assert_empty();
    for off in [
        Linger {
            at_most: Duration::ZERO,
            how_many: 9,
        },
        Linger {
            at_most: MINUTE,
            how_many: 0,
        },
    ] {
        let vm = FakeVm::new();
        let manager = builder(&vm).linger(off).build();
        pass(&manager, &layer(0), &ro()).await;
        vm.assert_empty();
    }
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn it_goes_when_its_time_is_over_and_each_use_gives_it_a_new_one() {
    let (vm, manager) = keeping(4, 8);
    pass(&manager, &layer(0), &ro()).await;
    pass(&manager, &layer(1), &ro()).await;
    tokio::time::sleep(MINUTE / 2).await;
    pass(&manager, &layer(0), &ro()).await;
    tokio::time::sleep(MINUTE * 3 / 4).await;
    assert_eq!(vm.left().len(), 2, "only disk 1 is gone: {:?}", vm.left());
    assert!(vm.locator_of(&layer(0)).is_some());
    tokio::time::sleep(MINUTE / 2).await;
    vm.assert_empty();
    // Another task watches what comes later.
    pass(&manager, &layer(2), &ro()).await;
    assert_eq!(vm.left().len(), 2);
    tokio::time::sleep(MINUTE * 2).await;
    vm.assert_empty();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_least_recently_used_goes_when_there_are_too_many() {
    let (vm, manager) = keeping(2, 8);
    pass(&manager, &layer(0), &ro()).await;
    pass(&manager, &layer(1), &ro()).await;
    pass(&manager, &layer(0), &ro()).await;
    drop(manager.attach(&layer(2)).await.unwrap());
    settle().await;
    let is_there = [0, 1, 2].map(|n| vm.locator_of(&layer(n)).is_some());
    assert_eq!(is_there, [true, false, true]);
    clean(&vm, &manager).await;
}

/// The least recently used one that can be torn down goes, and no other.
#[tokio::test(start_paused = true)]
async fn a_lingering_disk_never_keeps_another_one_out() {
    let (vm, manager) = keeping(9, 3);
    for number in 0..3 {
        pass(&manager, &layer(number), &ro()).await;
    }
    let next = manager.add(&scratch(3), &rw()).await.unwrap();
    assert_eq!(vm.locator_of(&layer(0)), None);
    assert!(vm.locator_of(&layer(1)).is_some() && vm.locator_of(&layer(2)).is_some());
    // One that is in use in the guest stays, and the next one goes.
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let other = manager.attach(&layer(4)).await.unwrap();
    assert_eq!(vm.locator_of(&layer(2)), None);
    let full = manager.attach(&layer(5)).await;
    let last = full.expect("what is pending is tried once more");
    let full = manager.attach(&layer(6)).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Full);
    for attachment in [other, last] {
        attachment.release().await.unwrap();
    }
    next.release().await.unwrap();
    clean(&vm, &manager).await;
}

/// All who come at once for the slots of what lingers get one.
#[tokio::test(start_paused = true)]
async fn as_many_as_there_are_slots_get_one_at_once() {
    let (vm, manager) = keeping(9, 4);
    vm.delay(VmStep::Unmount, Duration::from_millis(3));
    vm.delay(VmStep::Detach, Duration::from_millis(2));
    for number in 0..4 {
        pass(&manager, &layer(number), &ro()).await;
    }
    let request = ro();
    let disks: Vec<Disk> = (4..8).map(layer).collect();
    let adding = disks.iter().map(|disk| manager.add(disk, &request));
    for added in futures_util::future::join_all(adding).await {
        added.unwrap().release().await.unwrap();
    }
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn what_lingers_gives_way_to_other_access_other_options_and_its_path() {
    let (vm, manager) = keeping(9, 8);
    pass(&manager, &layer(0), &ro()).await;
    let writable = manager.add(&scratch(0), &rw()).await.unwrap();
    writable.release().await.unwrap();
    pass(&manager, &layer(0), &with(["ro", "data=x"])).await;
    let other = manager.add(&layer(0), &with(["ro", "data=y"])).await;
    other.unwrap().release().await.unwrap();
    pass(&manager, &layer(1), &ro().at("/a")).await;
    let below = manager.add(&layer(2), &ro().at("/a/b")).await.unwrap();
    below.release().await.unwrap();
    let stack = StackRequest::new("/a").layer(layer(3), ro());
    manager
        .stack(&stack)
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    // What is held does not.
    let held = manager.add(&layer(0), &ro()).await.unwrap();
    let refused = manager.attach(&scratch(0)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    held.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_has_changed_is_attached_anew() {
    let (vm, manager) = keeping(9, 8);
    pass(&manager, &layer(0), &ro()).await;
    vm.change_source("/images/0.img");
    pass(&manager, &layer(0), &ro()).await;
    assert_eq!(calls(&vm, UP_AND_DOWN), [2, 2, 1, 1, 1]);
    vm.change_source("/images/0.img");
    let attachment = manager.attach(&layer(0)).await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [3, 2, 2, 2, 2]);
    attachment.release().await.unwrap();
    vm.change_source("/images/0.img");
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let stack = manager.stack(&request).await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [4, 3, 2, 3, 3]);
    // Who shares it with somebody gets what that one has.
    vm.change_source("/images/0.img");
    let shared = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(vm.calls(VmStep::Attach), 4);
    shared.release().await.unwrap();
    stack.release().await.unwrap();
    let anew = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(vm.calls(VmStep::Attach), 5);
    anew.release().await.unwrap();
    // One that cannot be taken out is not handed out either.
    vm.change_source("/images/0.img");
    vm.gate_next(VmStep::Unmount, 1, Gate::Err(ErrorKind::Busy));
    let refused = manager.add(&layer(0), &ro()).await.unwrap_err();
    assert_eq!(
        (refused.kind(), refused.disk()),
        (ErrorKind::Busy, Some(&layer(0)))
    );
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn what_can_be_written_to_never_lingers() {
    let (vm, manager) = keeping(9, 8);
    pass(&manager, &scratch(0), &rw()).await;
    // Not even where the mount is read-only.
    pass(&manager, &scratch(0), &ro()).await;
    manager
        .attach(&scratch(0))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    vm.assert_empty();
    // Nor what this manager has not attached.
    let foreign = vm.attach_foreign(&layer(1));
    let mount = manager.mounts().mount_device(&foreign, &ro()).await;
    mount.unwrap().release().await.unwrap();
    assert_eq!(vm.left().len(), 1);
    vm.take_out(&layer(1));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_layers_of_a_stack_linger_and_its_tree_does_not() {
    let (vm, manager) = keeping(9, 8);
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let request = request.layer(layer(1), ro()).scratch(scratch(2), rw());
    let stack = manager.stack(&request).await.unwrap();
    stack.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Separate), 1);
    assert_eq!(calls(&vm, UP_AND_DOWN), [3, 3, 1, 1, 1]);
    drop(manager.stack(&request).await.unwrap());
    settle().await;
    assert_eq!(calls(&vm, UP_AND_DOWN), [4, 4, 2, 2, 2]);
    clean(&vm, &manager).await;
}

/// A release that has succeeded says nothing about the tear-down that comes later: that is pending if it fails.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_torn_down_in_time_is_pending() {
    let (vm, manager) = keeping(9, 8);
    pass(&manager, &layer(0), &ro()).await;
    vm.gate_always(VmStep::Unmount, Gate::Err(ErrorKind::Busy));
    tokio::time::sleep(2 * MINUTE).await;
    assert_eq!(vm.calls(VmStep::Unmount), 1);
    let drained = manager.drain().await;
    assert_eq!(drained.failed.len(), 1, "{drained:?}");
    vm.open_gates();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn who_gave_up_leaves_what_lingers_to_a_drain() {
    let (vm, manager) = keeping(9, 8);
    vm.delay(VmStep::Mount, Duration::from_secs(2));
    crate::common::begin(manager.add(&layer(0), &ro())).await;
    // The mount is under way, and lingers once it is there.
    let drained = manager.drain().await;
    assert!(drained.is_clean(), "{drained:?}");
    vm.assert_empty();
    crate::common::begin(manager.add(&layer(0), &ro())).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(vm.calls(VmStep::Mount), 2);
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_is_frozen_keeps_what_is_released_and_not_what_lingered() {
    let (vm, manager) = keeping(9, 8);
    pass(&manager, &layer(0), &ro()).await;
    let held = manager.add(&layer(1), &ro()).await.unwrap();
    let frozen = manager.freeze().await.unwrap();
    drop(held);
    assert_eq!(vm.calls(VmStep::Unmount), 0);
    let drained = frozen.thaw().await;
    assert!(drained.is_clean(), "{drained:?}");
    vm.assert_empty();
    clean(&vm, &manager).await;
}

/// A transport that cannot tell versions.
#[tokio::test(start_paused = true)]
async fn what_has_no_version_never_lingers() {
    use async_trait::async_trait;
    use blockmount::{DeviceLocator, DiskId, Presence, Transport};

    struct Plain(FakeVm);

    #[async_trait]
    impl Transport for Plain {
        async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
            let id = self.0.identify(disk).await?;
            assert!(id.version().is_some());
            Ok(DiskId::name(&id.to_string()))
        }
        async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
            self.0.attach(disk, id).await
        }
        async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
            self.0.detach(disk).await
        }
        async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
            self.0.resize(disk, bytes).await
        }
        async fn adopt(
            &self,
            disk: &Disk,
            id: &DiskId,
            locator: Option<&DeviceLocator>,
        ) -> Result<Presence<DeviceLocator>, BackendError> {
            self.0.adopt(disk, id, locator).await
        }
    }

    let vm = FakeVm::new();
    let linger = Linger {
        at_most: MINUTE,
        how_many: 9,
    };
    let manager = Manager::builder()
        .transport(Plain(vm.clone()))
        .linger(linger);
    let manager = manager.unplugger(vm.clone()).mounter(vm.clone()).build();
    let options = MountOptions::read_only();
    pass(&manager, &layer(0), &MountRequest::new(options)).await;
    vm.assert_empty();
    clean(&vm, &manager).await;
}
