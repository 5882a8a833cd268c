//! Finding persistent memory and unplugging it, over a made-up tree of devices whose disks are real loop
//! devices. What a real kernel does with the real tree is seen in a virtual machine.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use crate::sysfs::{Loop, Tree};
use blockmount::{BackendError, DeviceLocator, ErrorKind, Resolver, Unplugger};
use blockmount_linux::device;
use blockmount_vpmem::{DeviceNumber, PmemId, VpmemResolver, VpmemUnplugger};

const BRIDGE: &str = "0000:00:05.0";
const DEVICE: &str = "0000:02:00.0";
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(400);

fn ready(resolver: VpmemResolver, tree: &Tree) -> VpmemResolver {
    resolver
        .with_sysfs(tree.path())
        .with_timeout(DEFAULT_TIMEOUT)
}

fn unplugger(resolver: &VpmemResolver) -> VpmemUnplugger {
    VpmemUnplugger::new(resolver.clone())
        .with_timeout(Duration::from_millis(50))
        .with_removal_deadline(DEFAULT_TIMEOUT)
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

/// An NVDIMM with its region and its block device, as the firmware's table makes them.
fn nvdimm(tree: &Tree, dimm: u32, handle: u32, region: u32, address: u64, disk: &Loop) {
    let nd = "bus/nd/devices";
    tree.write(
        &format!("{nd}/nmem{dimm}/nfit/handle"),
        format!("{handle:#x}\n"),
    );
    tree.write(&format!("{nd}/region{region}/mappings"), "1\n");
    tree.write(
        &format!("{nd}/region{region}/mapping0"),
        format!("nmem{dimm},0,1048576,0\n"),
    );
    tree.write(
        &format!("{nd}/region{region}/resource"),
        format!("{address:#x}\n"),
    );
    tree.block(&format!("{nd}/region{region}/namespace{region}.0"), disk);
}

const REAL: &str = "devices/pci0000:00/0000:00:05.0/0000:02:00.0";
const NAMESPACE: &str = "virtio4/ndbus1/region0/namespace0.0";

/// A virtio-pmem device behind a bridge, in a slot for hot-plug.
fn virtio_pmem(tree: &Tree, disk: &Loop) {
    for (name, real) in [(BRIDGE, "devices/pci0000:00/0000:00:05.0"), (DEVICE, REAL)] {
        let link = tree.at(&format!("bus/pci/devices/{name}"));
        fs::create_dir_all(tree.at(real)).unwrap();
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&link);
        symlink(tree.at(real), link).unwrap();
    }
    tree.write("bus/pci/slots/0-2/address", "0000:02:00\n");
    tree.write("bus/pci/slots/0-2/power", "");
    tree.write("bus/pci/slots/0/address", "0000:01:00\n");
    tree.write("bus/pci/slots/0/power", "");
    tree.block(&format!("{REAL}/{NAMESPACE}"), disk);
}

fn take_out(tree: &Tree) {
    tree.remove(REAL);
    fs::remove_file(tree.at(&format!("bus/pci/devices/{DEVICE}"))).unwrap();
}

/// The second DIMM came first, and its region is the first: only handles and addresses tell them.
#[tokio::test]
async fn root_an_nvdimm_is_found_by_its_handle_or_its_address() {
    let tree = Tree::new();
    let (one, two) = (Loop::new(), Loop::new());
    nvdimm(&tree, 1, 1, 0, 0x1_4000_0000, &one);
    nvdimm(&tree, 0, 4, 1, 0x1_0000_0000, &two);
    let nfit = ready(VpmemResolver::nfit(), &tree);
    for (at, disk) in [("vpmem:0", &one), ("vpmem:3", &two)] {
        assert_eq!(nfit.resolve(&locator(at)).await.unwrap().path, disk.node());
    }
    let number = |number: u64| DeviceNumber::try_from(number).unwrap();
    let regions = VpmemResolver::new(|_| None)
        .with(number(5), PmemId::Region(0x1_4000_0000))
        .with(number(6), PmemId::Region(0x1_0000_0000));
    let regions = ready(regions, &tree);
    for (at, disk) in [("vpmem:5", &one), ("vpmem:6", &two)] {
        assert_eq!(
            regions.resolve(&locator(at)).await.unwrap().path,
            disk.node()
        );
    }
    let message = refused(
        regions.resolve(&locator("vpmem:0")).await,
        ErrorKind::Invalid,
    );
    assert!(message.contains("does not know"), "{message}");
    // A region of several DIMMs is none of them.
    tree.write("bus/nd/devices/region0/mappings", "2\n");
    let message = refused(nfit.resolve(&locator("vpmem:0")).await, ErrorKind::NotFound);
    assert!(
        message.ends_with("there is no NVDIMM with the NFIT handle 0x1"),
        "{message}"
    );
}

