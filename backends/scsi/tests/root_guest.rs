//! Finding and unplugging disks, over a made-up tree of devices whose disks are real loop devices. What
//! a real kernel does with the real tree is seen in a virtual machine.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

mod sysfs;

use std::time::{Duration, Instant};

use blockmount::{BackendError, DeviceLocator, ErrorKind, Resolver, Unplugger};
use blockmount_linux::device;
use blockmount_scsi::{ControllerId, ScsiResolver, ScsiUnplugger};
use sysfs::{Loop, Tree};

const FIRST: &str = "0000:00:10.0";
const SECOND: &str = "0000:00:11.0";
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(400);

fn resolver(tree: &Tree) -> ScsiResolver {
    let ids = [FIRST, SECOND].map(|address| ControllerId::Pci(address.parse().unwrap()));
    ScsiResolver::new(ids)
        .with_sysfs(tree.path())
        .with_timeout(DEFAULT_TIMEOUT)
}

fn unplugger(tree: &Tree) -> ScsiUnplugger {
    ScsiUnplugger::new(resolver(tree))
        .with_timeout(Duration::from_millis(50))
        .with_removal_deadline(DEFAULT_TIMEOUT)
}

/// A disk at `scsi:0/5` whose node is said to have this name.
fn disk_with_node(tree: &Tree, disk: &Loop, node: &str) {
    tree.host(FIRST, 3);
    tree.disk("3:0:0:5", disk);
    let name = disk.node().file_name().unwrap().to_str().unwrap();
    let block = format!("bus/scsi/devices/3:0:0:5/block/{name}");
    tree.name(&block, disk, node);
}

fn locator(text: &str) -> DeviceLocator {
    text.parse().unwrap()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, BackendError>, kind: ErrorKind) -> String {
    let error = result.expect_err("it should have been refused");
    assert_eq!(error.kind(), kind, "{error}");
    error.message().to_owned()
}

/// The host of controller 0 is 7 and that of controller 1 is 0: the number of the one says nothing about that
/// of the other.
#[tokio::test]
async fn root_g22_a_disk_is_found_by_its_controller_and_not_by_a_number() {
    let tree = Tree::new();
    let disks = [Loop::new(), Loop::new(), Loop::new()];
    tree.host(FIRST, 7);
    tree.host(SECOND, 0);
    tree.disk("7:0:0:0", &disks[0]);
    tree.disk("0:0:0:0", &disks[1]);
    tree.disk("0:0:0:16684", &disks[2]);
    for (at, disk) in ["scsi:0/0", "scsi:1/0", "scsi:1/300"]
        .into_iter()
        .zip(&disks)
    {
        let found = resolver(&tree).resolve(&locator(at)).await.unwrap();
        assert_eq!(
            (found.path.as_path(), found.range),
            (disk.node(), None),
            "{at}"
        );
    }
}

/// A kernel that takes its time: writing to the file blocks until somebody reads it.
fn slow_scan(tree: &Tree) -> SlowScan {
    let scan = tree.at("class/scsi_host/host3/scan");
    std::fs::remove_file(&scan).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&scan).status();
    assert!(made.unwrap().success());
    SlowScan(scan)
}

struct SlowScan(std::path::PathBuf);

impl Drop for SlowScan {
    /// A scan that waits goes on, so that a test that has failed ends.
    fn drop(&mut self) {
        let both_ends = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&self.0);
        std::mem::forget(both_ends.unwrap());
    }
}

#[tokio::test]
async fn root_a_disk_is_not_unplugged_while_the_kernel_looks_for_it() {
    let tree = Tree::new();
    tree.host(FIRST, 3);
    let scan = slow_scan(&tree);
    let (resolver, at) = (resolver(&tree), locator("scsi:0/5"));
    let unplugger = ScsiUnplugger::new(resolver.clone())
        .with_timeout(Duration::from_millis(50))
        .with_removal_deadline(DEFAULT_TIMEOUT);
    refused(resolver.resolve(&at).await, ErrorKind::NotFound);
    let message = refused(unplugger.unplug(&at).await, ErrorKind::Busy);
    assert!(message.contains("still looking for scsi:0/5"), "{message}");
    // Another address is not concerned.
    unplugger.unplug(&locator("scsi:0/6")).await.unwrap();
    assert_eq!(std::fs::read_to_string(&scan.0).unwrap(), "0 0 5");
    unplugger.unplug(&at).await.unwrap();
}

