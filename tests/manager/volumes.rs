//! Disks that grow while they are used, and mounts that are asked how full they are.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use blockmount::testing::FakeVm;
use blockmount::{Disk, ErrorKind, Manager, MountOptions, MountRequest, Step};

const GIB: u64 = 1 << 30;

fn manager(vm: &FakeVm) -> Manager {
    Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .mounter(vm.clone())
        .combiner(vm.clone())
        .build()
}

fn partition(number: u32) -> MountRequest {
    let options = MountOptions::builder().partition(number.try_into().unwrap());
    MountRequest::new(options.read_only().build().unwrap())
}

#[tokio::test]
async fn a_disk_grows_with_everything_that_is_mounted_of_it_and_with_nothing_else() {
    let vm = FakeVm::new();
    let manager = manager(&vm);
    let [disk, other] = ["volume", "other"].map(|name| Disk::virtual_disk(format!("/{name}")));
    let attachment = manager.attach(&disk).await.unwrap();
    let one = manager.add(&disk, &partition(1)).await.unwrap();
    let two = manager.add(&disk, &partition(2)).await.unwrap();
    let beside = manager.add(&other, &partition(1)).await.unwrap();
    let before = manager.usage(&beside).await.unwrap();
    manager.resize(&attachment, GIB).await.unwrap();
    manager.resize(&attachment, GIB).await.unwrap();
    for mount in [&one, &two] {
        let usage = manager.usage(mount).await.unwrap();
        assert_eq!(usage.bytes.total, GIB);
        assert_eq!(manager.trim(mount).await.unwrap(), usage.bytes.available);
    }
    assert_eq!(manager.usage(&beside).await.unwrap(), before);
    let smaller = manager.resize(&attachment, 512).await.unwrap_err();
    assert_eq!(
        (smaller.kind(), smaller.step()),
        (ErrorKind::Invalid, Step::Resize)
    );
    assert_eq!(smaller.disk(), Some(&disk));
    // What is mounted later is as large.
    let three = manager.add(&disk, &partition(3)).await.unwrap();
    assert_eq!(manager.usage(&three).await.unwrap().bytes.total, GIB);
    for mount in [one, two, three, beside] {
        mount.release().await.unwrap();
    }
    attachment.release().await.unwrap();
    assert!(manager.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn what_was_given_up_goes_on_and_keeps_nothing() {
    let vm = FakeVm::new();
    let manager = manager(&vm);
    let disk = Disk::virtual_disk("/volume");
    for polls in 0..8 {
        let attachment = manager.attach(&disk).await.unwrap();
        let mount = manager.add(&disk, &partition(1)).await.unwrap();
        let bytes = GIB + polls * 512;
        {
            let mut resizing = pin!(manager.resize(&attachment, bytes));
            for _ in 0..polls {
                let ended =
                    poll_fn(|context| Poll::Ready(resizing.as_mut().poll(context).is_ready()));
                if ended.await {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        mount.release().await.unwrap();
        attachment.release().await.unwrap();
        assert!(manager.drain().await.is_clean());
        vm.assert_empty();
    }
    // An end of the VM is told, and everything else is released.
    let attachment = manager.attach(&disk).await.unwrap();
    vm.kill();
    let error = manager.resize(&attachment, 2 * GIB).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    attachment.release().await.unwrap();
    vm.check().unwrap();
}
