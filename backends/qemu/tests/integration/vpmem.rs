//! VPMEM devices in a real QEMU: what the guest reads, what is left, and what cannot be taken out.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use blockmount_vpmem::testing::AttachIdentified as _;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::lossy::{Loss, lossy};
use crate::common::pmem::{DEVICE, Guest, MIB, Pmem};
use crate::common::{LONG, Qemu, SHORT_DEADLINES};
use async_trait::async_trait;
use blockmount::testing::conformance::{self, TransportFixture};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};
use blockmount_qemu::QemuVpmem;
use blockmount_qemu::qmp::Deadlines;
use blockmount_source::image_lock::{self, Access};
use blockmount_vpmem::{
    Attacher, ByteRange, DeviceNumber, Mode, PAGE, VpmemAddress, VpmemTransport,
};
use serde_json::json;

fn device(number: u64) -> DeviceNumber {
    number.try_into().unwrap()
}

fn range(offset: u64, size: u64) -> ByteRange {
    ByteRange::new(offset, size).unwrap()
}

fn transport(attacher: &QemuVpmem, mode: Mode) -> VpmemTransport<QemuVpmem> {
    VpmemTransport::new(attacher.clone(), attacher.geometry(), mode, &[]).unwrap()
}

/// What the guest reads in a range: so many bytes of one kind, and then zeros. Only the first page, one in the
/// middle, and those around the end are looked at.
fn shows(guest: &Guest, device: u64, range: ByteRange, length: u64, byte: u8) {
    let pages = range.size() / PAGE;
    for page in [0, pages / 2, length / PAGE, length / PAGE + 1, pages - 1] {
        let start = page.min(pages - 1) * PAGE;
        let content = length.saturating_sub(start).min(PAGE) as usize;
        let read = guest.read(device, range.offset() + start, PAGE);
        let (disk, rest) = read.split_at(content);
        assert!(disk.iter().all(|read| *read == byte), "{range} at {start}");
        assert!(rest.iter().all(|read| *read == 0), "{range} at {start}");
    }
}

/// Whether a writer may have the image beside those who have it, at the latest after `timeout`: a process that another test
/// has just started may have copies of all descriptors for a moment.
fn may_write(disk: &Disk, timeout: Duration) -> bool {
    let image = std::fs::File::open(disk.source()).unwrap();
    image_lock::lock(&image, Access::Write, timeout)
}

/// A transport whose guest ejects a device before it is detached.
struct WithGuest {
    vpmem: VpmemTransport<QemuVpmem>,
    guest: Guest,
    attached: Mutex<HashMap<Disk, VpmemAddress>>,
}

