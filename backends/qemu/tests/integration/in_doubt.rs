//! A QEMU that does not answer, or whose answers are lost: what is known is said, the rest is `Uncertain`.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use blockmount_scsi::testing::AttachIdentified as _;
use std::sync::Arc;

use crate::common::lossy::{Loss, Next, lossy};
use crate::common::{LONG, Qemu, SHORT_DEADLINES, address};
use blockmount::{BackendError, Disk, ErrorKind, Transport};
use blockmount_qemu::QemuScsi;
use blockmount_qemu::qmp::Qmp;
use blockmount_scsi::{Attacher, Geometry, ScsiTransport};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

async fn with_losses(qemu: &mut Qemu) -> (QemuScsi, Next) {
    let (stream, next) = lossy(qemu.stream());
    let qmp = Qmp::connect_with(stream, SHORT_DEADLINES).await.unwrap();
    (qemu.attacher(qmp), next)
}

/// As `Ok` or the kind.
fn kind(outcome: Result<(), BackendError>) -> Result<(), ErrorKind> {
    outcome.map_err(|error| error.kind())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attachment_whose_answer_is_lost_is_done_or_undone() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let (scsi, next) = with_losses(&mut qemu).await;
    let (at, disk) = (address("0/3"), Disk::virtual_disk(qemu.image("a", 4096)));

    *next.lock().unwrap() = Some(Loss::Answer("blockdev-add"));
    let outcome = scsi.attach_identified(at, &disk).await;
    assert_eq!(kind(outcome), Err(ErrorKind::Other));
    assert_eq!(qemu.tables(), before);

    *next.lock().unwrap() = Some(Loss::Answer("device_add"));
    scsi.attach_identified(at, &disk).await.unwrap();
    let expected = [
        "device bm-scsi-0-3",
        "node bm-scsi-0-3",
        "node bm-scsi-0-3-file",
    ];
    assert_eq!(scsi.left().await.unwrap(), expected);
    assert_eq!(*next.lock().unwrap(), None);
    scsi.detach(at).await.unwrap();
    assert_eq!(qemu.tables(), before);

    // The refusal is lost as well: that nothing is there is all that must be known.
    qemu.execute("blockdev-add", other_node(&qemu));
    qemu.execute("device_add", other_device(3));
    let with_other = qemu.tables();
    *next.lock().unwrap() = Some(Loss::Answer("device_add"));
    let outcome = scsi.attach_identified(at, &disk).await;
    assert_eq!(kind(outcome), Err(ErrorKind::Other));
    assert_eq!(qemu.tables(), with_other);
}

fn other_node(qemu: &Qemu) -> serde_json::Value {
    let image = qemu.image("other", 4096);
    serde_json::json!({"driver": "file", "node-name": "other", "filename": image})
}

