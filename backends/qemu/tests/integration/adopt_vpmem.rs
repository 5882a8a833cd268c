//! VPMEM disks of an earlier process: found again over a new connection, whole or packed, and told from those of others.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;

use crate::common::hook::hooked;
use crate::common::lossy::lossy;
use crate::common::pmem::{MIB, Pmem};
use blockmount::placement::SlotUse;
use blockmount::testing::AttachIdentified as _;
use blockmount::{DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};
use blockmount_qemu::{QemuVpmem, Qmp};
use blockmount_vpmem::{Mode, VpmemAddress, VpmemTransport};
use tokio::net::UnixStream;
use tokio::sync::Notify;

type Vpmem = VpmemTransport<QemuVpmem>;

async fn stream(directory: &Path) -> UnixStream {
    UnixStream::connect(directory.join("qmp")).await.unwrap()
}

fn transport(pmem: &Pmem, qmp: Qmp, mode: Mode) -> Vpmem {
    let attacher = pmem.virtio_over(qmp);
    let geometry = attacher.geometry();
    VpmemTransport::new(attacher, geometry, mode, &[]).unwrap()
}

async fn connect(pmem: &Pmem, directory: &Path, mode: Mode) -> Vpmem {
    let qmp = Qmp::connect(stream(directory).await).await.unwrap();
    transport(pmem, qmp, mode)
}

async fn attach(vpmem: &Vpmem, disk: &Disk) -> (DiskId, DeviceLocator) {
    let id = vpmem.identify(disk).await.unwrap();
    let locator = vpmem.attach(disk, &id).await.unwrap();
    (id, locator)
}

/// What the guest reads at the start and the end of a disk.
fn ends(pmem: &Pmem, locator: &DeviceLocator) -> [u8; 2] {
    let at = VpmemAddress::try_from(locator).unwrap();
    let (offset, size) = at
        .range
        .map_or((0, 2 * MIB), |range| (range.offset(), range.size()));
    // A range ends with the rest of a page.
    let last = offset + size - 4096;
    [offset, last].map(|at_byte| pmem.guest.read(at.device.get().into(), at_byte, 1)[0])
}

/// As whose QEMU keeps files.
fn owners(pmem: &Pmem) -> Vec<String> {
    let owner = |member: &serde_json::Value| {
        let opaque = member["opaque"].as_str().unwrap();
        opaque.split_once('#').unwrap().0.to_owned()
    };
    let mut owners: Vec<String> = pmem.qemu.passed().iter().map(owner).collect();
    owners.sort();
    owners
}