#[async_trait]
impl Transport for WithGuest {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.vpmem.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, _id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let locator = self.vpmem.attach_identified(disk).await?;
        let address = VpmemAddress::try_from(&locator).unwrap();
        self.attached.lock().unwrap().insert(disk.clone(), address);
        Ok(locator)
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let address = self.attached.lock().unwrap().remove(disk);
        if let Some(address) = address {
            self.guest.eject(address.device.get().into());
        }
        self.vpmem.detach(disk).await
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.vpmem.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        self.vpmem.adopt(disk, id, locator).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_devices_keep_the_contract_of_a_transport() {
    let mut pmem = Pmem::start(2);
    let attacher = pmem.virtio().await;
    let guest = pmem.guest.clone();
    let transport = WithGuest {
        vpmem: transport(&attacher, Mode::WholeDevices),
        guest: guest.clone(),
        attached: Mutex::default(),
    };
    // As they are, and one that has to be copied.
    let sizes = [2 * MIB, 3 * MIB + 512, 4 * MIB];
    let disks = [0, 1, 2].map(|n: u8| pmem.disk(&n.to_string(), n, sizes[usize::from(n)]));
    std::os::unix::fs::symlink("0", pmem.path("link")).unwrap();
    let fixture = TransportFixture::new(
        disks,
        Disk::virtual_disk(pmem.path("none")).read_only(),
        move || guest.tables(),
    )
    .aliases([Disk::virtual_disk(pmem.path("link")).read_only()])
    .capacity(2)
    .remove_source(|disk| {
        std::fs::remove_file(disk.source()).unwrap();
    });
    let passed = conformance::transport(&transport, &fixture).await;
    assert!(passed.successes > 20, "{passed:?}");
    assert_eq!(attacher.left().await.unwrap(), Vec::<String>::new());
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packed_disks_keep_the_contract_of_a_transport() {
    let mut pmem = Pmem::start(1);
    // One that is stopped keeps the files that are taken back, and their locks.
    pmem.qemu.execute("cont", json!({}));
    let attacher = pmem.virtio().await;
    let vpmem = transport(&attacher, Mode::Packed);
    // The device comes with the first disk, and stays: this one is there before and after.
    let first = pmem.disk("first", 0xff, 4 * MIB);
    vpmem.attach_identified(&first).await.unwrap();
    assert!(!may_write(&first, Duration::ZERO));
    let disks = [1, 2, 3].map(|n: u8| pmem.disk(&n.to_string(), n, 20 * MIB - 512));
    let guest = pmem.guest.clone();
    let fixture = TransportFixture::new(
        disks,
        Disk::virtual_disk(pmem.path("none")).read_only(),
        // What the guest reads at the start of each 4 MiB.
        move || {
            let bytes = (0..16).map(|part| guest.read(0, part * 4 * MIB, 1)[0]);
            let bytes = bytes.map(|byte| byte.to_string());
            bytes.chain(guest.tables()).collect()
        },
    )
    .remove_source(|disk| {
        std::fs::remove_file(disk.source()).unwrap();
    });
    let passed = conformance::transport(&vpmem, &fixture).await;
    assert!(passed.successes > 15, "{passed:?}");
    vpmem.detach(&first).await.unwrap();
    assert!(may_write(&first, LONG));
    assert_eq!(pmem.guest.read(0, 0, 4096), [0; 4096]);
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_layers_on_one_device_read_back_as_they_are() {
    let mut pmem = Pmem::start(2);
    let attacher = pmem.virtio().await;
    let vpmem = Arc::new(transport(&attacher, Mode::Packed));
    let disks: Vec<Disk> = (0..8)
        .map(|n: u8| pmem.disk(&n.to_string(), n + 1, MIB + u64::from(n) * 512))
        .collect();
    // All at once: one of them makes the device.
    let attaching = disks.iter().cloned().map(|disk| {
        let vpmem = vpmem.clone();
        tokio::spawn(async move { vpmem.attach_identified(&disk).await.unwrap() })
    });
    let mut ranges = Vec::new();
    for attached in attaching.collect::<Vec<_>>() {
        let locator = attached.await.unwrap();
        let address = VpmemAddress::try_from(&locator).unwrap();
        assert_eq!(address.device, device(0));
        ranges.push(address.range.unwrap());
    }
    assert_eq!(
        attacher.left().await.unwrap(),
        ["device bm-vpmem-0", "memory bm-vpmem-0"]
    );
    let check = |gone: &[usize]| {
        for (n, range) in ranges.iter().enumerate() {
            let byte = if gone.contains(&n) { 0 } else { n as u8 + 1 };
            shows(&pmem.guest, 0, *range, MIB + n as u64 * 512, byte);
        }
    };
    check(&[]);
    // The first at offset 0 goes first, and then out of order.
    let mut gone = Vec::new();
    for n in [0, 5, 2, 7] {
        vpmem.detach(&disks[n]).await.unwrap();
        gone.push(n);
        check(&gone);
    }
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_plugged_and_ejected_30_times_and_never_shows_old_data() {
    let mut pmem = Pmem::start(2);
    // One that is stopped keeps the files that are taken back, and their locks.
    pmem.qemu.execute("cont", json!({}));
    let attacher = pmem.virtio().await;
    let sizes = [2, 6, 4].map(|size| size * MIB);
    for round in 0..30_u64 {
        let byte = round as u8 + 1;
        // Every other one is a copy.
        let size = sizes[round as usize % 3] - (round % 2) * 512;
        let disk = pmem.disk(&format!("{round}"), byte, size);
        let at = device(round % 2);
        attacher.attach_identified(at, &disk).await.unwrap();
        let (_, length) = pmem.guest.region(round % 2).unwrap();
        assert_eq!(length, size.next_multiple_of(2 * MIB));
        shows(&pmem.guest, round % 2, range(0, length), size, byte);
        assert!(!may_write(&disk, Duration::ZERO));
        pmem.guest.eject(round % 2);
        attacher.detach(at).await.unwrap();
        assert!(may_write(&disk, LONG));
        assert_eq!(attacher.left().await.unwrap(), Vec::<String>::new());
        std::fs::remove_file(disk.source()).unwrap();
    }
    assert_eq!((pmem.files_left(), pmem.blocks_in_use()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_cannot_change_a_disk() {
    let mut pmem = Pmem::start(2);
    let attacher = pmem.virtio().await;
    let disk = pmem.disk("a", 7, 2 * MIB);
    attacher.attach_identified(device(0), &disk).await.unwrap();
    attacher
        .map_identified(device(1), range(0, 2 * MIB), &disk)
        .await
        .unwrap();
    for number in 0..2 {
        pmem.guest.write(number, 0, 9);
        assert_eq!(pmem.guest.read(number, 0, 4096), [7; 4096]);
    }
    assert_eq!(std::fs::read(disk.source()).unwrap()[..4096], [7; 4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_the_guest_has_not_ejected_is_busy() {
    let mut pmem = Pmem::start(1);
    let qmp = pmem.qemu.qmp(SHORT_DEADLINES).await;
    let attacher = pmem.virtio_over(qmp);
    let disk = pmem.disk("a", 7, 2 * MIB);
    attacher.attach_identified(device(0), &disk).await.unwrap();
    let error = attacher.detach(device(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(
        error.message().contains("the guest has not ejected it"),
        "{error}"
    );
    assert_eq!(pmem.guest.read(0, 0, 16), [7; 16]);
    // It comes while, or just before, it is waited for.
    let detaching = tokio::spawn({
        let attacher = attacher.clone();
        async move { attacher.detach(device(0)).await }
    });
    pmem.guest.eject(0);
    detaching.await.unwrap().unwrap();
    assert_eq!(attacher.left().await.unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detachment_goes_on_from_every_half_of_the_way() {
    let mut pmem = Pmem::start(1);
    let attacher = pmem.virtio().await;
    let disk = pmem.disk("a", 7, 3 * MIB);
    let before = pmem.guest.tables();
    attacher.detach(device(0)).await.unwrap();
    for memory_is_gone in [false, true] {
        attacher.attach_identified(device(0), &disk).await.unwrap();
        pmem.guest.eject(0);
        if memory_is_gone {
            pmem.qemu.execute("object-del", json!({"id": "bm-vpmem-0"}));
        }
        attacher.detach(device(0)).await.unwrap();
        attacher.detach(device(0)).await.unwrap();
        assert_eq!(pmem.guest.tables(), before);
    }
    // An attachment does not build on what somebody else has left.
    let memory = json!({"qom-type": "memory-backend-ram", "id": "bm-vpmem-0", "size": 2 * MIB});
    pmem.qemu.execute("object-add", memory);
    let error = attacher
        .attach_identified(device(0), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    let error = attacher.map_identified(device(0), range(0, 3 * MIB), &disk);
    assert_eq!(error.await.unwrap_err().kind(), ErrorKind::Conflict);
    attacher.detach(device(0)).await.unwrap();
    assert_eq!(pmem.guest.tables(), before);
    attacher.attach_identified(device(0), &disk).await.unwrap();
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_leaves_all_or_nothing() {
    let mut pmem = Pmem::start(3);
    let (stream, loss) = lossy(pmem.qemu.stream());
    let qmp = blockmount_qemu::Qmp::connect_with(stream, SHORT_DEADLINES)
        .await
        .unwrap();
    let attacher = pmem.virtio_over(qmp);
    let disk = pmem.disk("a", 7, 3 * MIB);
    let before = pmem.guest.tables();

    *loss.lock().unwrap() = Some(Loss::Answer("object-add"));
    let error = attacher
        .attach_identified(device(0), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Other, "{error}");
    assert_eq!(
        (pmem.guest.tables(), pmem.files_left()),
        (before.clone(), 0)
    );

    *loss.lock().unwrap() = Some(Loss::Answer("device_add"));
    attacher.attach_identified(device(0), &disk).await.unwrap();
    assert_eq!(pmem.guest.read(0, 0, 16), [7; 16]);

    // The event is lost, too.
    *loss.lock().unwrap() = Some(Loss::Event("DEVICE_DELETED"));
    pmem.guest.eject(0);
    attacher.detach(device(0)).await.unwrap();
    *loss.lock().unwrap() = Some(Loss::Answer("object-del"));
    attacher.attach_identified(device(0), &disk).await.unwrap();
    pmem.guest.eject(0);
    attacher.detach(device(0)).await.unwrap_err();
    attacher.detach(device(0)).await.unwrap();
    assert_eq!(pmem.guest.tables(), before);

    // Nobody knows about the device of a first mapping, or only its memory is there; the next one finds out.
    for (number, command) in [(1, "device_add"), (2, "object-add")] {
        *loss.lock().unwrap() = Some(Loss::AnswersFrom(command));
        let at = range(MIB, 3 * MIB);
        let error = attacher
            .map_identified(device(number), at, &disk)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
        *loss.lock().unwrap() = None;
        attacher.unmap(device(number), at).await.unwrap();
        attacher
            .map_identified(device(number), at, &disk)
            .await
            .unwrap();
        assert_eq!(pmem.guest.read(number, MIB, 16), [7; 16]);
    }
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nvdimm_is_retained_and_offered_to_the_same_disk_again() {
    let mut pmem = Pmem::start(0);
    let attacher = pmem.nvdimm().await;
    let error = attacher.detach(device(9)).await;
    error.unwrap();
    let vpmem = transport(&attacher, Mode::WholeDevices);
    let disks = [1, 2].map(|n: u8| pmem.disk(&n.to_string(), n, 2 * MIB + 512));
    for _ in 0..3 {
        assert_eq!(
            vpmem.attach_identified(&disks[0]).await.unwrap().as_str(),
            "vpmem:0"
        );
        assert_eq!(pmem.guest.read(0, 0, 16), [1; 16]);
        vpmem.detach(&disks[0]).await.unwrap();
        assert_eq!(vpmem.retained(), 1);
    }
    assert_eq!(
        vpmem.attach_identified(&disks[1]).await.unwrap().as_str(),
        "vpmem:1"
    );
    assert_eq!(pmem.guest.read(1, 0, 16), [2; 16]);
    // A new file under the name of the retained disk, even as large, is not that disk.
    std::fs::remove_file(disks[0].source()).unwrap();
    let other = pmem.disk("1", 3, 2 * MIB + 512);
    assert_eq!(
        vpmem.attach_identified(&other).await.unwrap().as_str(),
        "vpmem:2"
    );
    assert_eq!(pmem.guest.read(2, 0, 16), [3; 16]);
    assert_eq!(attacher.left().await.unwrap().len(), 6);
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nvdimm_can_be_packed() {
    let mut pmem = Pmem::start(0);
    let attacher = pmem.nvdimm().await;
    let disk = pmem.disk("a", 7, MIB + 512);
    let at = range(5 * MIB, MIB + 4096);
    for _ in 0..2 {
        attacher.map_identified(device(3), at, &disk).await.unwrap();
        assert_eq!(pmem.guest.read(3, 5 * MIB, 16), [7; 16]);
        attacher.unmap(device(3), at).await.unwrap();
        attacher.unmap(device(3), at).await.unwrap();
        assert_eq!(pmem.guest.read(3, 5 * MIB, 16), [0; 16]);
    }
    assert_eq!(pmem.guest.region(3).unwrap().1, DEVICE);
    let error = attacher
        .attach_identified(device(3), &disk)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    let error = attacher.detach(device(3)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(pmem.blocks_in_use(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn address_space_that_is_full_is_full_and_leaves_nothing() {
    let mut pmem = Pmem::start_with(2, 8 * MIB);
    let attacher = pmem.virtio().await;
    let disks = ["a", "b"].map(|name| pmem.disk(name, 7, 6 * MIB));
    attacher
        .attach_identified(device(0), &disks[0])
        .await
        .unwrap();
    let with_one = pmem.guest.tables();
    let error = attacher
        .attach_identified(device(1), &disks[1])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    let error = attacher
        .map_identified(device(1), range(0, 6 * MIB), &disks[1])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert_eq!((pmem.guest.tables(), pmem.files_left()), (with_one, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_given_up_does_not_reach_the_next_disk() {
    let mut pmem = Pmem::start(1);
    let attacher = pmem.virtio().await;
    let [large, small] = [("large", 1, 24 * MIB), ("small", 2, 4096)]
        .map(|(name, byte, size)| pmem.disk(name, byte, size));
    let all = range(0, 24 * MIB);
    attacher
        .map_identified(device(0), range(0, 4096), &small)
        .await
        .unwrap();
    attacher.unmap(device(0), range(0, 4096)).await.unwrap();
    for timeout in [0, 1, 5, 20] {
        let timeout = Duration::from_millis(timeout);
        let _ =
            tokio::time::timeout(timeout, attacher.map_identified(device(0), all, &large)).await;
        attacher.unmap(device(0), all).await.unwrap();
        for part in 0..24 {
            assert_eq!(pmem.guest.read(0, part * MIB, 4096), [0; 4096]);
        }
        attacher
            .map_identified(device(0), range(0, 4096), &small)
            .await
            .unwrap();
        assert_eq!(pmem.guest.read(0, 0, 8192)[4095..4097], [2, 0]);
        attacher.unmap(device(0), range(0, 4096)).await.unwrap();
    }
    assert_eq!(pmem.blocks_in_use(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_qemu_gone_everything_is_gone() {
    let mut pmem = Pmem::start(3);
    let attacher = pmem.virtio().await;
    let disk = pmem.disk("a", 7, 2 * MIB);
    let at = range(0, 2 * MIB);
    attacher.attach_identified(device(0), &disk).await.unwrap();
    attacher.map_identified(device(1), at, &disk).await.unwrap();
    pmem.qemu.kill();
    let attached = attacher
        .attach_identified(device(2), &disk)
        .await
        .unwrap_err();
    let mapped = attacher
        .map_identified(device(1), range(2 * MIB, 2 * MIB), &disk)
        .await
        .unwrap_err();
    let detached = attacher.detach(device(0)).await.unwrap_err();
    for error in [attached, mapped, detached] {
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
    attacher.unmap(device(1), at).await.unwrap();
    assert_eq!(pmem.files_left(), 0);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let mut qemu = Qemu::start(0);
    let qmp = qemu.qmp(Deadlines::default()).await;
    let directory = qemu.path("files");
    for ports in [vec![], vec!["a"; 2], vec![""], vec!["0"], vec!["a/b"]] {
        let made = QemuVpmem::virtio(qmp.clone(), ports, DEVICE, &directory);
        assert_eq!(made.unwrap_err().kind(), ErrorKind::Invalid);
    }
    for (slots, size) in [(0, DEVICE), (129, DEVICE), (1, 0), (1, 2 * MIB + 4096)] {
        let made = QemuVpmem::nvdimm(qmp.clone(), slots, size, &directory);
        assert_eq!(made.unwrap_err().kind(), ErrorKind::Invalid);
    }
    let attacher = QemuVpmem::nvdimm(qmp, 1, DEVICE, &directory).unwrap();
    let image = Disk::virtual_disk(qemu.image("a", 4096)).read_only();
    let physical = Disk::physical_disk(qemu.path("a")).read_only();
    let kind = async |device_number, disk: &Disk| {
        let attached = attacher
            .attach_identified(device(device_number), disk)
            .await;
        attached.unwrap_err().kind()
    };
    assert_eq!(kind(1, &image).await, ErrorKind::Invalid);
    assert_eq!(kind(0, &physical).await, ErrorKind::Unsuitable);
    // The directory for copies is not there: another transport may take the disk.
    assert_eq!(kind(0, &image).await, ErrorKind::Unsuitable);
    let beyond = attacher
        .map_identified(device(0), range(DEVICE, 4096), &image)
        .await;
    assert_eq!(beyond.unwrap_err().kind(), ErrorKind::Invalid);
    attacher.unmap(device(0), range(0, 4096)).await.unwrap();
    attacher.unmap(device(99), range(0, 4096)).await.unwrap();
}
