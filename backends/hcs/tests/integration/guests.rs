//! Guests that the service is connected to, of Linux and of Windows.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use blockmount_scsi::testing::AttachIdentified as _;
use std::path::Path;
use std::sync::Arc;

use crate::common::{Answer, Images, Model, SHORT, WAYS, address};
use blockmount::{
    Disk, ErrorKind, Format, LayerCombiner, Manager, MountOptions, MountRequest, Mounter, Overlay,
    Transport, Unplugger,
};
use blockmount_bridge::gcs::Hresult;
use blockmount_hcs::{ComputeSystem, GuestOs, HcsChannel, HcsGuest, ScsiAttacher};
use blockmount_scsi::{Geometry, HYPER_V_CONTROLLERS, ScsiTransport};

async fn guest(system: &Arc<dyn ComputeSystem>, os: GuestOs) -> HcsGuest<Arc<dyn ComputeSystem>> {
    HcsGuest::new(HcsChannel::open(system.clone(), os).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_guests_mount_by_path_and_lun() {
    let model = Model::new(GuestOs::Windows).await;
    for system in model.ways().await {
        let guest = guest(&system, GuestOs::Windows).await;
        let refs = Format::new("ReFS").overwriting_everything();
        let scratch = MountOptions::builder().format(refs).build().unwrap();
        let (m0, m1) = (
            Path::new(r"c:\mounts\scsi\m0"),
            Path::new(r"c:\mounts\scsi\m1"),
        );
        guest
            .mount(&"scsi:0/1".parse().unwrap(), m0, &MountOptions::default())
            .await
            .unwrap();
        guest
            .mount(&"scsi:0/2".parse().unwrap(), m1, &scratch)
            .await
            .unwrap();
        assert_eq!(model.left().len(), 2);
        guest.unmount(m1).await.unwrap();
        guest.unmount(m0).await.unwrap();
        // Windows notices by itself.
        guest.unplug(&"scsi:0/1".parse().unwrap()).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
        assert_eq!(
            model.documents(),
            [
                r#"{"GuestRequest":{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":1}}}"#,
                r#"{"GuestRequest":{"RequestType":"Add","ResourceType":"MappedVirtualDiskForContainerScratch","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m1","Lun":2}}}"#,
                r#"{"GuestRequest":{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m1","Lun":2}}}"#,
                r#"{"GuestRequest":{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":1}}}"#,
            ]
        );

        let overlay = Overlay::new([m0], m1);
        let refused = [
            guest
                .mount(&"scsi:1/0".parse().unwrap(), m0, &MountOptions::default())
                .await,
            guest
                .mount(&"vpmem:0".parse().unwrap(), m0, &MountOptions::read_only())
                .await,
            guest.combine(&overlay).await,
        ];
        for outcome in refused {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unsuitable);
        }
        assert_eq!(model.documents(), [""; 0]);
    }
}

/// A disk where the guest could not mount it is refused before it is attached; the transport does not choose such a place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_guests_use_controller_0_only() {
    let model = Model::new(GuestOs::Windows).await;
    for system in model.ways().await {
        let images = Images::new();
        let attacher = ScsiAttacher::new(system.clone(), GuestOs::Windows);
        assert_eq!(attacher.geometry(), Geometry::new(1, 64).unwrap());
        for at in ["1/0", "3/63", "0/64", "4/0"] {
            let error = attacher
                .attach_identified(address(at), &images.disk("a.vhdx"))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
        }
        assert_eq!(model.documents(), [""; 0]);

        let geometry = attacher.geometry();
        let scsi = ScsiTransport::new(attacher, geometry, &[address("0/0")]).unwrap();
        let disks = images.disks(64);
        for (disk, lun) in disks[..63].iter().zip(1..) {
            assert_eq!(
                scsi.attach_identified(disk).await.unwrap().as_str(),
                format!("scsi:0/{lun}")
            );
        }
        assert_eq!(
            scsi.attach_identified(&disks[63]).await.unwrap_err().kind(),
            ErrorKind::Full
        );
        assert_eq!(model.documents().len(), 63);
        for disk in &disks {
            scsi.detach(disk).await.unwrap();
        }
        model.documents();

        // Told of more controllers than the guest can use, it attaches nothing there.
        let attacher = ScsiAttacher::new(system.clone(), GuestOs::Windows);
        let scsi = ScsiTransport::new(attacher, Geometry::HYPER_V, &[address("0/0")]).unwrap();
        let mut refused = 0;
        for disk in &disks[..8] {
            if let Err(error) = scsi.attach_identified(disk).await {
                assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
                refused += 1;
            }
        }
        assert!((1..8).contains(&refused), "{refused} of 8");
        let documents = model.documents();
        assert_eq!(documents.len(), 8 - refused, "{documents:?}");
        let at_0 = |document: &String| document.contains(HYPER_V_CONTROLLERS[0]);
        assert!(documents.iter().all(at_0), "{documents:?}");
        for disk in &disks {
            scsi.detach(disk).await.unwrap();
        }
        model.documents();
        assert_eq!(model.left(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_mounts_in_a_windows_guest() {
    let model = Model::new(GuestOs::Windows).await;
    for system in model.ways().await {
        let images = Images::new();
        let guest = guest(&system, GuestOs::Windows).await;
        let attacher = ScsiAttacher::new(system, GuestOs::Windows);
        let geometry = attacher.geometry();
        let manager = Manager::builder()
            .transport(ScsiTransport::new(attacher, geometry, &[address("0/0")]).unwrap())
            .unplugger(guest.clone())
            .mounter(guest)
            .build();
        let request = MountRequest::new(MountOptions::default()).at(r"C:\mounts\data");
        let mount = manager
            .add(&images.disk("data.vhdx"), &request)
            .await
            .unwrap();
        assert_eq!(mount.locator().as_str(), "scsi:0/1");
        assert_eq!(model.left().len(), 3, "{:?}", model.left());
        mount.release().await.unwrap();
        assert_eq!(model.left(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_guest_that_is_connected_can_be_asked() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let error = HcsChannel::open(system.clone(), GuestOs::Windows)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        model.next_properties(Answer::Fail(Hresult::SYSTEM_NOT_FOUND));
        let error = HcsChannel::open(system.clone(), GuestOs::Linux)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        model.next_properties(Answer::Silent { happens: false });
        let error = HcsChannel::open(system.clone(), GuestOs::Linux)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Other, "{error}");
    }
    let alone = Model::without_agent();
    for system in alone.ways().await {
        let error = HcsChannel::open(system, GuestOs::Linux).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    }
    model.end();
    for system in model.ways().await {
        let error = HcsChannel::open(system, GuestOs::Linux).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
}

/// A guest that only says that something failed may have left half of it behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_say_what_is_left_is_uncertain() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let images = Images::new();
        let guest = guest(&system, GuestOs::Linux).await;
        let attacher = ScsiAttacher::new(system, GuestOs::Linux);
        let scsi = ScsiTransport::new(attacher, Geometry::HYPER_V, &[]).unwrap();
        let disk = images.disk("a.vhdx");
        let device = scsi.attach_identified(&disk).await.unwrap();
        let (target, options) = (Path::new("/run/a"), MountOptions::read_only());
        for answer in [
            Answer::DoneButFails(Hresult::FAIL),
            Answer::DoneButFails(Hresult::CONNECTION_CLOSED),
            Answer::Silent { happens: true },
            Answer::Silent { happens: false },
        ] {
            model.next(answer);
            let error = guest.mount(&device, target, &options).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
            guest.unmount(target).await.unwrap();
        }
        // But one that says why has done nothing.
        model.next(Answer::Fail(Hresult::BUSY));
        let error = guest.mount(&device, target, &options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        guest.mount(&device, target, &options).await.unwrap();
        model.next(Answer::Fail(Hresult::FAIL));
        let error = guest.unmount(target).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Other, "{error}");
        guest.unmount(target).await.unwrap();
        guest.unplug(&device).await.unwrap();
        scsi.detach(&disk).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
    }
}

/// The VM ends while its disk is mounted: all of it counts as released.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_vm_had_is_released_with_it() {
    for way in 0..WAYS {
        let model = Model::linux().await;
        let system = model.ways().await.swap_remove(way);
        let images = Images::new();
        let guest = guest(&system, GuestOs::Linux).await;
        let attacher = ScsiAttacher::new(system, GuestOs::Linux);
        let manager = Manager::builder()
            .transport(ScsiTransport::new(attacher, Geometry::HYPER_V, &[]).unwrap())
            .unplugger(guest.clone())
            .mounter(guest)
            .build();
        let request = MountRequest::new(MountOptions::read_only());
        let disk: Disk = images.disk("a.vhdx").read_only();
        let mount = manager.add(&disk, &request).await.unwrap();
        model.end();
        mount.release().await.unwrap();
        assert!(manager.drain().await.is_clean());
    }
}
