//! Requests that exclude each other, or make no sense: refused before anything is touched.

use crate::common::{calls, clean, layer, ro, rw, scratch, vm, with};
use blockmount::testing::{Gate, VmStep};
use blockmount::{
    CacheMode, DeviceLocator, Disk, DiskOption, DiskOptions, ErrorKind, MountOptions, MountRequest,
    SectorSize, StackRequest,
};

/// hcsshim's `TestConflictingGuestPath`.
#[tokio::test(start_paused = true)]
async fn another_disk_at_a_taken_path_is_refused_and_detached() {
    let (vm, manager) = vm();
    let first = manager.add(&layer(0), &ro().at("/mnt1")).await.unwrap();
    let error = manager.add(&layer(1), &ro().at("/mnt1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(error.path().unwrap().to_str(), Some("/mnt1"));
    assert_eq!(error.disk(), Some(&layer(1)));
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Mount, VmStep::Detach]),
        [2, 1, 1]
    );
    // The path is free again with its mount.
    first.release().await.unwrap();
    manager
        .add(&layer(1), &ro().at("/mnt1"))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o11_made_up_paths_avoid_those_that_were_asked_for() {
    let (vm, manager) = vm();
    let asked = manager.add(&layer(0), &ro().at("/run/m/m1")).await.unwrap();
    let mut made_up = Vec::new();
    for n in 1..5 {
        made_up.push(manager.add(&layer(n), &ro()).await.unwrap());
    }
    let paths: Vec<_> = made_up
        .iter()
        .map(|mount| mount.path().to_str().unwrap())
        .collect();
    assert_eq!(paths, ["/run/m/m0", "/run/m/m2", "/run/m/m3", "/run/m/m4"]);
    // And one that was made up can be asked for when it is free, and only then.
    let error = manager
        .add(&layer(9), &ro().at("/run/m/m2"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    drop((asked, made_up));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o12_the_order_of_requests_makes_no_difference() {
    for swap in [false, true] {
        let (vm, manager) = vm();
        let mut requests = [(layer(0), "/a"), (layer(1), "/b")];
        if swap {
            requests.reverse();
        }
        let mut live = Vec::new();
        for (disk, target) in &requests {
            live.push(manager.add(disk, &ro().at(*target)).await.unwrap());
        }
        // Mounted at /b already: whose /a is makes no difference.
        let shared = manager.add(&layer(1), &ro().at("/a")).await.unwrap();
        assert_eq!(shared.path().to_str(), Some("/b"));
        drop((live, shared));
        clean(&vm, &manager).await;
    }
}

#[tokio::test(start_paused = true)]
async fn o16_options_are_compared_by_what_they_mean() {
    let (vm, manager) = vm();
    let options = vec!["noatime".to_owned(), "nodev".to_owned()];
    let request = |options: &[String]| {
        MountRequest::new(
            MountOptions::builder()
                .read_only()
                .options(options.to_vec())
                .build()
                .unwrap(),
        )
    };
    let one = manager.add(&layer(0), &request(&options)).await.unwrap();
    assert_eq!(
        options,
        ["noatime", "nodev"],
        "what the caller has stays as it is"
    );
    let reversed: Vec<_> = options.iter().rev().cloned().collect();
    let two = manager.add(&layer(0), &request(&reversed)).await.unwrap();
    assert_eq!(one.path(), two.path());
    // No options and an empty list of them are the same.
    let none = MountRequest::new(MountOptions::read_only());
    assert_eq!(request(&[]), none);
    // Where the order would matter, there is no right one.
    let built = MountOptions::builder().options(["rw", "ro"]).build();
    assert_eq!(
        built.unwrap_err().to_string(),
        "mount option \"ro\" contradicts \"rw\""
    );
    drop((one, two));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o19_one_disk_has_one_access_under_all_its_names() {
    let (vm, manager) = vm();
    vm.alias("/IMAGES/0.IMG", "/images/0.img");
    let reader = manager.attach(&layer(0)).await.unwrap();
    for writable in [scratch(0), Disk::virtual_disk("/IMAGES/0.IMG")] {
        let error = manager.attach(&writable).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(
            error
                .cause()
                .message()
                .contains("/images/0.img (read-only)"),
            "{error:?}"
        );
    }
    assert_eq!(calls(&vm, [VmStep::Attach, VmStep::Detach]), [1, 0]);
    reader.release().await.unwrap();
    // With the last reader gone it can be written to.
    manager
        .attach(&scratch(0))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o26_one_device_has_the_mounts_that_its_kernel_can_give_it() {
    let (vm, manager) = vm();
    let writer = manager.add(&scratch(0), &rw()).await.unwrap();
    for other in [ro(), with(["noatime"]), with(["ro", "nodev"])] {
        let error = manager.add(&scratch(0), &other).await.unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::Conflict,
            "a writer has the device alone"
        );
    }
    let reader = manager
        .add(&layer(1), &with(["ro", "nodev"]))
        .await
        .unwrap();
    let beside = manager
        .add(&layer(1), &with(["ro", "noexec"]))
        .await
        .unwrap();
    assert_ne!(
        reader.path(),
        beside.path(),
        "flags of the mount may differ"
    );
    let error = manager
        .add(&layer(1), &with(["ro", "dax=always"]))
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Conflict,
        "options of the filesystem may not"
    );
    drop((writer, reader, beside));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n08_options_of_the_filesystem_keep_their_case() {
    let (vm, manager) = vm();
    let one = manager
        .add(&layer(0), &with(["ro", "context=/A"]))
        .await
        .unwrap();
    let error = manager
        .add(&layer(0), &with(["ro", "context=/a"]))
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Conflict,
        "another context is another mount"
    );
    drop(one);
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn n13_what_was_released_holds_no_grudge() {
    let (vm, manager) = vm();
    manager
        .add(&layer(0), &ro().at("/a"))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    // The same disk, otherwise in every way.
    let request = with(["noatime"]).at("/b");
    manager
        .add(&scratch(0), &request)
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn o25_what_cannot_be_is_refused_before_anything_is_attached() {
    let (vm, manager) = vm();
    let error = manager.add(&layer(0), &rw()).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Invalid,
        "a writer of a read-only disk"
    );
    let empty = manager
        .stack(&StackRequest::new("/tree"))
        .await
        .unwrap_err();
    assert_eq!(empty.kind(), ErrorKind::Invalid);
    assert_eq!(
        calls(&vm, [VmStep::Attach, VmStep::Mount, VmStep::Combine]),
        [0, 0, 0]
    );
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn a_path_above_or_below_a_live_one_is_taken() {
    let (vm, manager) = vm();
    let live = manager.add(&layer(0), &ro().at("/a/b")).await.unwrap();
    for target in ["/a/b/c", "/a", "/a/b/", "/a//b", "/a/./b"] {
        let error = manager.add(&layer(1), &ro().at(target)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{target}");
    }
    // A longer name is no path below.
    let beside = manager.add(&layer(1), &ro().at("/a/bc")).await.unwrap();
    drop((live, beside));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn targets_that_are_no_paths_are_invalid() {
    let (vm, manager) = vm();
    let long = format!("/{}", "x/".repeat(2047) + "x");
    for target in [
        "", "a", "a/b", "./a", "/", "//", "/.", "/a/../b", "/..", "/a\0b", "c:", "c:\\", &long,
    ] {
        let error = manager.add(&layer(0), &ro().at(target)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{target:?}");
    }
    assert_eq!(vm.calls(VmStep::Mount), 0);
    for target in ["/a b", "/a,b", "/a:b", "/a\nb", "/é", &long[..4095]] {
        let mount = manager.add(&layer(0), &ro().at(target)).await.unwrap();
        assert_eq!(mount.path().to_str(), Some(target));
        mount.release().await.unwrap();
    }
    clean(&vm, &manager).await;
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn a_target_need_not_be_text() {
    use std::os::unix::ffi::OsStrExt;
    let (vm, manager) = vm();
    let target = std::path::Path::new(std::ffi::OsStr::from_bytes(b"/run/\xff\xfe"));
    let mount = manager.add(&layer(0), &ro().at(target)).await.unwrap();
    assert_eq!(mount.path(), target);
    mount.release().await.unwrap();
    clean(&vm, &manager).await;
}

/// A refusal is for one request: those that queued behind it may be for something else.
#[tokio::test(start_paused = true)]
async fn a_conflict_of_one_caller_is_not_that_of_the_next() {
    let (vm, manager) = vm();
    let taken = manager.add(&layer(0), &ro().at("/taken")).await.unwrap();
    vm.delay(VmStep::Attach, std::time::Duration::from_millis(1));
    let (refused, mounted) = tokio::join!(
        async { manager.add(&layer(1), &ro().at("/taken")).await },
        async { manager.add(&layer(1), &ro().at("/free")).await },
    );
    // Either the first one is refused, or it shares what the second one got.
    match refused {
        Ok(shared) => assert_eq!(shared.path().to_str(), Some("/free")),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Conflict),
    }
    assert_eq!(mounted.unwrap().path().to_str(), Some("/free"));
    drop(taken);
    clean(&vm, &manager).await;
}

/// An image that is replaced under its name is another disk, and not the one that is attached.
#[tokio::test(start_paused = true)]
async fn a_replaced_image_is_not_taken_for_the_old_one() {
    let (vm, manager) = vm();
    let old = manager.attach(&layer(0)).await.unwrap();
    vm.alias("/images/0.img", "/images/replacement.img");
    let error = manager.attach(&layer(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.cause().message().contains("replaced"), "{error:?}");
    vm.alias("/images/0.img", "/images/0.img");
    old.release().await.unwrap();
    manager
        .attach(&layer(0))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    clean(&vm, &manager).await;
}

/// A mount of a device that others keep attached cannot be relied on by who attaches it here.
#[tokio::test(start_paused = true)]
async fn a_mount_that_keeps_no_attachment_is_not_shared_with_one_that_does() {
    let (vm, manager) = vm();
    let attachment = manager.attach(&layer(0)).await.unwrap();
    let device: DeviceLocator = attachment.locator().clone();
    let bare = manager.mounts().mount_device(&device, &ro()).await.unwrap();
    let error = manager.add(&layer(0), &ro()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    bare.release().await.unwrap();
    let mount = manager.add(&layer(0), &ro()).await.unwrap();
    // The other way round there is nothing to lose.
    let shared = manager.mounts().mount_device(&device, &ro()).await.unwrap();
    assert_eq!(mount.path(), shared.path());
    drop((attachment, mount, shared));
    clean(&vm, &manager).await;
}

#[tokio::test(start_paused = true)]
async fn i04_one_disk_has_one_set_of_options() {
    let (vm, manager) = vm();
    let direct = DiskOptions::default().direct_io(true);
    let held = manager
        .attach(&layer(0).with_options(direct.clone()))
        .await
        .unwrap();
    let same = manager
        .attach(&layer(0).with_options(direct))
        .await
        .unwrap();
    let others = [
        DiskOptions::default(),
        DiskOptions::default().direct_io(false),
        DiskOptions::default()
            .direct_io(true)
            .serial("abc")
            .unwrap(),
    ];
    for other in others {
        let error = manager
            .add(&layer(0).with_options(other), &ro())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.cause().message().contains("options"), "{error:?}");
    }
    assert_eq!(vm.calls(VmStep::Attach), 1);
    drop((held, same));
    clean(&vm, &manager).await;
}

#[test]
fn i04_a_backend_refuses_by_name_what_it_does_not_honour() {
    let one = std::num::NonZeroU64::MIN;
    let all = DiskOptions::default()
        .direct_io(false)
        .cache(CacheMode::Unsafe)
        .bytes_per_second(one)
        .operations_per_second(one)
        .queues(std::num::NonZeroU16::MIN)
        .discard(true)
        .sector_size(SectorSize::B4096)
        .serial("abc")
        .unwrap();
    let every: Vec<DiskOption> = all.set().collect();
    assert_eq!(every.len(), 8);
    all.require_only(&every).unwrap();
    DiskOptions::default().require_only(&[]).unwrap();
    for missing in &every {
        let honoured: Vec<_> = every.iter().copied().filter(|one| one != missing).collect();
        let error = all.require_only(&honoured).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
        assert!(
            error.message().contains(&format!("here: {missing};")),
            "{error}"
        );
    }
    let disk = layer(0).with_options(all);
    let text = serde_json::to_string(&disk).unwrap();
    assert_eq!(
        serde_json::from_str::<blockmount::Disk>(&text).unwrap(),
        disk
    );
    let plain = serde_json::to_value(layer(0)).unwrap();
    assert_eq!(plain.get("options"), None);
    for serial in ["", "a b", "tab\t", &"x".repeat(37)] {
        let refused = DiskOptions::default().serial(serial).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
    }
}

#[tokio::test(start_paused = true)]
async fn a_manager_says_what_it_was_built_without() {
    let vm = blockmount::testing::FakeVm::new();
    let other = blockmount::testing::FakeVm::new();
    let never_unplugs = blockmount::Manager::builder()
        .transport(other.clone())
        .mounter(other.clone())
        .build();
    let error = never_unplugs.add(&layer(9), &ro()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable);
    assert!(
        error.cause().message().contains("without an unplugger"),
        "{error:?}"
    );
    assert_eq!(other.calls(VmStep::Mount), 0);
    other.assert_empty();
    let attacher = blockmount::Manager::builder()
        .transport(vm.clone())
        .unplugger(vm.clone())
        .build();
    let error = attacher.add(&layer(0), &ro()).await.unwrap_err();
    assert!(
        error.cause().message().contains("without a mounter"),
        "{error:?}"
    );
    vm.gate_always(VmStep::Detach, Gate::Ok);
    clean(&vm, &attacher).await;
}