fn layers(pmem: &Pmem) -> [Disk; 3] {
    [1, 2, 3].map(|n: u8| pmem.disk(&n.to_string(), n, MIB + u64::from(n) * 512))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_packed_disks_of_an_earlier_process_are_adopted_over_a_new_connection() {
    let directory = tempfile::tempdir().unwrap();
    let pmem = Pmem::start_reachable(2, directory.path());
    let disks = layers(&pmem);
    let mut attached = Vec::new();
    let first = connect(&pmem, directory.path(), Mode::Packed).await;
    for disk in &disks {
        attached.push(attach(&first, disk).await);
    }
    first.detach(&disks[1]).await.unwrap();
    drop(first);
    let tables = pmem.guest.tables();

    let second = connect(&pmem, directory.path(), Mode::Packed).await;
    let adopt = async |number: usize, known: bool| {
        let (id, locator) = &attached[number];
        let locator = Some(locator).filter(|_| known);
        second.adopt(&disks[number], id, locator).await.unwrap()
    };
    let there = |number: usize| Presence::Present(attached[number].1.clone());
    // One whose attach was cut off is found without its locator.
    assert_eq!(adopt(0, false).await, there(0));
    assert_eq!(adopt(2, true).await, there(2));
    assert_eq!(adopt(1, true).await, Presence::Absent);
    assert_eq!(pmem.guest.tables(), tables);

    // It goes into the hole, and beside the others.
    let another = pmem.disk("another", 9, MIB);
    let (_, hole) = attach(&second, &another).await;
    let device = |locator: &DeviceLocator| VpmemAddress::try_from(locator).unwrap().device;
    assert_eq!(device(&hole), device(&attached[0].1));
    assert_eq!(pmem.guest.tables(), tables);
    let read = [&attached[0].1, &hole, &attached[2].1].map(|locator| ends(&pmem, locator));
    assert_eq!(read, [[1, 1], [9, 9], [3, 3]]);
    for disk in [&disks[0], &another, &disks[2]] {
        second.detach(disk).await.unwrap();
    }
    for (_, locator) in &attached {
        assert_eq!(ends(&pmem, locator), [0, 0]);
    }
    assert_eq!(pmem.blocks_in_use(), 0);
    assert_eq!(owners(&pmem), ["bm-vpmem-0@"]);
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_packed_disks_that_are_not_adopted_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let pmem = Pmem::start_reachable(2, directory.path());
    let disks = layers(&pmem);
    let first = connect(&pmem, directory.path(), Mode::Packed).await;
    let others = [
        attach(&first, &disks[0]).await,
        attach(&first, &disks[1]).await,
    ];
    drop(first);

    let second = connect(&pmem, directory.path(), Mode::Packed).await;
    let id = second.identify(&disks[2]).await.unwrap();
    let at = Some(&others[0].1);
    // The journal's locator has another disk by now.
    let adopted = second.adopt(&disks[2], &id, at).await.unwrap();
    assert_eq!(adopted, Presence::Absent);
    let (_, mine) = attach(&second, &disks[2]).await;
    let uses: Vec<SlotUse> = second.slot_map().iter().map(|slot| slot.usage).collect();
    assert_eq!(
        uses,
        [SlotUse::Foreign, SlotUse::Foreign, SlotUse::Occupied]
    );
    second.detach(&disks[2]).await.unwrap();
    second.detach(&disks[0]).await.unwrap();
    assert_eq!(ends(&pmem, &mine), [0, 0]);
    let read = others.each_ref().map(|(_, at)| ends(&pmem, at));
    assert_eq!(read, [[1, 1], [2, 2]]);
    assert_eq!(owners(&pmem).len(), 3);

    // As whole devices, a packed one is in the way, with disks on it or without.
    drop(second);
    let third = connect(&pmem, directory.path(), Mode::WholeDevices).await;
    let whole = pmem.disk("whole", 4, 2 * MIB);
    let (_, at) = attach(&third, &whole).await;
    assert_eq!(at.as_str(), "vpmem:1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_whole_devices_of_an_earlier_process_are_adopted_with_their_copies() {
    let directory = tempfile::tempdir().unwrap();
    let pmem = Pmem::start_reachable(2, directory.path());
    let before = pmem.guest.tables();
    let [image, copy] = [("image", 1, 2 * MIB), ("copy", 2, 3 * MIB + 512)]
        .map(|(name, byte, size)| pmem.disk(name, byte, size));
    let first = connect(&pmem, directory.path(), Mode::WholeDevices).await;
    let attached = [attach(&first, &image).await, attach(&first, &copy).await];
    drop(first);
    // The image is kept open beside its copy, so that its id stays its own.
    assert_eq!(owners(&pmem), ["bm-vpmem-0", "bm-vpmem-1", "bm-vpmem-1"]);

    let second = connect(&pmem, directory.path(), Mode::WholeDevices).await;
    for ((id, at), disk) in attached.iter().zip([&image, &copy]) {
        let adopted = second.adopt(disk, id, Some(at)).await.unwrap();
        assert_eq!(adopted, Presence::Present(at.clone()));
    }
    for (port, disk) in [(0, &image), (1, &copy)] {
        pmem.guest.eject(port);
        second.detach(disk).await.unwrap();
    }
    assert_eq!(pmem.guest.tables(), before);
    assert_eq!(owners(&pmem), Vec::<String>::new());
}

/// Between us and QEMU passes on bytes, and no files: QEMU shows less, and nothing is guessed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_a_packed_device_that_cannot_be_reached_is_neither_used_nor_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let pmem = Pmem::start_reachable(2, directory.path());
    let disks = layers(&pmem);
    let first = connect(&pmem, directory.path(), Mode::Packed).await;
    let (id, at) = attach(&first, &disks[0]).await;
    drop(first);

    let (bytes, _) = lossy(stream(directory.path()).await);
    let second = transport(&pmem, Qmp::connect(bytes).await.unwrap(), Mode::Packed);
    let adopted = second.adopt(&disks[0], &id, Some(&at)).await.unwrap();
    assert_eq!(adopted, Presence::Unknown);
    let error = second.detach(&disks[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    assert_eq!(second.slot_map()[0].usage, SlotUse::Quarantined);
    let (_, other) = attach(&second, &disks[1]).await;
    assert!(other.as_str().starts_with("vpmem:1@"), "{other}");
    assert_eq!(ends(&pmem, &at), [1, 1]);
}

/// The process ends while it makes a packed device: the next one makes it anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn u03_a_packed_device_that_was_made_half_is_made_anew() {
    for command in ["object-add", "device_add"] {
        let directory = tempfile::tempdir().unwrap();
        let pmem = Pmem::start_reachable(2, directory.path());
        let [disk, ..] = layers(&pmem);
        let stream = stream(directory.path()).await;
        let line = StdUnixStream::from(stream.as_fd().try_clone_to_owned().unwrap());
        let cut = Arc::new(Notify::new());
        let noted = cut.clone();
        let stream = hooked(stream, command, move || {
            line.shutdown(Shutdown::Both).unwrap();
            noted.notify_one();
            loop {
                std::thread::park();
            }
        });
        let first = transport(&pmem, Qmp::connect(stream).await.unwrap(), Mode::Packed);
        tokio::select! {
            attached = first.attach_identified(&disk) => panic!("{attached:?}"),
            () = cut.notified() => {}
        }
        drop(first);

        let second = connect(&pmem, directory.path(), Mode::Packed).await;
        let id = second.identify(&disk).await.unwrap();
        let adopted = second.adopt(&disk, &id, None).await.unwrap();
        assert_eq!(adopted, Presence::Absent, "{command}");
        let (_, at) = attach(&second, &disk).await;
        assert!(at.as_str().starts_with("vpmem:0@"), "{at}");
        assert_eq!(ends(&pmem, &at), [1, 1]);
        second.detach(&disk).await.unwrap();
        assert_eq!(pmem.blocks_in_use(), 0);
    }
}