#[tokio::test]
async fn root_virtio_pmem_is_found_by_its_bridge_or_its_address() {
    let tree = Tree::new();
    let disk = Loop::new();
    let ports = ready(VpmemResolver::ports([BRIDGE.parse().unwrap()]), &tree);
    let pci = PmemId::Pci(DEVICE.parse().unwrap());
    let pci = ready(VpmemResolver::new(move |_| Some(pci)), &tree);
    let started = Instant::now();
    let message = refused(
        ports.resolve(&locator("vpmem:0")).await,
        ErrorKind::NotFound,
    );
    assert!(
        message.ends_with("there is no persistent memory behind the PCI bridge 0000:00:05.0"),
        "{message}"
    );
    assert!(started.elapsed() >= DEFAULT_TIMEOUT && started.elapsed() < DEFAULT_TIMEOUT * 10);
    let message = refused(pci.resolve(&locator("vpmem:0")).await, ErrorKind::NotFound);
    assert!(
        message.ends_with("at the PCI address 0000:02:00.0"),
        "{message}"
    );
    virtio_pmem(&tree, &disk);
    for resolver in [&ports, &pci] {
        let found = resolver.resolve(&locator("vpmem:0")).await.unwrap();
        assert_eq!(found.path, disk.node());
    }
    refused(ports.resolve(&locator("vpmem:1")).await, ErrorKind::Invalid);
    tree.remove(&format!("{REAL}/{NAMESPACE}"));
    let message = refused(pci.resolve(&locator("vpmem:0")).await, ErrorKind::NotFound);
    assert!(message.ends_with("has no block device yet"), "{message}");
}

#[tokio::test]
async fn root_a_range_must_be_inside_the_device() {
    let tree = Tree::new();
    let disk = Loop::new();
    nvdimm(&tree, 0, 1, 0, 0, &disk);
    let nfit = ready(VpmemResolver::nfit(), &tree);
    let found = nfit.resolve(&locator("vpmem:0@4096+8192")).await.unwrap();
    assert_eq!(found.range, Some(4096..12_288));
    let whole = nfit.resolve(&locator("vpmem:0@0+1048576")).await.unwrap();
    assert_eq!(whole.range, Some(0..Loop::SIZE));
    for beyond in ["vpmem:0@4096+1048576", "vpmem:0@1048576+4096"] {
        let message = refused(nfit.resolve(&locator(beyond)).await, ErrorKind::Invalid);
        assert!(message.contains("has 1048576 bytes"), "{message}");
    }
}

#[tokio::test]
async fn root_an_nvdimm_is_proven_free_and_stays() {
    let tree = Tree::new();
    let disk = Loop::new();
    nvdimm(&tree, 0, 1, 0, 0, &disk);
    let resolver = ready(VpmemResolver::nfit(), &tree);
    let unplugger = unplugger(&resolver);
    let used = device::prove_free(disk.node()).unwrap();
    for at in ["vpmem:0", "vpmem:0@0+4096"] {
        refused(unplugger.unplug(&locator(at)).await, ErrorKind::Busy);
    }
    drop(used);
    for at in ["vpmem:0", "vpmem:0@0+4096", "vpmem:1", "vpmem:1@0+4096"] {
        unplugger.unplug(&locator(at)).await.unwrap();
    }
    resolver.resolve(&locator("vpmem:0")).await.unwrap();
}

#[tokio::test]
async fn root_virtio_pmem_is_proven_free_ejected_from_its_own_slot_and_awaited() {
    let tree = Tree::new();
    let disk = Loop::new();
    virtio_pmem(&tree, &disk);
    let by_region = PmemId::Region(0x1_0000_0000);
    tree.write(
        &format!("{REAL}/virtio4/ndbus1/region0/resource"),
        "0x100000000\n",
    );
    fs::create_dir_all(tree.at("bus/nd/devices")).unwrap();
    symlink(
        tree.at(&format!("{REAL}/virtio4/ndbus1/region0")),
        tree.at("bus/nd/devices/region0"),
    )
    .unwrap();
    let at = locator("vpmem:0");
    for resolver in [
        VpmemResolver::ports([BRIDGE.parse().unwrap()]),
        VpmemResolver::new(move |_| Some(by_region)),
    ] {
        let resolver = ready(resolver, &tree);
        tree.write("bus/pci/slots/0-2/power", "");
        let unplugger = unplugger(&resolver);
        let used = device::prove_free(disk.node()).unwrap();
        refused(unplugger.unplug(&at).await, ErrorKind::Busy);
        assert_eq!(
            tree.read("bus/pci/slots/0-2/power"),
            "",
            "what is in use stays as it was"
        );
        drop(used);
        let message = refused(unplugger.unplug(&at).await, ErrorKind::Uncertain);
        assert!(message.contains("is there still"), "{message}");
        assert_eq!(tree.read("bus/pci/slots/0-2/power"), "0");
        assert_eq!(tree.read("bus/pci/slots/0/power"), "", "another slot");
    }
    let resolver = ready(VpmemResolver::ports([BRIDGE.parse().unwrap()]), &tree);
    let with_long_wait = unplugger(&resolver).with_removal_deadline(Duration::from_secs(20));
    let waiting = {
        let (with_long_wait, at) = (with_long_wait.clone(), at.clone());
        tokio::spawn(async move { with_long_wait.unplug(&at).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    take_out(&tree);
    waiting.await.unwrap().unwrap();
    for at in ["vpmem:0", "vpmem:0@0+4096"] {
        with_long_wait.unplug(&locator(at)).await.unwrap();
    }
}

/// The kernel has not made a disk of it yet, or has failed to: it can be given back all the same.
#[tokio::test]
async fn root_a_device_without_a_disk_is_ejected() {
    let tree = Tree::new();
    let disk = Loop::new();
    virtio_pmem(&tree, &disk);
    tree.remove(&format!("{REAL}/{NAMESPACE}"));
    let resolver = ready(VpmemResolver::ports([BRIDGE.parse().unwrap()]), &tree);
    refused(
        unplugger(&resolver).unplug(&locator("vpmem:0")).await,
        ErrorKind::Uncertain,
    );
    assert_eq!(tree.read("bus/pci/slots/0-2/power"), "0");
}
