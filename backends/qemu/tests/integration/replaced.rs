//! A file that is replaced under its name: QEMU gets the one that was identified, or none.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::fs;
use std::path::PathBuf;

use crate::common::hook::hooked;
use crate::common::pmem::{MIB, Pmem};
use crate::common::{Qemu, address};
use blockmount::{Disk, ErrorKind};
use blockmount_qemu::qmp::{Deadlines, Qmp};
use blockmount_scsi::Attacher as _;
use blockmount_scsi::testing::AttachIdentified as _;
use blockmount_vpmem::Attacher as _;
use blockmount_vpmem::testing::AttachIdentified as _;
use serde_json::json;

/// An image, a second name of it, and another image to put in its place.
struct Images {
    image: PathBuf,
    kept: PathBuf,
    other: PathBuf,
}

impl Images {
    fn of(image: PathBuf, other: PathBuf) -> Self {
        let name = image.file_name().unwrap().to_str().unwrap();
        let kept = image.with_file_name(format!("kept-{name}"));
        fs::hard_link(&image, &kept).unwrap();
        Images { image, kept, other }
    }

    fn replace(&self) -> impl FnMut() + Send + 'static {
        let (image, other) = (self.image.clone(), self.other.clone());
        // Only the first time: later there is nothing to put in its place.
        move || drop(fs::rename(&other, &image))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_what_replaced_a_disk_since_it_was_identified_is_not_attached() {
    let mut qemu = Qemu::start(1);
    qemu.execute("cont", json!({}));
    let scsi = qemu.scsi().await;
    let before = qemu.tables();
    for name in ["a.img", "a.qcow2"] {
        let make = |name: &str| match name.ends_with(".qcow2") {
            true => qemu.qcow2(name, json!({})),
            false => qemu.image(name, MIB),
        };
        let (image, other) = (make(name), make(&format!("other-{name}")));
        let disk = Disk::virtual_disk(&image).read_only();
        let id = scsi.identify(&disk).await.unwrap();
        fs::rename(&other, &image).unwrap();
        let error = scsi.attach(address("0/0"), &disk, &id).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert_eq!((qemu.tables(), qemu.passed()), (before.clone(), vec![]));
        assert_eq!(qemu.opened(&image), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_qemu_uses_what_was_opened_whatever_is_at_its_path_by_then() {
    for name in ["a.img", "a.qcow2"] {
        let mut qemu = Qemu::start(1);
        qemu.execute("cont", json!({}));
        let make = |name: &str| match name.ends_with(".qcow2") {
            true => qemu.qcow2(name, json!({})),
            false => qemu.image(name, MIB),
        };
        let images = Images::of(make(name), make(&format!("other-{name}")));
        let stream = hooked(qemu.stream(), "blockdev-add", images.replace());
        let scsi = qemu.attacher(Qmp::connect(stream).await.unwrap());
        let before = qemu.tables();
        for disk in [
            Disk::virtual_disk(&images.image),
            Disk::virtual_disk(&images.kept).read_only(),
        ] {
            scsi.attach_identified(address("0/0"), &disk).await.unwrap();
            assert_eq!(
                (qemu.opened(&images.kept), qemu.opened(&images.image)),
                (1, 0)
            );
            // That of the disk itself is kept, and says which disk it is.
            let kept = Disk::virtual_disk(&images.kept);
            let id = scsi.identify(&kept).await.unwrap().to_string();
            let passed = qemu.passed();
            let shown = passed[0]["opaque"].as_str().unwrap();
            assert!(passed.len() == 1 && shown.ends_with(&id), "{passed:?}");
            scsi.detach(address("0/0")).await.unwrap();
            assert_eq!(qemu.tables(), before);
            assert_eq!(qemu.execute("query-fdsets", json!({})), json!([]));
            assert_eq!(qemu.opened(&images.kept), 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_a_backing_file_is_the_one_that_was_opened() {
    let mut qemu = Qemu::start(1);
    qemu.execute("cont", json!({}));
    let backing = Images::of(qemu.image("base", 4 * MIB), qemu.image("other", 4 * MIB));
    // It is named relative to the image.
    let image = json!({"backing-file": "base", "backing-fmt": "raw"});
    let image = qemu.qcow2("image.qcow2", image);
    let stream = hooked(qemu.stream(), "blockdev-add", backing.replace());
    let qmp = Qmp::connect(stream).await.unwrap();
    let scsi = qemu.attacher(qmp).allow_backing_files();
    let before = qemu.tables();
    let disk = Disk::virtual_disk(&image);
    scsi.attach_identified(address("0/0"), &disk).await.unwrap();
    assert_eq!(
        (qemu.opened(&backing.kept), qemu.opened(&backing.image)),
        (1, 0)
    );
    scsi.detach(address("0/0")).await.unwrap();
    assert_eq!(qemu.tables(), before);
    assert_eq!(qemu.execute("query-fdsets", json!({})), json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_a_refused_attachment_leaves_no_descriptor_in_qemu() {
    let mut qemu = Qemu::start(1);
    qemu.execute("cont", json!({}));
    let scsi = qemu.scsi().await;
    let disk = Disk::virtual_disk(qemu.image("a", MIB));
    // The node has a name that is taken, and then the device a LUN that is.
    let taken = json!({"driver": "null-co", "node-name": "bm-scsi-0-3", "read-zeroes": true});
    qemu.execute("blockdev-add", taken);
    scsi.attach_identified(address("0/3"), &disk)
        .await
        .unwrap_err();
    assert_eq!(qemu.execute("query-fdsets", json!({})), json!([]));
    let other = json!({
        "driver": "scsi-hd", "id": "other", "drive": "bm-scsi-0-3",
        "bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": 4,
    });
    qemu.execute("device_add", other);
    scsi.attach_identified(address("0/4"), &disk)
        .await
        .unwrap_err();
    assert_eq!(qemu.execute("query-fdsets", json!({})), json!([]));
    assert_eq!(qemu.opened(disk.source()), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_over_a_connection_without_descriptors_a_replaced_path_is_noticed() {
    let mut qemu = Qemu::start(1);
    let images = Images::of(qemu.image("a", MIB), qemu.image("other", MIB));
    let stream = hooked(qemu.stream(), "blockdev-add", images.replace());
    let (reader, writer) = stream.into_split();
    let qmp = Qmp::connect(tokio::io::join(reader, writer)).await.unwrap();
    let scsi = qemu.attacher(qmp);
    let before = qemu.tables();
    let disk = Disk::virtual_disk(&images.image);
    let error = scsi
        .attach_identified(address("0/0"), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(qemu.tables(), before);
    assert_eq!(qemu.opened(&images.image), 0);
    scsi.attach_identified(address("0/0"), &disk).await.unwrap();
    assert_eq!(qemu.opened(&images.image), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x02_memory_is_of_the_file_that_was_opened() {
    for with_descriptors in [true, false] {
        let mut pmem = Pmem::start(1);
        pmem.qemu.execute("cont", json!({}));
        let disk = pmem.disk("a", 7, 2 * MIB);
        pmem.disk("other", 9, 2 * MIB);
        let images = Images::of(pmem.path("a"), pmem.path("other"));
        let before = pmem.guest.tables();
        let stream = hooked(pmem.qemu.stream(), "object-add", images.replace());
        let qmp = match with_descriptors {
            true => Qmp::connect_with(stream, Deadlines::default()).await,
            false => {
                let (reader, writer) = stream.into_split();
                Qmp::connect(tokio::io::join(reader, writer)).await
            }
        };
        let vpmem = pmem.virtio_over(qmp.unwrap());
        let at: blockmount_vpmem::DeviceNumber = 0_u64.try_into().unwrap();
        let attached = vpmem.attach_identified(at, &disk).await;
        if with_descriptors {
            attached.unwrap();
            assert_eq!(pmem.guest.read(0, 0, 16), [7; 16]);
            pmem.guest.eject(0);
            vpmem.detach(at).await.unwrap();
            assert_eq!(pmem.qemu.execute("query-fdsets", json!({})), json!([]));
        } else {
            let error = attached.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        }
        assert_eq!(pmem.guest.tables(), before);
        assert_eq!(pmem.files_left(), 0);
    }
}
