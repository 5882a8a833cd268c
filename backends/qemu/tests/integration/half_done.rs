//! Another client has attached or detached half of a disk: a detachment goes on from there, an attachment is refused.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use crate::common::{Qemu, SHORT_DEADLINES, address};
use blockmount::{Disk, ErrorKind};
use blockmount_scsi::Attacher;
use blockmount_scsi::testing::AttachIdentified as _;
use serde_json::{Value, json};

fn id() -> Value {
    json!({"id": "bm-scsi-0-3"})
}

fn node() -> Value {
    json!({"node-name": "bm-scsi-0-3"})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detachment_goes_on_from_every_half_of_the_way() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let scsi = qemu.scsi().await;
    let (at, disk) = (address("0/3"), Disk::virtual_disk(qemu.image("a", 4096)));

    // Never attached.
    scsi.detach(at).await.unwrap();

    // Somebody has begun to take the device out, and it is not all out yet.
    scsi.attach_identified(at, &disk).await.unwrap();
    qemu.execute("device_del", id());
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);

    // The device is out.
    scsi.attach_identified(at, &disk).await.unwrap();
    {
        let mut monitor = qemu.monitor.lock().unwrap();
        monitor.done("device_del", id());
        monitor.until("DEVICE_DELETED", |data| data["device"] == "bm-scsi-0-3");
    }
    assert_eq!(scsi.left().await.unwrap().len(), 2);
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);

    // The node is out as well.
    scsi.attach_identified(at, &disk).await.unwrap();
    {
        let mut monitor = qemu.monitor.lock().unwrap();
        monitor.done("device_del", id());
        monitor.until("DEVICE_DELETED", |data| data["device"] == "bm-scsi-0-3");
        monitor.done("blockdev-del", node());
    }
    scsi.detach(at).await.unwrap();
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_with_another_user_in_qemu_is_busy_until_that_has_gone() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let scsi = qemu.scsi_with(SHORT_DEADLINES).await;
    let (at, disk) = (address("0/3"), Disk::virtual_disk(qemu.image("a", 4096)));
    scsi.attach_identified(at, &disk).await.unwrap();
    let over_it =
        json!({"driver": "raw", "node-name": "over", "file": "bm-scsi-0-3", "read-only": true});
    qemu.execute("blockdev-add", over_it);
    for _ in 0..2 {
        let error = scsi.detach(at).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    qemu.execute("blockdev-del", json!({"node-name": "over"}));
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_what_others_have_put_at_an_address_is_a_conflict() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let scsi = qemu.scsi().await;
    let (at, disk) = (address("0/3"), Disk::virtual_disk(qemu.image("a", 4096)));
    let left = qemu.image("left", 4096);
    let left = json!({"driver": "file", "node-name": "bm-scsi-0-3", "filename": left});
    qemu.execute("blockdev-add", left);
    let error = scsi.attach_identified(at, &disk).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    scsi.detach(at).await.unwrap();
    scsi.attach_identified(at, &disk).await.unwrap();

    // Also where all of it is left.
    let error = scsi.attach_identified(at, &disk).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_device_takes_its_image_with_it() {
    let mut qemu = Qemu::start(1);
    let scsi = qemu.scsi().await;
    let disk = Disk::virtual_disk(qemu.image("a", 4096));
    let other = qemu.image("other", 4096);
    qemu.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": "other", "filename": other}),
    );
    qemu.execute(
        "device_add",
        json!({
            "driver": "scsi-hd", "id": "other", "drive": "other",
            "bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": 3,
        }),
    );
    let before = qemu.tables();
    let error = scsi
        .attach_identified(address("0/3"), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(
        error.to_string(),
        "cannot attach a disk at SCSI address 0/3: something that is not ours is there"
    );
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("lun already used by 'other'"), "{cause}");
    assert_eq!(qemu.tables(), before);
    // What is not ours is not taken out.
    scsi.detach(address("0/3")).await.unwrap();
    assert_eq!(qemu.tables(), before);
    scsi.attach_identified(address("0/4"), &disk).await.unwrap();
}