fn other_device(lun: u16) -> serde_json::Value {
    serde_json::json!({
        "driver": "scsi-hd", "id": "other", "drive": "other", "bus": "scsi0.0", "channel": 0, "scsi-id": 0, "lun": lun,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attachment_that_nobody_answers_for_is_uncertain_and_can_be_detached() {
    for from in ["blockdev-add", "device_add"] {
        let mut qemu = Qemu::start(1);
        let before = qemu.tables();
        let (scsi, next) = with_losses(&mut qemu).await;
        let (at, disk) = (address("0/3"), Disk::virtual_disk(qemu.image("a", 4096)));
        *next.lock().unwrap() = Some(Loss::AnswersFrom(from));
        let outcome = scsi.attach_identified(at, &disk).await;
        assert_eq!(kind(outcome), Err(ErrorKind::Uncertain), "{from}");
        let outcome = scsi.detach(at).await;
        assert_eq!(kind(outcome), Err(ErrorKind::Uncertain), "{from}");
        *next.lock().unwrap() = None;
        scsi.detach(at).await.unwrap();
        assert_eq!(qemu.tables(), before);
        scsi.attach_identified(at, &disk).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detachment_whose_answer_is_lost_goes_on_where_it_was() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let (scsi, next) = with_losses(&mut qemu).await;
    let (at, disk) = (address("0/0"), Disk::virtual_disk(qemu.image("a", 4096)));
    for (loss, expected) in [
        (Loss::Answer("device_del"), Err(ErrorKind::Uncertain)),
        (Loss::Event("DEVICE_DELETED"), Ok(())),
        (Loss::Answer("blockdev-del"), Err(ErrorKind::Uncertain)),
        (Loss::AnswersFrom("blockdev-del"), Err(ErrorKind::Uncertain)),
    ] {
        scsi.attach_identified(at, &disk).await.unwrap();
        *next.lock().unwrap() = Some(loss);
        let outcome = scsi.detach(at).await;
        assert_eq!(kind(outcome), expected, "{loss:?}");
        *next.lock().unwrap() = None;
        scsi.detach(at).await.unwrap();
        assert_eq!(qemu.tables(), before, "{loss:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o15_a_stopped_qemu_leaves_slots_in_doubt_until_it_goes_on() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let attacher = qemu.scsi_with(SHORT_DEADLINES).await;
    let scsi = ScsiTransport::new(attacher, Geometry::new(1, 2).unwrap(), &[]).unwrap();
    let [first, second, third] =
        ["a", "b", "c"].map(|name| Disk::virtual_disk(qemu.image(name, 4096)));
    scsi.attach_identified(&first).await.unwrap();

    qemu.signal("-STOP");
    let begun = Instant::now();
    let (attached, detached) = tokio::join!(scsi.attach_identified(&second), scsi.detach(&first));
    assert_eq!(attached.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(detached.unwrap_err().kind(), ErrorKind::Uncertain);
    assert!(
        begun.elapsed() < 4 * SHORT_DEADLINES.call,
        "{:?}",
        begun.elapsed()
    );
    // Whatever was asked for may yet happen, so nobody gets those slots.
    let error = scsi.attach_identified(&third).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");

    qemu.signal("-CONT");
    scsi.detach(&first).await.unwrap();
    scsi.detach(&second).await.unwrap();
    assert_eq!(qemu.tables(), before);
    scsi.attach_identified(&third).await.unwrap();
    scsi.detach(&third).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_qemu_holds_no_call_beyond_its_deadlines_however_many_there_are() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let attacher = qemu.scsi_with(SHORT_DEADLINES).await;
    let disk = Disk::virtual_disk(qemu.image("a", 4096)).read_only();
    qemu.signal("-STOP");
    let mut calls = JoinSet::new();
    for lun in 0..64 {
        let (attacher, disk) = (attacher.clone(), disk.clone());
        let at = address(&format!("0/{lun}"));
        calls.spawn(async move { (at, attacher.attach_identified(at, &disk).await.unwrap_err()) });
    }
    let begun = Instant::now();
    let mut in_doubt = Vec::new();
    for (at, error) in calls.join_all().await {
        match error.kind() {
            ErrorKind::Uncertain => in_doubt.push(at),
            // It was never sent, and never will be.
            ErrorKind::Busy => {}
            kind => panic!("{kind}: {error}"),
        }
    }
    assert!(
        begun.elapsed() < 5 * SHORT_DEADLINES.call,
        "{:?}",
        begun.elapsed()
    );
    qemu.signal("-CONT");
    for at in in_doubt {
        attacher.detach(at).await.unwrap();
    }
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_attachment_can_be_detached() {
    let mut qemu = Qemu::start(1);
    let before = qemu.tables();
    let attacher = Arc::new(qemu.scsi().await);
    let (at, disk) = (address("0/0"), Disk::virtual_disk(qemu.image("a", 4096)));
    let mut undone = 0;
    for polls in 0..40 {
        let limit = std::time::Duration::from_micros(100 * polls);
        let dropped = timeout(limit, attacher.attach_identified(at, &disk)).await;
        undone += u32::from(dropped.is_err());
        attacher.detach(at).await.unwrap();
        assert_eq!(qemu.tables(), before);
    }
    assert!(undone > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_qemu_ends_every_call_within_a_second() {
    let mut qemu = Qemu::start(2);
    let scsi = qemu.scsi().await;
    let disk = Disk::virtual_disk(qemu.image("a", 4096)).read_only();
    for lun in 0..30 {
        scsi.attach_identified(address(&format!("0/{lun}")), &disk)
            .await
            .unwrap();
    }
    // So that all of them are under way when it dies.
    qemu.signal("-STOP");
    let mut calls = JoinSet::new();
    for lun in 0..30 {
        let (on, from) = (scsi.clone(), scsi.clone());
        let disk = disk.clone();
        calls.spawn(async move {
            on.attach_identified(address(&format!("1/{lun}")), &disk)
                .await
        });
        calls.spawn(async move { from.detach(address(&format!("0/{lun}"))).await });
    }
    tokio::task::yield_now().await;
    qemu.kill();
    let begun = Instant::now();
    let outcomes = timeout(LONG, calls.join_all()).await.unwrap();
    let took = begun.elapsed();
    for outcome in outcomes {
        assert_eq!(kind(outcome), Err(ErrorKind::Gone));
    }
    assert_eq!(
        kind(scsi.attach_identified(address("0/0"), &disk).await),
        Err(ErrorKind::Gone)
    );
    assert_eq!(
        kind(scsi.detach(address("0/0")).await),
        Err(ErrorKind::Gone)
    );
    assert_eq!(scsi.left().await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(took.as_secs() < 1, "{took:?}");
}
