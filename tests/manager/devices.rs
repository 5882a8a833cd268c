//! Filesystems of several devices: all of their disks are attached together, and stay as long as the mount.

use crate::common::{calls, clean, layer, ro, rw, scratch, vm};
use blockmount::testing::{Gate, VmStep};
use blockmount::{
    BlockMountManager, DeviceRole, ErrorKind, MountOptions, MountRequest, Step, Verity,
};

/// A mount of disk 0 with two blobs.
fn blobs() -> MountRequest {
    ro().with_device(layer(1)).with_device(layer(2))
}

#[tokio::test(start_paused = true)]
async fn u04_all_disks_of_a_mount_are_attached_with_it_and_go_with_it() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &blobs()).await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Mount]), [3, 1]);
    let shared = manager.add(&layer(0), &blobs()).await.unwrap();
    assert_eq!(mount.point(), shared.point());
    assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Mount]), [3, 1]);
    shared.release().await.unwrap();
    assert_eq!(vm.left().len(), 4, "three disks and the mount");
    mount.release().await.unwrap();
    assert_eq!(
        calls(&vm, [VmStep::Unmount, VmStep::Unplug, VmStep::Detach]),
        [1, 3, 3]
    );
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u04_one_disk_that_cannot_be_attached_leaves_nothing_of_the_others() {
    for missing in 0..3 {
        let (vm, manager) = vm();
        vm.remove_source(layer(missing).source());
        let error = manager.add(&layer(0), &blobs()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.disk(), Some(&layer(missing)));
        clean(&vm, &manager).await;
    }
    // Nor does a mount that fails.
    let (vm, manager) = vm();
    vm.gate_next(VmStep::Mount, 1, Gate::Err(ErrorKind::Invalid));
    let error = manager.add(&layer(0), &blobs()).await.unwrap_err();
    assert_eq!(error.step(), Step::Mount);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u04_devices_in_another_order_are_other_options() {
    let (vm, manager) = vm();
    let mount = manager.add(&layer(0), &blobs()).await.unwrap();
    let other = ro().with_device(layer(2)).with_device(layer(1));
    for other in [other, ro(), ro().with_device(layer(1))] {
        let error = manager.add(&layer(0), &other).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    }
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u04_a_further_device_is_shared_by_readers_only() {
    let (vm, manager) = vm();
    // Two images may have a blob in common, which may be an image itself.
    let one = manager.add(&layer(0), &blobs()).await.unwrap();
    let two = ro().with_device(layer(2));
    let two = manager.add(&layer(3), &two).await.unwrap();
    let blob = manager.add(&layer(2), &ro()).await.unwrap();
    for mount in [one, two, blob] {
        mount.release().await.unwrap();
    }
    // A writer has its devices alone, in both directions.
    let log = |disk: usize| rw().with_device_as(DeviceRole::Log, scratch(disk));
    let writer = manager.add(&scratch(4), &log(5)).await.unwrap();
    let second = manager.add(&scratch(6), &log(5)).await.unwrap_err();
    let mounted = manager.add(&scratch(5), &ro_of_writable()).await;
    let mounted = mounted.unwrap_err();
    writer.release().await.unwrap();
    let reader = manager.add(&scratch(5), &ro_of_writable()).await.unwrap();
    let third = manager.add(&scratch(4), &log(5)).await.unwrap_err();
    for error in [second, mounted, third] {
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert_eq!(error.step(), Step::Mount, "{error}");
    }
    reader.release().await.unwrap();
    clean(&vm, &manager).await;
}

fn ro_of_writable() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}

#[tokio::test(start_paused = true)]
async fn u04_devices_that_cannot_be_are_refused() {
    let (vm, manager) = vm();
    let with_log = rw().with_device_as(DeviceRole::Log, layer(1));
    let twice = ro().with_device(layer(1)).with_device(layer(1));
    let itself = ro().with_device(layer(0));
    let two_logs = ro()
        .with_device_as(DeviceRole::Log, layer(1))
        .with_device_as(DeviceRole::Log, layer(2));
    for (disk, request, why) in [
        (scratch(0), with_log, "read-only"),
        (layer(0), twice, "given twice"),
        (layer(0), itself, "further device of the same filesystem"),
        (layer(0), two_logs, "a mount has one of them"),
    ] {
        let error = manager.add(&disk, &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.cause().message().contains(why), "{}", error.cause());
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hash_tree_on_another_disk_is_attached_with_what_it_checks() {
    let (vm, manager) = vm();
    let verity = Verity::new("ab".repeat(32), 16).with_separate_tree(1);
    let options = MountOptions::builder().read_only().verity(verity).build();
    let request = MountRequest::new(options.unwrap());
    let checked = request.with_device_as(DeviceRole::HashTree, layer(1));
    let mount = manager.add(&layer(0), &checked).await.unwrap();
    // A tree may be of several images, and is not in the way of those who read it.
    let other = manager.add(&layer(2), &checked).await.unwrap();
    assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Mount]), [3, 2]);
    other.release().await.unwrap();
    assert_eq!(vm.left().len(), 3, "two disks and the mount");
    let plain = ro().with_device_as(DeviceRole::HashTree, layer(1));
    let error = manager.add(&layer(3), &plain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn u04_whoever_attaches_devices_gives_all_of_them() {
    let (vm, manager) = vm();
    let mounts: &BlockMountManager = manager.mounts();
    let attach = async |n| manager.attach(&layer(n)).await.unwrap();
    let alone = mounts.mount(attach(0).await, &blobs()).await;
    assert_eq!(alone.unwrap_err().kind(), ErrorKind::Invalid);
    let request = blobs();
    let one = mounts.mount_with(attach(0).await, vec![attach(1).await], &request);
    assert_eq!(one.await.unwrap_err().kind(), ErrorKind::Invalid);
    clean(&vm, &manager).await;
    let devices = vec![attach(1).await, attach(2).await];
    let mount = mounts.mount_with(attach(0).await, devices, &blobs()).await;
    let shared = manager.add(&layer(0), &blobs()).await.unwrap();
    let mount = mount.unwrap();
    assert_eq!(mount.point(), shared.point());
    mount.release().await.unwrap();
    shared.release().await.unwrap();
    clean(&vm, &manager).await;
}
