//! The contract of every transport, in a real QEMU, and how many disks fit.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use crate::common::Qemu;
use blockmount::testing::conformance::{self, TransportFixture};
use blockmount::{Disk, ErrorKind, Transport};
use blockmount_scsi::{Geometry, ScsiAddress, ScsiTransport};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scsi_disks_in_qemu_keep_the_contract_of_a_transport() {
    let mut qemu = Qemu::start(2);
    let geometry = Geometry::new(2, 2).unwrap();
    let attacher = qemu.scsi().await;
    let scsi = ScsiTransport::new(attacher.clone(), geometry, &[]).unwrap();
    let disks = ["a", "b", "c", "d", "e"].map(|name| Disk::virtual_disk(qemu.image(name, 1 << 20)));
    std::os::unix::fs::symlink("a", qemu.path("link")).unwrap();
    std::fs::hard_link(qemu.path("a"), qemu.path("hard")).unwrap();
    let up = "../".repeat(std::env::current_dir().unwrap().components().count());
    let relative = PathBuf::from(up).join(qemu.path("a").strip_prefix("/").unwrap());
    let monitor = qemu.monitor.clone();
    let fixture = TransportFixture::new(disks, Disk::virtual_disk(qemu.path("none")), move || {
        monitor.lock().unwrap().tables()
    })
    .aliases([qemu.path("link"), qemu.path("hard"), relative].map(Disk::virtual_disk))
    .capacity(4)
    .remove_source(|disk| std::fs::remove_file(disk.source()).unwrap())
    // The attacher keeps nothing of a disk: it asks QEMU each time.
    .successor(move || ScsiTransport::new(attacher.clone(), geometry, &[]).unwrap());
    let passed = conformance::transport(&scsi, &fixture).await;
    assert!(passed.successes > 50, "{passed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_disks_fit_as_hyper_v_has_and_one_more_changes_nothing() {
    let mut qemu = Qemu::start(4);
    let attacher = qemu.scsi().await;
    let before = qemu.tables();
    let scsi = ScsiTransport::new(attacher.clone(), Geometry::HYPER_V, &[]).unwrap();
    let scsi = Arc::new(scsi);
    let disks: Vec<Disk> = (0..257)
        .map(|n| Disk::virtual_disk(qemu.image(&n.to_string(), 1 << 20)).read_only())
        .collect();

    let mut calls = JoinSet::new();
    for disk in &disks[..256] {
        let (scsi, disk) = (scsi.clone(), disk.clone());
        calls.spawn(async move { scsi.attach_identified(&disk).await });
    }
    let locators = calls.join_all().await;
    let locators: BTreeSet<_> = locators
        .into_iter()
        .map(|locator| ScsiAddress::try_from(&locator.unwrap()).unwrap())
        .collect();
    assert_eq!(locators.len(), 256);
    assert_eq!(attacher.left().await.unwrap().len(), 3 * 256);

    let full = qemu.tables();
    let error = scsi.attach_identified(&disks[256]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert_eq!(qemu.tables(), full);

    let mut calls = JoinSet::new();
    for disk in &disks[..256] {
        let (scsi, disk) = (scsi.clone(), disk.clone());
        calls.spawn(async move { scsi.detach(&disk).await });
    }
    for outcome in calls.join_all().await {
        outcome.unwrap();
    }
    assert_eq!(qemu.tables(), before);
    assert_eq!(attacher.left().await.unwrap(), Vec::<String>::new());
}
