//! What the service does not know: its answers in doubt, places that are taken or empty, and VMs that are gone.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use blockmount_scsi::testing::AttachIdentified as _;
use blockmount_vpmem::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::{Answer, Images, Model, Reply, SHORT, WAYS, address};
use blockmount::placement::SlotUse;
use blockmount::{Disk, ErrorKind, Presence, Transport};
use blockmount_bridge::gcs::Hresult;
use blockmount_hcs::{ComputeSystem, GuestOs, ScsiAttacher, VpmemAttacher};
use blockmount_scsi::{Attacher as _, Geometry, ScsiTransport};
use blockmount_vpmem::{Attacher as _, ByteRange, DeviceNumber, Mode, VpmemTransport};

type Scsi = ScsiTransport<ScsiAttacher<Arc<dyn ComputeSystem>>>;

fn transport(system: Arc<dyn ComputeSystem>, luns: u16) -> Scsi {
    let attacher = ScsiAttacher::new(system, GuestOs::Linux);
    ScsiTransport::new(attacher, Geometry::new(1, luns).unwrap(), &[]).unwrap()
}

fn states(scsi: &Scsi) -> Vec<SlotUse> {
    scsi.slot_map()
        .into_iter()
        .map(|entry| entry.usage)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o15_a_time_out_quarantines_the_slot_and_a_detach_frees_it() {
    for happens in [false, true] {
        let model = Model::linux().await;
        for system in model.ways_within(SHORT).await {
            let scsi = transport(system, 1);
            let images = Images::new();
            let (disk, other) = (images.disk("a.vhdx"), images.disk("b.vhdx"));
            model.next(Answer::Silent { happens });
            let error = scsi.attach_identified(&disk).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
            assert_eq!(states(&scsi), [SlotUse::Quarantined]);
            assert_eq!(model.left().is_empty(), !happens);
            let full = scsi.attach_identified(&other).await.unwrap_err();
            assert_eq!(full.kind(), ErrorKind::Full);

            let asked = model.asked();
            scsi.detach(&disk).await.unwrap();
            assert_eq!(model.asked(), asked + 1, "whether the VM lives is asked");
            assert_eq!(states(&scsi), []);
            assert_eq!(model.left(), [""; 0]);
            scsi.attach_identified(&other).await.unwrap();
            let asked = model.asked();
            scsi.detach(&other).await.unwrap();
            assert_eq!(model.asked(), asked, "nothing is in doubt any more");
        }
    }
}

/// The service does what it was no longer asked to, when the place counts as empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o15_a_disk_that_comes_late_is_taken_out_and_wedges_nothing() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let scsi = transport(system, 1);
        let images = Images::new();
        let (late, disk) = (images.disk("late.vhdx"), images.disk("b.vhdx"));
        model.next(Answer::Silent { happens: false });
        scsi.attach_identified(&late).await.unwrap_err();
        let [document] = model.documents().try_into().unwrap();
        scsi.detach(&late).await.unwrap();
        assert_eq!(states(&scsi), []);
        assert!(matches!(model.receive(&document).await, Reply::Done));

        let error = scsi.attach_identified(&disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
        scsi.detach(&disk).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
        scsi.attach_identified(&disk).await.unwrap();
        scsi.detach(&disk).await.unwrap();
        model.documents();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detachment_in_doubt_is_repeated() {
    for happens in [false, true] {
        let model = Model::linux().await;
        for system in model.ways_within(SHORT).await {
            let scsi = transport(system, 1);
            let images = Images::new();
            let disk = images.disk("a.vhdx");
            scsi.attach_identified(&disk).await.unwrap();
            model.next(Answer::Silent { happens });
            let error = scsi.detach(&disk).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
            assert_eq!(states(&scsi), [SlotUse::Quarantined]);
            scsi.detach(&disk).await.unwrap();
            assert_eq!(states(&scsi), []);
            assert_eq!(model.left(), [""; 0]);
        }
    }
}

/// A VM that hangs does not cost a long deadline for each of its disks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g11_a_vm_that_does_not_answer_is_sent_nothing_more() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let scsi = transport(system, 1);
        let images = Images::new();
        let disk = images.disk("a.vhdx");
        // The first attach also asks whether the VM lives.
        scsi.attach_identified(&disk).await.unwrap();
        scsi.detach(&disk).await.unwrap();
        model.next(Answer::Silent { happens: true });
        model.next_properties(Answer::Silent { happens: false });
        scsi.attach_identified(&disk).await.unwrap_err();
        model.documents();
        for silent in [
            Answer::Silent { happens: false },
            Answer::Fail(Hresult::SERVICE_DISCONNECT),
        ] {
            model.next_properties(silent);
            let error = scsi.detach(&disk).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
        }
        assert_eq!(model.documents(), [""; 0]);
        // It has come back.
        scsi.detach(&disk).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_in_doubt_are_uncertain_while_the_vm_lives() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let scsi = transport(system, 1);
        let images = Images::new();
        let disk = images.disk("a.vhdx");
        for number in [
            Hresult::TIMEOUT,
            Hresult::OPERATION_TIMEOUT,
            Hresult::CONNECT_FAILED,
            Hresult::CONNECTION_CLOSED,
            Hresult::SERVICE_DISCONNECT,
            Hresult::from_bits(0x8037_0118),
        ] {
            model.next(Answer::DoneButFails(number));
            let error = scsi.attach_identified(&disk).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
            scsi.detach(&disk).await.unwrap();
            assert_eq!(model.left(), [""; 0]);
        }
        // It is paused: nothing has happened, and it may work later.
        model.next(Answer::Fail(Hresult::INVALID_STATE));
        let error = scsi.attach_identified(&disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert_eq!(states(&scsi), []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_become_kinds() {
    use ErrorKind::{Busy, Gone, Invalid, NotFound, Other, Unsuitable};
    let model = Model::linux().await;
    for system in model.ways().await {
        let scsi = transport(system, 1);
        let images = Images::new();
        let disk = images.disk("a.vhdx");
        for (bits, kind) in [
            (0x8007_0002, NotFound),
            (0x8007_0003, NotFound),
            (0x8007_0005, Other),
            (0x8007_000d, Invalid),
            (0x8007_0020, Busy),
            (0x8007_0032, Unsuitable),
            (0x8007_0057, Invalid),
            (0x8007_00aa, Busy),
            (0x8000_4001, Unsuitable),
            (0x8000_4005, Other),
            (0x8037_010d, Invalid),
            (0xc037_010d, Invalid),
            // The VM is no more.
            (0x8007_0006, Gone),
            (0x8037_0106, Gone),
            (0x8037_0107, Gone),
            (0x8037_010e, Gone),
            (0xc037_010e, Gone),
            (0x8037_0110, Gone),
            (0xc037_0110, Gone),
        ] {
            model.next(Answer::Fail(Hresult::from_bits(bits)));
            let error = scsi.attach_identified(&disk).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{bits:#x}: {error}");
            assert_eq!(states(&scsi), [], "{bits:#x}: nothing is there");
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(
                cause.contains("as told") && cause.contains(&format!("{bits:#010x}")),
                "{cause}"
            );
            assert!(!error.to_string().contains("as told"), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_a_disk_that_others_have_attached_stays_and_its_address_is_left_out() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let images = Images::new();
        let (foreign, disks) = (
            images.disk("foreign.vhdx"),
            [images.disk("a.vhdx"), images.disk("b.vhdx")],
        );
        let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
        attacher
            .attach_identified(address("0/0"), &foreign)
            .await
            .unwrap();
        let before = model.left();
        // This transport was not told of it.
        let scsi = transport(system.clone(), 2);
        let locator = scsi.attach_identified(&disks[0]).await.unwrap();
        assert_eq!(locator.as_str(), "scsi:0/1");
        let error = scsi.attach_identified(&disks[1]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        assert!(error.to_string().contains("1 foreign"), "{error}");
        assert_eq!(states(&scsi), [SlotUse::Foreign, SlotUse::Occupied]);
        for disk in &disks {
            scsi.detach(disk).await.unwrap();
        }
        assert_eq!(model.left(), before);
        attacher.detach(address("0/0")).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_what_a_journal_remembers_is_in_doubt_until_it_is_detached() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let images = Images::new();
        let disk = images.disk("a.vhdx");
        let earlier = transport(system.clone(), 2);
        let locator = earlier.attach_identified(&disk).await.unwrap();
        let before = model.left();
        let scsi = transport(system, 2);
        let id = scsi.identify(&disk).await.unwrap();
        let found = scsi.adopt(&disk, &id, Some(&locator)).await.unwrap();
        assert_eq!(found, Presence::Unknown);
        assert_eq!(states(&scsi), [SlotUse::Quarantined]);
        // Adopting has changed nothing, and another disk goes elsewhere.
        assert_eq!(model.left(), before);
        let other = images.disk("b.vhdx");
        let elsewhere = scsi.attach_identified(&other).await.unwrap();
        assert_ne!(elsewhere, locator);
        scsi.detach(&other).await.unwrap();
        scsi.detach(&disk).await.unwrap();
        assert_eq!((states(&scsi), model.left().len()), (vec![], 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_of_a_vm_that_has_ended_nothing_is_adopted() {
    for way in 0..WAYS {
        let model = Model::linux().await;
        let system = model.ways().await.swap_remove(way);
        let images = Images::new();
        let (disk, layer) = (images.disk("a.vhdx"), images.disk("a.vhd").read_only());
        let locator = transport(system.clone(), 2)
            .attach_identified(&disk)
            .await
            .unwrap();
        let scsi = transport(system.clone(), 2);
        let attacher = VpmemAttacher::new(system, GuestOs::Linux);
        let geometry = blockmount_vpmem::Geometry::default();
        let vpmem = VpmemTransport::new(attacher, geometry, Mode::Packed, &[]).unwrap();
        model.end();
        let id = scsi.identify(&disk).await.unwrap();
        let found = scsi.adopt(&disk, &id, Some(&locator)).await.unwrap();
        assert_eq!((found, states(&scsi)), (Presence::Absent, vec![]));
        let id = vpmem.identify(&layer).await.unwrap();
        let range = "vpmem:1@0+4096".parse().unwrap();
        let found = vpmem.adopt(&layer, &id, Some(&range)).await.unwrap();
        assert_eq!((found, vpmem.slot_map()), (Presence::Absent, vec![]));
        assert_eq!(
            vpmem.adopt(&layer, &id, None).await.unwrap(),
            Presence::Absent
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_place_is_empty_already() {
    let model = Model::linux().await;
    for system in model.ways().await {
        let scsi = ScsiAttacher::new(system.clone(), GuestOs::Linux);
        scsi.detach(address("3/63")).await.unwrap();
        let vpmem = VpmemAttacher::new(system, GuestOs::Linux);
        let (device, range) = (
            DeviceNumber::try_from(127).unwrap(),
            ByteRange::new(0, 4096).unwrap(),
        );
        vpmem.detach(device).await.unwrap();
        vpmem.unmap(device, range).await.unwrap();
        assert_eq!(
            model.documents().len(),
            3,
            "the service was asked each time"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_has_ended_is_gone_and_so_are_its_disks() {
    for (way, in_silence) in (0..WAYS).flat_map(|way| [(way, false), (way, true)]) {
        let model = Model::linux().await;
        let scsi = transport(model.ways_within(SHORT).await.swap_remove(way), 2);
        let images = Images::new();
        let (kept, lost) = (images.disk("a.vhdx"), images.disk("b.vhdx"));
        scsi.attach_identified(&kept).await.unwrap();
        if in_silence {
            model.next(Answer::Silent { happens: false });
            model.end_when_asked();
        } else {
            model.end();
        }
        let error = scsi.attach_identified(&lost).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        let error = scsi.detach(&kept).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert_eq!(states(&scsi), []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vpmem_attaches_maps_and_takes_out() {
    let model = Model::linux().await;
    for system in model.ways_within(SHORT).await {
        let images = Images::new();
        let vpmem = VpmemAttacher::new(system.clone(), GuestOs::Linux);
        let number = |number: u64| DeviceNumber::try_from(number).unwrap();
        let disk = images.disk("layer.vhd").read_only();
        assert_eq!(vpmem.size(&disk).await.unwrap(), 9);
        vpmem.attach_identified(number(0), &disk).await.unwrap();
        let [first, second] = [0, 1 << 20].map(|offset| ByteRange::new(offset, 4096).unwrap());
        let (a, b) = (
            images.disk("a.vhd").read_only(),
            images.disk("b.vhd").read_only(),
        );
        vpmem.map_identified(number(1), first, &a).await.unwrap();
        model.next(Answer::Silent { happens: true });
        let error = vpmem
            .map_identified(number(1), second, &b)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain);
        // device 0, two mappings, and what the fake VM has of them.
        assert_eq!(model.left().len(), 6);
        vpmem.unmap(number(1), second).await.unwrap();
        vpmem.unmap(number(1), first).await.unwrap();
        vpmem.detach(number(0)).await.unwrap();
        assert_eq!(model.left(), [""; 0]);
        model.documents();

        let vhdx = images.disk("c.VHDX").read_only();
        vpmem.attach_identified(number(0), &vhdx).await.unwrap();
        assert!(model.documents()[0].contains(r#""ImageFormat":"Vhdx""#));
        vpmem.detach(number(0)).await.unwrap();
        model.documents();
        let windows = VpmemAttacher::new(system, GuestOs::Windows);
        let physical = Disk::physical_disk(images.path("c.VHDX")).read_only();
        let refused = [
            vpmem.map_identified(number(0), first, &vhdx).await,
            vpmem
                .attach_identified(number(0), &images.disk("rw.vhd"))
                .await,
            vpmem.attach_identified(number(0), &physical).await,
            vpmem
                .attach_identified(number(0), &Disk::extensible("p", "x").read_only())
                .await,
            vpmem.size(&images.disk("rw.vhd")).await.map(drop),
            windows.attach_identified(number(0), &disk).await,
            windows.map_identified(number(0), first, &disk).await,
        ];
        for outcome in refused {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unsuitable);
        }
        std::fs::write(images.path("empty.vhd"), "").unwrap();
        let empty = Disk::virtual_disk(images.path("empty.vhd")).read_only();
        assert_eq!(
            vpmem.size(&empty).await.unwrap_err().kind(),
            ErrorKind::Invalid
        );
        let missing = Disk::virtual_disk(images.path("none.vhd")).read_only();
        assert_eq!(
            vpmem.size(&missing).await.unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(
            vpmem.identify(&missing).await.unwrap_err().kind(),
            ErrorKind::NotFound
        );
        let error = vpmem
            .attach_identified(number(0), &missing)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_eq!(model.documents(), [""; 0], "all were refused before");

        // The file is removed between the attacher's look at it and the service's.
        model.next(Answer::Fail(Hresult::FILE_NOT_FOUND));
        let error = vpmem.attach_identified(number(0), &disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_eq!(model.documents().len(), 1);
    }
}
