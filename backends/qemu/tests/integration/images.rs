//! Which images a VM is given, and which it is not.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount_scsi::testing::AttachIdentified as _;
use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::common::{Qemu, SHORT_DEADLINES, address};
use blockmount::{Disk, ErrorKind};
use blockmount_qemu::QemuScsi;
use blockmount_qemu::qmp::{Deadlines, Qmp};
use blockmount_scsi::Attacher;
use serde_json::{Value, json};

/// What QEMU says of a node.
fn node(qemu: &Qemu, name: &str) -> Value {
    let nodes = qemu.execute("query-named-block-nodes", json!({"flat": true}));
    let mut nodes = nodes.as_array().unwrap().iter();
    nodes
        .find(|node| node["node-name"] == name)
        .unwrap()
        .clone()
}

async fn refused(qemu: &Qemu, scsi: &QemuScsi, disk: Disk, kind: ErrorKind, says: &str) {
    let before = qemu.tables();
    let error = scsi
        .attach_identified(address("0/9"), &disk)
        .await
        .unwrap_err();
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    let said = format!("{error}: {cause}");
    assert_eq!(error.kind(), kind, "{said}");
    assert!(said.contains(says), "{said}");
    assert_eq!(qemu.tables(), before, "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_what_their_names_say() {
    let mut qemu = Qemu::start(1);
    let scsi = qemu.scsi().await;
    let raw = qemu.image("raw.img", 1 << 20);
    let qcow2 = qemu.qcow2("small.qcow2", json!({}));
    // What a guest could write into its raw disk, and a name that QEMU would read as options.
    let hostile = qemu.path("json:{}.img");
    std::fs::copy(&qcow2, &hostile).unwrap();
    let file = OpenOptions::new().write(true).open(&hostile).unwrap();
    file.set_len(256 << 10).unwrap();
    let disks = [raw, qcow2, hostile].map(Disk::virtual_disk);
    for (lun, disk) in disks.iter().enumerate() {
        scsi.attach_identified(address(&format!("0/{lun}")), disk)
            .await
            .unwrap();
    }
    let format_and_size = |lun: usize| {
        let node = node(&qemu, &format!("bm-scsi-0-{lun}"));
        (node["drv"].clone(), node["image"]["virtual-size"].as_u64())
    };
    assert_eq!(format_and_size(0), (json!("raw"), Some(1 << 20)));
    assert_eq!(format_and_size(1), (json!("qcow2"), Some(4 << 20)));
    assert_eq!(format_and_size(2), (json!("raw"), Some(256 << 10)));
    for file in ["bm-scsi-0-0-file", "bm-scsi-0-1-file", "bm-scsi-0-2-file"] {
        assert_eq!(node(&qemu, file)["drv"], "file");
    }
    assert_eq!(scsi.left().await.unwrap().len(), 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_opens_no_other_files() {
    let mut qemu = Qemu::start(1);
    let scsi = qemu.scsi().await;
    let secret = qemu.image("secret", 4 << 20);
    let backing = json!({"backing-file": secret, "backing-fmt": "raw"});
    let backing = Disk::virtual_disk(qemu.qcow2("backing.qcow2", backing)).read_only();
    refused(
        &qemu,
        &scsi,
        backing.clone(),
        ErrorKind::Invalid,
        "backing file",
    )
    .await;

    let data =
        json!({"driver": "file", "node-name": "data", "filename": qemu.image("data", 4 << 20)});
    qemu.execute("blockdev-add", data);
    let external = qemu.qcow2(
        "external.qcow2",
        json!({"data-file": "data", "data-file-raw": true}),
    );
    qemu.execute("blockdev-del", json!({"node-name": "data"}));
    let external = Disk::virtual_disk(external);
    refused(
        &qemu,
        &scsi,
        external.clone(),
        ErrorKind::Invalid,
        "another file",
    )
    .await;

    let encrypted = qemu.qcow2("encrypted.qcow2", json!({}));
    let file = OpenOptions::new().write(true).open(&encrypted).unwrap();
    file.write_at(&[2], 35).unwrap();
    let encrypted = Disk::virtual_disk(encrypted);
    refused(&qemu, &scsi, encrypted, ErrorKind::Unsuitable, "encrypted").await;

    // Whoever trusts the header can have the backing file, and nothing more.
    let trusting = scsi.clone().allow_backing_files();
    refused(
        &qemu,
        &trusting,
        external,
        ErrorKind::Invalid,
        "another file",
    )
    .await;
    let before = qemu.tables();
    trusting
        .attach_identified(address("0/0"), &backing)
        .await
        .unwrap();
    assert_eq!(qemu.opened(&secret), 1);
    trusting.detach(address("0/0")).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

/// The header is read before QEMU opens the image; what it says by then does not matter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_replaced_in_time_opens_no_backing_file() {
    let mut qemu = Qemu::start(1);
    // It is no Unix socket any more, so that QEMU is given paths.
    let (reader, writer) = qemu.stream().into_split();
    let qmp = Qmp::connect_with(tokio::io::join(reader, writer), SHORT_DEADLINES).await;
    let scsi = qemu.attacher(qmp.unwrap());
    let secret = qemu.image("secret", 4 << 20);
    let backing = json!({"backing-file": secret, "backing-fmt": "raw"});
    let (image, hostile) = (
        qemu.qcow2("image.qcow2", json!({})),
        qemu.qcow2("hostile.qcow2", backing),
    );
    qemu.signal("-STOP");
    let disk = Disk::virtual_disk(&image).read_only();
    let error = scsi
        .attach_identified(address("0/0"), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    std::fs::rename(hostile, image).unwrap();
    qemu.signal("-CONT");
    // Asked after the command that was not answered, this is answered after it.
    assert_eq!(scsi.left().await.unwrap().len(), 2);
    let image = &node(&qemu, "bm-scsi-0-0")["image"];
    assert_eq!(image["backing-filename"], secret.to_str().unwrap());
    assert_eq!(qemu.opened(&secret), 0);
    scsi.detach(address("0/0")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_image_is_refused_and_leaves_nothing() {
    let mut qemu = Qemu::start(1);
    let scsi = qemu.scsi().await;
    let named = qemu.image("raw.qcow2", 1 << 20);
    let latin1 = qemu
        .path("")
        .join(std::ffi::OsStr::from_bytes(b"caf\xe9.img"));
    std::fs::copy(qemu.image("raw.img", 4096), &latin1).unwrap();
    let cases: [(PathBuf, ErrorKind, &str); 8] = [
        (qemu.path("none.img"), ErrorKind::NotFound, "none.img"),
        (qemu.path("none.qcow2"), ErrorKind::NotFound, "none.qcow2"),
        (qemu.path(""), ErrorKind::Invalid, "directory"),
        ("/dev/zero".into(), ErrorKind::Invalid, "character device"),
        (qemu.image("empty.img", 0), ErrorKind::Invalid, "empty"),
        (
            qemu.image("odd.img", 1000),
            ErrorKind::Invalid,
            "1000 bytes",
        ),
        (named, ErrorKind::Invalid, "is none"),
        (latin1, ErrorKind::Invalid, "UTF-8"),
    ];
    for (path, kind, says) in cases {
        refused(&qemu, &scsi, Disk::virtual_disk(path), kind, says).await;
    }
    let provided = Disk::extensible("provider", "/a");
    refused(
        &qemu,
        &scsi,
        provided.clone(),
        ErrorKind::Unsuitable,
        "provider",
    )
    .await;
    let error = scsi.identify(&provided).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    // Looks like an image to us, and not to QEMU.
    let broken = qemu.qcow2("broken.qcow2", json!({}));
    let file = OpenOptions::new().write(true).open(&broken).unwrap();
    file.write_at(&[0xff; 4], 20).unwrap();
    refused(
        &qemu,
        &scsi,
        Disk::virtual_disk(broken),
        ErrorKind::Other,
        "luster size",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_that_the_vm_does_not_have_are_refused() {
    let mut qemu = Qemu::start(1);
    let scsi = qemu.scsi().await;
    let before = qemu.tables();
    let disk = Disk::virtual_disk(qemu.image("a", 4096));
    for at in ["0/256", "0/16383", "1/0"] {
        let error = scsi
            .attach_identified(address(at), &disk)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        scsi.detach(address(at)).await.unwrap();
        assert_eq!(qemu.tables(), before);
    }
    scsi.attach_identified(address("0/255"), &disk)
        .await
        .unwrap();
    scsi.detach(address("0/255")).await.unwrap();
    assert_eq!(qemu.tables(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controllers_that_the_vm_does_not_have_are_refused() {
    let mut qemu = Qemu::start(1);
    let qmp = qemu.qmp(Deadlines::default()).await;
    for ids in [
        vec![],
        vec!["scsi0", "scsi0"],
        vec!["scsi0.0/x"],
        vec!["0"],
        vec![""],
        vec!["s"; 65],
    ] {
        let error = QemuScsi::new(qmp.clone(), ids).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let scsi = QemuScsi::new(qmp, ["none"]).unwrap();
    let disk = Disk::virtual_disk(qemu.image("a", 4096));
    refused(&qemu, &scsi, disk, ErrorKind::Other, "'none.0' not found").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_vms_read_an_image_or_one_writes_it() {
    let (mut one, mut two) = (Qemu::start(1), Qemu::start(1));
    let (first, second) = (one.scsi().await, two.scsi().await);
    let at = address("0/0");
    let of = |qemu: &Qemu| format!("is in use by process {} (qemu-system-", qemu.pid());
    use ErrorKind::Conflict;
    for image in [
        one.image("raw.img", 1 << 20),
        one.qcow2("small.qcow2", json!({})),
    ] {
        let writable = Disk::virtual_disk(image);
        let read_only = writable.clone().read_only();
        first.attach_identified(at, &read_only).await.unwrap();
        second.attach_identified(at, &read_only).await.unwrap();
        for name in ["bm-scsi-0-0", "bm-scsi-0-0-file"] {
            assert_eq!(node(&one, name)["ro"], true);
        }
        second.detach(at).await.unwrap();
        refused(&two, &second, writable.clone(), Conflict, &of(&one)).await;
        first.detach(at).await.unwrap();

        second.attach_identified(at, &writable).await.unwrap();
        assert_eq!(node(&two, "bm-scsi-0-0")["ro"], false);
        refused(&one, &first, read_only, Conflict, &of(&two)).await;
        refused(&one, &first, writable, Conflict, &of(&two)).await;
        second.detach(at).await.unwrap();
    }
}
