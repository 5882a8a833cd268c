//! The calls of the service, on Windows.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::common::{Answer, Images, LONG, Model, SHORT, address, stand_in};
use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, ErrorKind, MountOptions, Mounter, Transport, Unplugger};
use blockmount_bridge::gcs::Hresult;
use blockmount_hcs::documents::PropertyQuery;
use blockmount_hcs::{
    ComputeSystem, GuestOs, HcsChannel, HcsError, HcsGuest, HcsSystem, ScsiAttacher,
    grant_vm_access, grant_vm_group_access,
};
use blockmount_scsi::testing::AttachIdentified as _;
use blockmount_scsi::{Attacher, ScsiTransport};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_each() {
    let model = Model::linux().await;
    let system = stand_in::open(&model, LONG).await;
    let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
    let geometry = attacher.geometry();
    let transport = ScsiTransport::new(attacher, geometry, &[address("0/0")]).unwrap();
    let channel = HcsChannel::open(system, GuestOs::Linux).await.unwrap();
    let guest = HcsGuest::new(channel);

    let images = Images::new();
    let disk = images.disk("layer.vhdx").read_only();
    let device = transport.attach_identified(&disk).await.unwrap();
    let target = Path::new("/run/layer");
    guest
        .mount(&device, target, &MountOptions::read_only())
        .await
        .unwrap();
    guest.unmount(target).await.unwrap();
    guest.unplug(&device).await.unwrap();
    transport.detach(&disk).await.unwrap();
    assert_eq!(model.documents().len(), 5);
    assert_eq!(model.left(), [""; 0]);
}

/// With one thread, the runtime only goes on if none of the calls blocks it.
#[tokio::test]
async fn a_call_that_takes_its_time_blocks_no_thread_of_the_runtime() {
    let model = Model::linux().await;
    let system = stand_in::open(&model, LONG).await;
    let attacher = Arc::new(ScsiAttacher::new(system, GuestOs::Linux));
    let images = Images::new();
    let disk = images.disk("a.vhdx");
    model.next(Answer::Wait);
    let attaching = tokio::spawn({
        let attacher = attacher.clone();
        async move { attacher.attach_identified(address("0/1"), &disk).await }
    });
    model.entered().await;
    assert!(!attaching.is_finished());
    model.proceed();
    attaching.await.unwrap().unwrap();
    attacher.detach(address("0/1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_that_never_ends_is_cancelled() {
    let model = Model::linux().await;
    let system = stand_in::open(&model, SHORT).await;
    let before = stand_in::cancelled();
    model.next_properties(Answer::Silent { happens: false });
    let began = Instant::now();
    let error = system
        .properties(&PropertyQuery::basic())
        .await
        .unwrap_err();
    assert_eq!(error, HcsError::TimedOut(SHORT));
    assert!(began.elapsed() >= SHORT, "it was waited for");
    assert!(stand_in::cancelled() > before);
    // Others are not touched by it.
    system.properties(&PropertyQuery::basic()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_started_is_an_error() {
    let model = Model::linux().await;
    let id = stand_in::serve(&model);
    let system = HcsSystem::open(&id).await.unwrap();
    let attacher = ScsiAttacher::new(system, GuestOs::Linux);
    for (result, kind) in [
        (Hresult::SYSTEM_ALREADY_STOPPED, ErrorKind::Gone),
        (Hresult::from_bits(0x8037_0110), ErrorKind::Gone),
        (Hresult::INVALID_HANDLE, ErrorKind::Gone),
        (Hresult::NOT_SUPPORTED, ErrorKind::Unsuitable),
        (Hresult::ACCESS_DENIED, ErrorKind::Other),
    ] {
        stand_in::refuse_start(&id, result);
        let error = attacher.detach(address("0/0")).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert_eq!(model.documents(), [""; 0]);
}

#[tokio::test]
async fn only_a_vm_that_is_there_is_opened() {
    let absent = HcsSystem::open("no such vm").await.unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::Gone, "{absent}");
    let nul = HcsSystem::open("a\0b").await.unwrap_err();
    assert_eq!(nul.kind(), ErrorKind::Invalid, "{nul}");
}

#[tokio::test]
async fn access_is_granted_to_the_file_behind_a_name_and_once() {
    let model = Model::linux().await;
    let vm = stand_in::serve(&model);
    let images = Images::new();
    let disk = images.disk("a \u{fc}.vhdx");
    std::fs::create_dir(images.path("sub")).unwrap();
    let dotted = images.path("sub").join("..").join("a \u{fc}.vhdx");
    for name in [disk.source(), disk.source(), &dotted] {
        grant_vm_access(&vm, name).await.unwrap();
        grant_vm_group_access(name).await.unwrap();
    }
    // Wine 8 only says that it makes links, and Windows makes them for those who may.
    let link = images.path("link.vhdx");
    let made = std::os::windows::fs::symlink_file(disk.source(), &link);
    if made.is_ok() && link.exists() {
        grant_vm_access(&vm, &link).await.unwrap();
        grant_vm_group_access(&link).await.unwrap();
    }
    let granted = |who: &str| {
        let grants = stand_in::grants().into_iter();
        let mut files = grants.filter(|(vm, _)| vm == who).map(|(_, file)| file);
        let file = files.next().unwrap();
        assert_eq!(files.next(), None, "one grant for one file");
        file
    };
    for file in [granted(&vm), granted("*")] {
        assert!(file.ends_with("\\a \u{fc}.vhdx"), "{file}");
        assert!(
            !file.contains("..") && file.as_bytes()[1..3] == *br":\",
            "{file}"
        );
    }
    let error = grant_vm_access(&vm, &images.path("none"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let error = grant_vm_access("a\0b", disk.source()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let error = grant_vm_group_access(Path::new("a\0b")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

#[tokio::test]
async fn a_file_is_one_disk_under_all_its_names() {
    let model = Model::linux().await;
    let attacher = ScsiAttacher::new(model, GuestOs::Linux);
    let images = Images::new();
    let disk = images.disk("Disk.vhdx");
    let id = attacher.identify(&disk).await.unwrap();
    for name in ["disk.VHDX", "sub\\..\\Disk.vhdx", "./Disk.vhdx"] {
        std::fs::create_dir_all(images.path("sub")).unwrap();
        let alias = Disk::virtual_disk(images.path(name));
        assert_eq!(attacher.identify(&alias).await.unwrap(), id, "{name}");
    }
    let other = attacher.identify(&images.disk("other.vhdx")).await.unwrap();
    assert_ne!(other, id);
}

/// What is attached has an absolute name, because the service has another working directory.
#[tokio::test]
async fn a_relative_name_is_made_absolute() {
    let model = Model::linux().await;
    let attacher = ScsiAttacher::new(model.clone(), GuestOs::Linux);
    let disk = Disk::virtual_disk("Cargo.toml");
    attacher
        .attach_identified(address("0/1"), &disk)
        .await
        .unwrap();
    let [document] = model.documents().try_into().unwrap();
    assert!(
        document.contains(r#":\\"#) && document.contains(r"\\Cargo.toml"),
        "{document}"
    );
}
