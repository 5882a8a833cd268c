//! Locators that two disks have: what the guest would confuse is refused before it is told.

use std::time::Duration;

use crate::common::{calls, clean, layer, ro};
use async_trait::async_trait;
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{
    AttachManager, BackendError, BlockMountManager, DeviceLocator, Disk, DiskId, ErrorKind,
    Manager, Presence, Step, Transport,
};

/// A manager of two transports that give the same locators. The first has one slot.
fn two_that_share_locators() -> (FakeVm, FakeVm, Manager) {
    let (first, second) = (FakeVm::with_slots(1), FakeVm::new());
    let manager = Manager::builder()
        .transport(first.clone())
        .transport(second.clone())
        .unplugger(first.clone())
        .mounter(first.clone())
        .build();
    (first, second, manager)
}

#[tokio::test(start_paused = true)]
async fn x10_a_locator_that_another_transport_has_given_out_is_refused() {
    let (first, second, manager) = two_that_share_locators();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    for _ in 0..2 {
        let error = manager.add(&layer(1), &ro()).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.step()),
            (ErrorKind::Conflict, Step::Attach)
        );
        assert_eq!(error.locator(), Some(mount.locator()));
        second.assert_empty();
    }
    assert_eq!(calls(&first, [VmStep::Mount, VmStep::Unplug]), [1, 0]);
    assert_eq!(first.device_at(mount.path()), Some(mount.locator().clone()));
    mount.release().await.unwrap();
    clean(&first, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn x10_a_disk_that_cannot_be_taken_back_is_pending_and_the_other_stays() {
    let (first, second, manager) = two_that_share_locators();
    let held = manager.attach(&layer(0)).await.unwrap();
    second.gate_always(VmStep::Detach, Gate::Err(ErrorKind::Busy));
    let error = manager.attach(&layer(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    assert_eq!(manager.drain().await.failed.len(), 1);
    second.open_gates();
    second.gate_always(VmStep::Detach, Gate::Ok);
    assert!(manager.drain().await.failed.is_empty());
    second.assert_empty();
    assert_eq!(first.calls(VmStep::Unplug), 0, "its locator is the other's");
    assert_eq!(first.locator_of(&layer(0)).as_ref(), Some(held.locator()));
    held.release().await.unwrap();
    clean(&first, &manager).await;
}

/// A transport that gives every disk the locator of the first.
struct OneLocatorForAll(FakeVm);

#[async_trait]
impl Transport for OneLocatorForAll {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let _its_own = self.0.attach(disk, id).await?;
        Ok("fake:0".parse().expect("it is a locator"))
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

#[tokio::test(start_paused = true)]
async fn x10_a_transport_that_gives_one_locator_twice_is_refused() {
    let vm = FakeVm::new();
    let manager = AttachManager::new(OneLocatorForAll(vm.clone()), vm.clone());
    let held = manager.attach(&layer(0)).await.unwrap();
    let error = manager.attach(&layer(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(vm.left().len(), 1);
    // The locator is free again with its disk, and not before: who asks for it tries a pending detach again.
    vm.gate_next(VmStep::Detach, 2, Gate::Err(ErrorKind::Busy));
    let pending = held.release().await.unwrap_err();
    assert!(manager.attach(&layer(1)).await.is_err());
    assert_eq!(vm.left().len(), 1);
    pending.retry().await.unwrap();
    let next = manager.attach(&layer(1)).await.unwrap();
    next.release().await.unwrap();
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn x10_a_mount_is_shared_only_for_the_disk_that_it_is_of() {
    let (first, second) = (FakeVm::new(), FakeVm::new());
    let attachers = [&first, &second].map(|vm| AttachManager::new(vm.clone(), vm.clone()));
    let mounts = BlockMountManager::new(first.clone(), "/run/m");
    let held = attachers[0].attach(&layer(0)).await.unwrap();
    let mount = mounts.mount(held, &ro()).await.unwrap();
    let other = attachers[1].attach(&layer(1)).await.unwrap();
    assert_eq!(other.locator(), mount.locator());
    let error = mounts.mount(other, &ro()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.step()),
        (ErrorKind::Conflict, Step::Mount)
    );
    // The refused attachment was given back.
    assert!(attachers[1].drain().await.is_clean());
    second.assert_empty();
    mount.release().await.unwrap();
    first.assert_empty();
}

/// A transport whose slot is free some time before its detach answers.
struct FreeBeforeItAnswers(FakeVm);

#[async_trait]
impl Transport for FreeBeforeItAnswers {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.0.attach(disk, id).await
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        self.0.detach(disk).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
        Ok(())
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

#[tokio::test(start_paused = true)]
async fn x10_a_locator_is_free_for_the_next_disk_as_soon_as_its_slot_is() {
    let vm = FakeVm::with_slots(1);
    let manager = AttachManager::new(FreeBeforeItAnswers(vm.clone()), vm.clone());
    let held = manager.attach(&layer(0)).await.unwrap();
    let release = tokio::spawn(held.release());
    vm.until_called(VmStep::Detach, 1).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let next = manager.attach(&layer(1)).await.unwrap();
    assert!(!release.is_finished());
    release.await.unwrap().unwrap();
    // The first disk, now out, has taken nothing of the second with it.
    let third = manager.attach(&layer(2)).await.unwrap_err();
    assert_eq!(third.kind(), ErrorKind::Full);
    next.release().await.unwrap();
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn attach_only_use_needs_no_unplugger() {
    let vm = FakeVm::new();
    let built = Manager::builder().transport(vm.clone()).build();
    let attacher = AttachManager::without_unplugger(vm.clone());
    for manager in [built.attachments(), &attacher] {
        let held = manager.attach(&layer(0)).await.unwrap();
        held.release().await.unwrap();
        vm.assert_empty();
    }
    assert_eq!(calls(&vm, [VmStep::Unplug, VmStep::Detach]), [0, 2]);
}