#[tokio::test]
async fn root_the_kernel_does_not_look_for_a_disk_that_nobody_waits_for() {
    let tree = Tree::new();
    tree.host(FIRST, 3);
    let scan = slow_scan(&tree);
    let (resolver, at) = (resolver(&tree), locator("scsi:0/5"));
    // The second scan has its turn after the first, and is not wanted any more by then.
    refused(resolver.resolve(&at).await, ErrorKind::NotFound);
    refused(resolver.resolve(&at).await, ErrorKind::NotFound);
    let (sender, scans) = std::sync::mpsc::channel();
    let path = scan.0.clone();
    std::thread::spawn(move || {
        while let Ok(written) = std::fs::read_to_string(&path) {
            let _the_test_is_over = sender.send(written);
        }
    });
    tokio::time::sleep(DEFAULT_TIMEOUT).await;
    assert_eq!(scans.try_iter().collect::<String>(), "0 0 5");
}

#[tokio::test]
async fn g10_a_controller_that_there_is_not_is_an_error_and_no_panic() {
    let tree = Tree::new();
    for at in ["scsi:2/0", "scsi:63/0"] {
        let message = refused(
            resolver(&tree).resolve(&locator(at)).await,
            ErrorKind::Invalid,
        );
        assert!(message.contains("knows 2 controllers"), "{message}");
        refused(
            unplugger(&tree).unplug(&locator(at)).await,
            ErrorKind::Invalid,
        );
    }
    let resolver = resolver(&tree);
    for (at, kind) in [
        ("scsi:64/0", ErrorKind::Invalid),
        ("scsi:0", ErrorKind::Invalid),
        ("vpmem:0", ErrorKind::Unsuitable),
    ] {
        refused(resolver.resolve(&locator(at)).await, kind);
    }
}

#[tokio::test]
async fn root_g11_waits_are_bounded_and_the_error_says_what_was_missing() {
    let tree = Tree::new();
    let missing = async |what: &str| {
        let started = Instant::now();
        let result = resolver(&tree).resolve(&locator("scsi:0/5")).await;
        let message = refused(result, ErrorKind::NotFound);
        assert!(
            message.starts_with("cannot find scsi:0/5: ") && message.contains(what),
            "{message}"
        );
        let took = started.elapsed();
        assert!(
            took >= DEFAULT_TIMEOUT && took < DEFAULT_TIMEOUT * 10,
            "{took:?}"
        );
    };
    missing("there is no controller at PCI address 0000:00:10.0").await;
    tree.write("bus/pci/devices/0000:00:10.0/uevent", "");
    missing("has no SCSI host").await;
    tree.host(FIRST, 3);
    missing(
        "there is no LUN 5 on SCSI host 3, which is the controller at PCI address 0000:00:10.0",
    )
    .await;
    tree.write("bus/scsi/devices/3:0:0:5/state", "blocked\n");
    missing("3:0:0:5 is blocked and not running").await;
    tree.write("bus/scsi/devices/3:0:0:5/state", "running\n");
    missing("there is no block device in ").await;
}

#[tokio::test]
async fn root_g11_g15_a_node_that_is_missing_or_another_is_not_taken() {
    let tree = Tree::new();
    let (disk, other) = (Loop::new(), Loop::new());
    let missing = async |what: &str| {
        let result = resolver(&tree).resolve(&locator("scsi:0/5")).await;
        let message = refused(result, ErrorKind::NotFound);
        assert!(message.contains(what), "{message}");
    };
    disk_with_node(&tree, &disk, "blockmount-no-such-node");
    missing("device /dev/blockmount-no-such-node is not ready").await;
    let name = other.node().file_name().unwrap().to_str().unwrap();
    disk_with_node(&tree, &disk, name);
    missing(&format!(
        "is block device {} and not {}",
        other.number(),
        disk.number()
    ))
    .await;
    disk_with_node(&tree, &disk, "../etc/passwd");
    missing("there is no name of a block device").await;
}

