//! The kernel's table of loop devices, which never shrinks, and devices without a node in `/dev`.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

#[path = "integration/common/mod.rs"]
mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, Resolver, Transport, Unplugger};
use blockmount_loopback::{LoopResolver, LoopTransport, LoopUnplugger};
use common::Bench;
use tokio::sync::Mutex;

/// The tests count all devices of the machine, so they run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// How many loop devices the kernel has, and the unbound ones of them.
fn devices() -> (usize, Vec<String>) {
    let names = fs::read_dir("/sys/block").unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let all: Vec<String> = names.filter(|name| name.starts_with("loop")).collect();
    let is_unbound = |name: &&String| !Path::new(&format!("/sys/block/{name}/loop")).exists();
    let mut unbound: Vec<String> = all.iter().filter(is_unbound).cloned().collect();
    unbound.sort_by_key(|name| name["loop".len()..].parse::<u32>().unwrap());
    (all.len(), unbound)
}

fn images(bench: &Bench, count: u32) -> Vec<Disk> {
    (0..count)
        .map(|index| Disk::virtual_disk(bench.image(&format!("{index}.img"), 4096)).read_only())
        .collect()
}

async fn all_at_once(transport: &LoopTransport, disks: &[Disk]) {
    let attaching = disks.iter().cloned().map(|disk| {
        let transport = transport.clone();
        tokio::spawn(async move { transport.attach_identified(&disk).await.unwrap() })
    });
    for attached in attaching.collect::<Vec<_>>() {
        attached.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_u07_the_kernels_table_does_not_grow_from_run_to_run() {
    const COUNT: u32 = 200;
    let _alone = ONE_AT_A_TIME.lock().await;
    let bench = Bench::new();
    let disks = images(&bench, COUNT);
    let (before, unbound) = devices();
    let missing = (COUNT as usize).saturating_sub(unbound.len());
    for run in 0..8 {
        let transport = bench.transport();
        all_at_once(&transport, &disks).await;
        assert_eq!(devices().0, before + missing, "in run {run}");
        for disk in &disks {
            transport.detach(disk).await.unwrap();
        }
    }
    bench.assert_nothing_left();
}

#[tokio::test]
async fn root_u07_a_free_device_that_another_process_claims_is_passed_over() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let bench = Bench::new();
    let transport = bench.transport();
    let disks = images(&bench, 2);
    all_at_once(&transport, &disks).await;
    for disk in &disks {
        transport.detach(disk).await.unwrap();
    }
    let (count, unbound) = devices();
    let claimed = Path::new("/dev").join(&unbound[0]);
    let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&claimed)
        .unwrap();
    transport.attach_identified(&disks[0]).await.unwrap();
    // The next, unless another process has unbound one meanwhile.
    let bound = format!("loop{}", transport.map()[0].number);
    assert!(
        unbound[1..].contains(&bound),
        "{bound} is not of {unbound:?}"
    );
    assert_eq!(devices().0, count);
    drop(held);
    transport.detach(&disks[0]).await.unwrap();
}

/// Not a test of its own: what the next one runs in a mount namespace of its own.
#[tokio::test]
async fn root_process_without_nodes() {
    let Ok(image) = std::env::var("BLOCKMOUNT_TEST_IMAGE") else {
        return;
    };
    let transport = LoopTransport::default();
    let disks = [
        Disk::virtual_disk(&image).read_only(),
        Disk::virtual_disk(format!("{image}.writable")),
    ];
    all_at_once(&transport, &disks).await;
    for entry in transport.map() {
        let locator = format!("loop:{}", entry.number).parse().unwrap();
        let node = transport.resolve(&locator).await.unwrap().path;
        assert_eq!(LoopResolver.resolve(&locator).await.unwrap().path, node);
        assert!(node.starts_with("/dev/blockmount"), "{}", node.display());
        let mounted = common::Mounted::new(&node, "/dev/m".as_ref());
        drop(mounted);
        LoopUnplugger::default().unplug(&locator).await.unwrap();
    }
    for disk in &disks {
        transport.detach(disk).await.unwrap();
    }
    let left = fs::read_dir("/dev/blockmount");
    assert!(left.is_err(), "{:?}", left.unwrap().collect::<Vec<_>>());
    println!("\nall is done");
}

#[tokio::test]
async fn root_u07_a_device_without_a_node_in_dev_gets_one_of_our_own() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let bench = Bench::new();
    let image = bench.ext4("a.img");
    bench.ext4("a.img.writable");
    let (before, unbound) = devices();
    let script = "set -e; mount --make-rprivate /; mkdir $DIR/dev; mount -t tmpfs dev $DIR/dev; \
        cp -a /dev/null /dev/loop-control $DIR/dev/; mount --move $DIR/dev /dev; \
        exec $PROGRAM --exact root_process_without_nodes --nocapture";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .env("DIR", bench.dir.path())
        .env("PROGRAM", std::env::current_exe().unwrap())
        .env("BLOCKMOUNT_TEST_IMAGE", &image)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("all is done"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(devices().0, before + 2_usize.saturating_sub(unbound.len()));
}
