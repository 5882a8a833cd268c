//! Disks of an earlier process: found again over a new connection, and told from those of others.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::path::Path;

use crate::common::Qemu;
use blockmount::{Disk, DiskId, Presence, Transport};
use blockmount_qemu::{QemuScsi, Qmp};
use blockmount_scsi::ScsiTransport;
use serde_json::json;
use tokio::net::UnixStream;

/// A QEMU that many can connect to, one after the other.
fn qemu(directory: &Path) -> Qemu {
    let monitor = format!(
        "unix:{},server=on,wait=off",
        directory.join("qmp").display()
    );
    let qemu = Qemu::start_with(2, &["-qmp", &monitor]);
    qemu.execute("cont", json!({}));
    qemu
}

async fn connect(qemu: &Qemu, directory: &Path) -> ScsiTransport<QemuScsi> {
    let stream = UnixStream::connect(directory.join("qmp")).await.unwrap();
    let attacher = qemu.attacher(Qmp::connect(stream).await.unwrap());
    let geometry = attacher.geometry();
    ScsiTransport::new(attacher, geometry, &[]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_disks_of_an_earlier_process_are_adopted_over_a_new_connection() {
    let directory = tempfile::tempdir().unwrap();
    let qemu = qemu(directory.path());
    let before = qemu.tables();
    let disks = ["a", "b"].map(|name| Disk::virtual_disk(qemu.image(name, 1 << 20)));
    let qcow2 = Disk::virtual_disk(qemu.qcow2("c.qcow2", json!({}))).read_only();
    let disks = [disks[0].clone(), disks[1].clone(), qcow2];
    let mut attached: Vec<(DiskId, _)> = Vec::new();
    let first = connect(&qemu, directory.path()).await;
    for disk in &disks {
        let id = first.identify(disk).await.unwrap();
        let locator = first.attach(disk, &id).await.unwrap();
        attached.push((id, locator));
    }
    drop(first);
    let with_disks = qemu.tables();

    let second = connect(&qemu, directory.path()).await;
    for (number, (disk, (id, locator))) in disks.iter().zip(&attached).enumerate() {
        // One whose attach was cut off is found without its locator.
        let known = Some(locator).filter(|_| number > 0);
        let adopted = second.adopt(disk, id, known).await.unwrap();
        assert_eq!(adopted, Presence::Present(locator.clone()));
    }
    assert_eq!(qemu.tables(), with_disks);
    // The addresses are taken.
    let another = Disk::virtual_disk(qemu.image("d", 1 << 20));
    let id = second.identify(&another).await.unwrap();
    let locator = second.attach(&another, &id).await.unwrap();
    assert!(attached.iter().all(|(_, taken)| *taken != locator));
    second.detach(&another).await.unwrap();
    for disk in &disks {
        second.detach(disk).await.unwrap();
    }
    assert_eq!(qemu.tables(), before);
    assert!(qemu.passed().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_what_is_not_there_and_what_is_of_others_is_not_adopted() {
    let directory = tempfile::tempdir().unwrap();
    let qemu = qemu(directory.path());
    let (mine, other) = (qemu.image("mine", 1 << 20), qemu.image("other", 1 << 20));
    let (mine, other) = (Disk::virtual_disk(mine), Disk::virtual_disk(other));
    let first = connect(&qemu, directory.path()).await;
    let id = first.identify(&other).await.unwrap();
    let locator = first.attach(&other, &id).await.unwrap();
    drop(first);
    // A device of another name, put there by hand.
    let image = qemu.image("foreign", 4096);
    let node = json!({"driver": "file", "node-name": "foreign", "filename": image});
    qemu.execute("blockdev-add", node);
    let device = json!({
        "driver": "scsi-hd", "id": "foreign", "drive": "foreign",
        "bus": "scsi1.0", "channel": 0, "scsi-id": 0, "lun": 0,
    });
    qemu.execute("device_add", device);
    let with_both = qemu.tables();

    let second = connect(&qemu, directory.path()).await;
    let id = second.identify(&mine).await.unwrap();
    // The journal's locator has another disk by now.
    let adopted = second.adopt(&mine, &id, Some(&locator)).await.unwrap();
    assert_eq!(adopted, Presence::Absent);
    let taken = second.attach(&mine, &id).await.unwrap();
    assert!(
        !["scsi:0/0", "scsi:1/0"].contains(&taken.as_str()),
        "{taken}"
    );
    second.detach(&mine).await.unwrap();
    assert_eq!(qemu.tables(), with_both);
}

/// Somebody has taken the device of a disk out of QEMU, which keeps its image open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r03_an_image_without_its_device_is_no_disk_and_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let qemu = qemu(directory.path());
    let before = qemu.tables();
    let disk = Disk::virtual_disk(qemu.image("a", 1 << 20));
    let first = connect(&qemu, directory.path()).await;
    let id = first.identify(&disk).await.unwrap();
    let locator = first.attach(&disk, &id).await.unwrap();
    drop(first);
    let address = blockmount_scsi::ScsiAddress::try_from(&locator).unwrap();
    let whole = qemu.tables();
    qemu.execute("device_del", json!({"id": QemuScsi::name(address)}));
    let gone = || qemu.tables().len() < whole.len();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !gone() {
        assert!(std::time::Instant::now() < deadline, "{:?}", qemu.tables());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    for known in [Some(&locator), None] {
        let next = connect(&qemu, directory.path()).await;
        let adopted = next.adopt(&disk, &id, known).await.unwrap();
        assert_eq!(adopted, Presence::Unknown, "{known:?}");
        // Its address is set aside until it is detached.
        let another = Disk::virtual_disk(qemu.image("b", 1 << 20));
        let other = next.identify(&another).await.unwrap();
        assert_ne!(next.attach(&another, &other).await.unwrap(), locator);
        next.detach(&another).await.unwrap();
        if known.is_none() {
            next.detach(&disk).await.unwrap();
        }
    }
    assert_eq!(qemu.tables(), before);
    assert!(qemu.passed().is_empty());
}
