//! One disk, many who want it.

use crate::common::{begin, calls, clean, layer, over, ro, rw, scratch, soon, vm, with};
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};

const UP_AND_DOWN: [VmStep; 5] = [
    VmStep::Attach,
    VmStep::Mount,
    VmStep::Unmount,
    VmStep::Unplug,
    VmStep::Detach,
];

/// hcsshim's `TestAddAddRemoveRemove`.
#[tokio::test(start_paused = true)]
async fn the_same_disk_twice_is_one_attachment_until_the_second_release() {
    let (vm, manager) = vm();
    let one = manager.add(&layer(0), &ro()).await.unwrap();
    let two = manager.add(&layer(0), &ro()).await.unwrap();
    assert_eq!(one.path(), two.path());
    assert_eq!(one.locator(), two.locator());
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 0, 0, 0]);
    one.release().await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 0, 0, 0]);
    two.release().await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 1, 1, 1]);
    clean(&vm, &manager).await;
}

/// hcsshim's `TestGuestPath`.
#[tokio::test(start_paused = true)]
async fn who_asks_later_gets_the_path_of_who_asked_first() {
    let (vm, manager) = vm();
    let first = manager.add(&layer(0), &ro().at("/mnt1")).await.unwrap();
    let anywhere = manager.add(&layer(0), &ro()).await.unwrap();
    let elsewhere = manager.add(&layer(0), &ro().at("/mnt2")).await.unwrap();
    for mount in [&first, &anywhere, &elsewhere] {
        assert_eq!(mount.path().to_str(), Some("/mnt1"));
    }
    first.release().await.unwrap();
    anywhere.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Unmount), 0);
    elsewhere.release().await.unwrap();
    assert_eq!(vm.calls(VmStep::Unmount), 1);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn the_same_file_by_another_name_is_the_same_disk() {
    let (vm, manager) = vm();
    vm.alias("/links/0.img", "/images/0.img");
    let one = manager.add(&layer(0), &ro()).await.unwrap();
    let link = Disk::virtual_disk("/links/0.img").read_only();
    let two = manager.add(&link, &ro()).await.unwrap();
    assert_eq!(one.path(), two.path());
    let writable = Disk::virtual_disk("/links/0.img");
    let error = manager.attach(&writable).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(vm.calls(VmStep::Attach), 1);
    drop((one, two));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn callers_who_come_together_share_one_attachment_and_one_mount() {
    let (vm, manager) = vm();
    for step in VmStep::ALL {
        vm.delay(step, std::time::Duration::from_millis(5));
    }
    let all: Vec<_> = (0..50)
        .map(|_| {
            let manager = manager.clone();
            tokio::spawn(async move { manager.add(&layer(0), &ro()).await })
        })
        .collect();
    let mut mounts = Vec::new();
    for one in all {
        mounts.push(soon(one).await.unwrap().unwrap());
    }
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 0, 0, 0]);
    assert!(mounts.iter().all(|mount| mount.path() == mounts[0].path()));
    drop(mounts);
    clean(&vm, &manager).await;
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn options_in_any_order_are_one_mount() {
    let (vm, manager) = vm();
    let one = manager
        .add(&layer(0), &with(["ro", "noatime", "dax=always"]))
        .await
        .unwrap();
    let two = manager
        .add(&layer(0), &with(["dax=always", "noatime", "ro"]))
        .await
        .unwrap();
    assert_eq!((one.path(), vm.calls(VmStep::Mount)), (two.path(), 1));
    drop((one, two));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn an_attachment_and_a_mount_share_the_disk() {
    let (vm, manager) = vm();
    let attachment = manager.attach(&scratch(0)).await.unwrap();
    let mount = manager.add(&scratch(0), &rw()).await.unwrap();
    assert_eq!(attachment.locator(), mount.locator());
    mount.release().await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 1, 0, 0]);
    attachment.release().await.unwrap();
    assert_eq!(calls(&vm, UP_AND_DOWN), [1, 1, 1, 1, 1]);
    clean(&vm, &manager).await;
}