/// Waits for a file of the tree, of which nothing is announced.
async fn until(is_there: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_there() {
        assert!(Instant::now() < deadline, "it was not written");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The kernel is asked once, for exactly the LUN that is missing, and not before half of the time is over.
#[tokio::test]
async fn root_a_disk_that_is_not_announced_is_asked_for_and_awaited() {
    let tree = Tree::new();
    let disk = Loop::new();
    tree.host(FIRST, 3);
    let timeout = Duration::from_secs(6);
    let resolver = resolver(&tree).with_timeout(timeout);
    let started = Instant::now();
    let at = locator("scsi:0/300");
    let waiting = tokio::spawn(async move { resolver.resolve(&at).await });
    tokio::time::sleep(timeout / 4).await;
    assert_eq!(tree.read("class/scsi_host/host3/scan"), "");
    until(|| !tree.read("class/scsi_host/host3/scan").is_empty()).await;
    assert!(started.elapsed() >= timeout / 2);
    assert_eq!(tree.read("class/scsi_host/host3/scan"), "0 0 16684");
    tree.disk("3:0:0:16684", &disk);
    let found = waiting.await.unwrap().unwrap();
    assert_eq!(found.path, disk.node());
    assert!(started.elapsed() < timeout);
}

/// A burst of hot-plugs can have a disk refuse to say its size, and it has none until the kernel asks again.
#[tokio::test]
async fn root_a_disk_without_bytes_is_asked_for_its_size_again() {
    let tree = Tree::new();
    let disks = [Loop::new(), Loop::new()];
    tree.host(FIRST, 3);
    for (lun, disk) in disks.iter().enumerate() {
        tree.disk(&format!("3:0:0:{lun}"), disk);
        tree.write(&format!("bus/scsi/devices/3:0:0:{lun}/rescan"), "");
    }
    let name = disks[0].node().file_name().unwrap().to_str().unwrap();
    tree.write(
        &format!("bus/scsi/devices/3:0:0:0/block/{name}/size"),
        "0\n",
    );
    for (lun, asked) in ["1", ""].into_iter().enumerate() {
        let at = locator(&format!("scsi:0/{lun}"));
        let found = resolver(&tree).resolve(&at).await.unwrap();
        assert_eq!(found.path, disks[lun].node());
        assert_eq!(
            tree.read(&format!("bus/scsi/devices/3:0:0:{lun}/rescan")),
            asked
        );
    }
}

/// The kernel may have found a disk anew after it was unplugged, and missed that another is in its place.
#[tokio::test]
async fn root_a_disk_is_measured_where_another_was_unplugged_and_nowhere_else() {
    let tree = Tree::new();
    let disk = Loop::new();
    tree.host(FIRST, 3);
    let resolver = resolver(&tree);
    let (at, asked) = (locator("scsi:0/5"), "bus/scsi/devices/3:0:0:5/rescan");
    let put = || {
        tree.write(asked, "");
        tree.disk("3:0:0:5", &disk);
    };
    put();
    assert!(!resolver.measure(&at).await.unwrap());
    assert_eq!(tree.read(asked), "");
    tree.remove("bus/scsi/devices/3:0:0:5");
    let unplugger = ScsiUnplugger::new(resolver.clone());
    unplugger.unplug(&at).await.unwrap();
    assert!(!resolver.measure(&at).await.unwrap(), "there is none");
    put();
    // The kernel has nothing new to say.
    assert!(!resolver.measure(&at).await.unwrap());
    assert_eq!(tree.read(asked), "1");
}

/// Its number is that of the disk before it.
#[tokio::test]
async fn root_a_disk_that_the_kernel_counts_as_another_is_not_opened() {
    let tree = Tree::new();
    let disk = Loop::new();
    let node = disk.node().file_name().unwrap().to_str().unwrap();
    disk_with_node(&tree, &disk, node);
    let at = locator("scsi:0/5");
    resolver(&tree).resolve(&at).await.unwrap();
    let uevent = format!("bus/scsi/devices/3:0:0:5/block/{node}/uevent");
    let said = tree.read(&uevent);
    let Some((rest, count)) = said.trim_end().split_once("DISKSEQ=") else {
        panic!("this kernel does not count its disks: {said}");
    };
    let other = count.parse::<u64>().unwrap() + 1;
    tree.write(&uevent, format!("{rest}DISKSEQ={other}\n"));
    let message = refused(resolver(&tree).resolve(&at).await, ErrorKind::NotFound);
    let why = format!("another disk has taken the name {}", disk.node().display());
    assert!(message.ends_with(&why), "{message}");
}

/// Page 0x80 of a disk's vital product data.
fn serial_page(serial: &str) -> Vec<u8> {
    let length = u8::try_from(serial.len()).unwrap();
    [&[0, 0x80, 0, length], serial.as_bytes()].concat()
}

#[tokio::test]
async fn root_a_disk_with_the_serial_number_of_another_address_is_never_mounted() {
    let tree = Tree::new();
    let disk = Loop::new();
    tree.host(FIRST, 3);
    tree.disk("3:0:0:5", &disk);
    let (page, at) = ("bus/scsi/devices/3:0:0:5/vpd_pg80", locator("scsi:0/5"));
    let resolver = resolver(&tree);
    // Its own, one that the hypervisor has chosen, and none.
    for serial in ["bm-scsi-0-5", "6002248000", "bm-scsi-0-05", ""] {
        tree.write(page, serial_page(serial));
        assert_eq!(resolver.resolve(&at).await.unwrap().path, disk.node());
    }
    for serial in ["bm-scsi-0-6", "bm-scsi-1-5"] {
        tree.write(page, serial_page(serial));
        let message = refused(resolver.resolve(&at).await, ErrorKind::Conflict);
        let why = format!("its serial number is {serial} and not bm-scsi-0-5");
        assert!(message.ends_with(&why), "{message}");
    }
    // The disk before it is there still when the new one is waited for.
    let resolver = resolver.with_timeout(Duration::from_secs(20));
    let waiting = tokio::spawn(async move { resolver.resolve(&at).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    tree.write(page, serial_page("bm-scsi-0-5"));
    waiting.await.unwrap().unwrap();
}

/// The device is held while it is deleted, so that nobody can start to use it in between.
#[tokio::test]
async fn root_g21_a_disk_is_proven_free_deleted_and_awaited() {
    let tree = Tree::new();
    let disk = Loop::new();
    tree.host(FIRST, 3);
    tree.disk("3:0:0:5", &disk);
    let at = locator("scsi:0/5");
    let delete = "bus/scsi/devices/3:0:0:5/delete";
    let used = device::prove_free(disk.node()).unwrap();
    let message = refused(unplugger(&tree).unplug(&at).await, ErrorKind::Busy);
    assert!(message.contains(disk.node().to_str().unwrap()), "{message}");
    assert_eq!(tree.read(delete), "", "what is in use stays as it was");
    drop(used);

    // A kernel that does not remove it in time.
    let message = refused(unplugger(&tree).unplug(&at).await, ErrorKind::Uncertain);
    assert!(message.contains("3:0:0:5 is there still"), "{message}");
    assert_eq!(tree.read(delete), "1");
    device::prove_free(disk.node()).unwrap();

    let with_long_wait = unplugger(&tree).with_removal_deadline(Duration::from_secs(20));
    let waiting = {
        let (with_long_wait, at) = (with_long_wait.clone(), at.clone());
        tokio::spawn(async move { with_long_wait.unplug(&at).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    tree.remove("bus/scsi/devices/3:0:0:5");
    waiting.await.unwrap().unwrap();
    for _ in 0..2 {
        with_long_wait.unplug(&at).await.unwrap();
    }
}

/// A disk with LUN 0 was plugged in meanwhile, and the kernel has looked for all disks of the target.
#[tokio::test]
async fn root_a_disk_that_the_kernel_finds_anew_is_deleted_again() {
    let tree = Tree::new();
    let (disk, anew) = (Loop::new(), Loop::new());
    tree.host(FIRST, 3);
    tree.disk("3:0:0:5", &disk);
    let device = "bus/scsi/devices/3:0:0:5";
    let delete = format!("{device}/delete");
    let unplugger = unplugger(&tree).with_removal_deadline(Duration::from_secs(20));
    let at = locator("scsi:0/5");
    let waiting = tokio::spawn(async move { unplugger.unplug(&at).await });
    let deleted = || tree.read(&delete) == "1";
    until(deleted).await;
    // Both are there for a moment, so that the second has a number of its own.
    tree.rename(device, "deleted");
    tree.disk("3:0:0:5", &anew);
    until(deleted).await;
    assert!(!waiting.is_finished());
    tree.remove(device);
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn root_what_is_not_there_is_unplugged_and_what_is_no_disk_needs_no_proof() {
    let tree = Tree::new();
    let unplugger = unplugger(&tree);
    let at = locator("scsi:1/0");
    unplugger.unplug(&at).await.unwrap();
    tree.host(SECOND, 4);
    unplugger.unplug(&at).await.unwrap();
    tree.write("bus/scsi/devices/4:0:0:0/delete", "");
    refused(unplugger.unplug(&at).await, ErrorKind::Uncertain);
    assert_eq!(tree.read("bus/scsi/devices/4:0:0:0/delete"), "1");
}

/// Without a node nothing can be proven, and nothing is deleted.
#[tokio::test]
async fn root_a_disk_that_cannot_be_opened_is_not_deleted() {
    let tree = Tree::new();
    let disk = Loop::new();
    disk_with_node(&tree, &disk, "blockmount-no-such-node");
    let message = refused(
        unplugger(&tree).unplug(&locator("scsi:0/5")).await,
        ErrorKind::Other,
    );
    assert!(message.contains("cannot prove"), "{message}");
    assert_eq!(tree.read("bus/scsi/devices/3:0:0:5/delete"), "");
}

/// A disk that the kernel has found anew is in sysfs before its node is there.
#[tokio::test]
async fn root_i09_a_disk_whose_node_comes_late_is_waited_for() {
    let tree = Tree::new();
    let disk = Loop::new();
    let late = format!("blockmount-late-{}", std::process::id());
    disk_with_node(&tree, &disk, &late);
    let patient = Duration::from_secs(20);
    let unplugger = unplugger(&tree)
        .with_timeout(patient)
        .with_removal_deadline(patient);
    let at = locator("scsi:0/5");
    let waiting = tokio::spawn(async move { unplugger.unplug(&at).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    let node = std::path::Path::new("/dev").join(late);
    std::os::unix::fs::symlink(disk.node(), &node).unwrap();
    until(|| tree.read("bus/scsi/devices/3:0:0:5/delete") == "1").await;
    std::fs::remove_file(node).unwrap();
    tree.remove("bus/scsi/devices/3:0:0:5");
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_wait_that_is_given_up_leaves_nothing_behind() {
    let tree = Tree::new();
    let resolver = resolver(&tree).with_timeout(Duration::from_secs(60));
    let sockets = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = sockets();
    for _ in 0..20 {
        let at = locator("scsi:0/0");
        let waiting = tokio::time::timeout(Duration::from_millis(20), resolver.resolve(&at));
        assert!(waiting.await.is_err());
    }
    // Other tests open and close theirs meanwhile.
    assert!(
        sockets() < before + 20,
        "{before} before, {} now",
        sockets()
    );
}