/// Partitions of one disk are devices of their own.
#[tokio::test(start_paused = true)]
async fn two_partitions_of_one_disk_are_two_mounts_of_one_attachment() {
    let (vm, manager) = vm();
    let partition = |n: u32| {
        let number = std::num::NonZeroU32::new(n).unwrap();
        let options = blockmount::MountOptions::builder()
            .partition(number)
            .build()
            .unwrap();
        blockmount::MountRequest::new(options)
    };
    let one = manager.add(&scratch(0), &partition(1)).await.unwrap();
    let two = manager.add(&scratch(0), &partition(2)).await.unwrap();
    assert_ne!(one.path(), two.path());
    assert_eq!(vm.calls(VmStep::Attach), 1);
    let whole = manager.add(&scratch(0), &rw()).await.unwrap_err();
    assert_eq!(
        whole.kind(),
        ErrorKind::Conflict,
        "the whole disk overlaps its partitions"
    );
    drop((one, two));
    clean(&vm, &manager).await;
}

/// A VM whose locators are not those of another [`FakeVm`].
struct SecondScheme(FakeVm);

#[async_trait::async_trait]
impl Transport for SecondScheme {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let locator = self.0.attach(disk, id).await?;
        Ok(DeviceLocator::new("second", locator.address()).expect("an address is visible ASCII"))
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

/// The first transport that takes a disk has it; the next one is asked if that is full.
#[tokio::test(start_paused = true)]
async fn a_full_transport_passes_the_disk_on() {
    let (small, large) = (FakeVm::with_slots(1), FakeVm::new());
    let manager = blockmount::Manager::builder()
        .transport(small.clone())
        .transport(SecondScheme(large.clone()))
        .build();
    let one = manager.attach(&layer(1)).await.unwrap();
    let two = manager.attach(&layer(2)).await.unwrap();
    let again = manager.attach(&layer(1)).await.unwrap();
    assert_eq!(
        (small.calls(VmStep::Attach), large.calls(VmStep::Attach)),
        (2, 1)
    );
    assert_eq!(one.locator(), again.locator());
    for attachment in [one, two, again] {
        attachment.release().await.unwrap();
    }
    assert_eq!(
        (small.calls(VmStep::Detach), large.calls(VmStep::Detach)),
        (1, 1)
    );
    assert!(manager.drain().await.is_clean());
    small.assert_empty();
    large.assert_empty();
}

/// Sharing what is up needs no call and no answer from a VM that is busy elsewhere.
#[tokio::test(start_paused = true)]
async fn o14_other_disks_do_not_wait() {
    let (vm, manager) = over(blockmount::testing::FakeVm::new());
    let live = manager.add(&layer(0), &ro()).await.unwrap();
    vm.gate_next(VmStep::Attach, 1, Gate::Never);
    let stuck = tokio::spawn({
        let manager = manager.clone();
        async move { manager.add(&layer(1), &ro()).await }
    });
    vm.until_called(VmStep::Attach, 2).await;
    let shared = soon(manager.add(&layer(0), &ro())).await.unwrap();
    let other = soon(manager.add(&layer(2), &ro())).await.unwrap();
    soon(other.release()).await.unwrap();
    soon(shared.release()).await.unwrap();
    // A caller that queues for the stuck disk can give up.
    begin(manager.add(&layer(1), &ro())).await;
    vm.open_gates();
    drop((stuck.await.unwrap().unwrap(), live));
    clean(&vm, &manager).await;
}

/// In the newer controller a reservation, which needs no I/O, waited behind somebody else's.
#[tokio::test(start_paused = true)]
async fn n11_a_slow_disk_delays_nobody_else() {
    let (vm, manager) = vm();
    vm.gate_next(
        VmStep::Attach,
        1,
        Gate::Slow(std::time::Duration::from_secs(40)),
    );
    let slow = tokio::spawn({
        let manager = manager.clone();
        async move { manager.attach(&layer(0)).await }
    });
    vm.until_called(VmStep::Attach, 1).await;
    let before = tokio::time::Instant::now();
    let quick = manager.attach(&layer(1)).await.unwrap();
    assert_eq!(before.elapsed(), std::time::Duration::ZERO);
    drop((slow.await.unwrap().unwrap(), quick));
    clean(&vm, &manager).await;
}
