//! The checks that every transport, resolver and unplugger must pass, on real loop devices.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Bench, with_mark};
use async_trait::async_trait;
use blockmount::Disk;
use blockmount::testing::VmStep;
use blockmount::testing::conformance::{
    self, Fault, Faults, GuestFixture, Snapshot, TransportFixture,
};
use blockmount_linux::{LinuxGuest, mountinfo};
use blockmount_loopback::{BoundLoop, LoopResolver, LoopTransport, LoopUnplugger, SCHEME};

/// The devices with our mark, and the mounts in our directory.
fn snapshot(bench: &Bench) -> impl Snapshot + use<> {
    let (mark, dir) = (
        bench.mark.clone(),
        bench.dir.path().to_str().unwrap().to_owned(),
    );
    move || {
        let devices = with_mark(&mark)
            .into_iter()
            .map(|bound| format!("{bound:?}"));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = mounts
            .lines()
            .filter(|line| line.contains(&dir))
            .map(str::to_owned);
        devices.chain(mounts).collect()
    }
}

/// Keeps the devices or the mounts of a bench open, so that they are busy.
struct HoldOpen {
    mark: String,
    dir: PathBuf,
    held: Mutex<Vec<File>>,
}

impl HoldOpen {
    fn new(bench: &Bench) -> Self {
        HoldOpen {
            mark: bench.mark.clone(),
            dir: bench.dir.path().to_owned(),
            held: Mutex::default(),
        }
    }
}

#[async_trait]
impl Faults for HoldOpen {
    async fn inject(&self, step: VmStep, fault: Fault) -> bool {
        if fault != Fault::Busy {
            return false;
        }
        let mounts = mountinfo::read().unwrap();
        let points = mounts.iter().map(|mount| &mount.mount_point);
        let ours = points.filter(|point| point.starts_with(&self.dir));
        let open = |bound: &BoundLoop| {
            let mut options = File::options();
            options
                .read(true)
                .custom_flags(rustix::fs::OFlags::EXCL.bits() as i32);
            options.open(bound.node()).unwrap()
        };
        let held = match step {
            VmStep::Detach | VmStep::Unplug => with_mark(&self.mark).iter().map(open).collect(),
            VmStep::Unmount | VmStep::Separate | VmStep::Unbind => {
                ours.map(|at| File::open(at).unwrap()).collect()
            }
            _ => return false,
        };
        *self.held.lock().unwrap() = held;
        true
    }

    async fn clear(&self) {
        self.held.lock().unwrap().clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_transport_passes_the_checks() {
    let bench = Bench::new();
    let transport = bench.builder().max_devices(3).build().unwrap();
    let disks = ["a", "b", "c", "d"].map(|name| Disk::virtual_disk(bench.image(name, 1 << 20)));
    std::os::unix::fs::symlink("a", bench.path("link")).unwrap();
    std::fs::hard_link(bench.path("a"), bench.path("hard")).unwrap();
    let up = "../".repeat(std::env::current_dir().unwrap().components().count());
    let relative = PathBuf::from(up).join(bench.path("a").strip_prefix("/").unwrap());
    let fixture = TransportFixture::new(
        disks,
        Disk::virtual_disk(bench.path("none")),
        snapshot(&bench),
    )
    .aliases([bench.path("link"), bench.path("hard"), relative].map(Disk::virtual_disk))
    .capacity(3)
    .remove_source(|disk| std::fs::remove_file(disk.source()).unwrap())
    .faults(HoldOpen::new(&bench));
    let passed = conformance::transport(&transport, &fixture).await;
    println!("{passed}");
    assert!(passed.successes > 0, "{passed}");
    bench.assert_nothing_left();
}

fn guest_fixture(bench: &Bench, transport: &LoopTransport) -> GuestFixture {
    let disks = ["a", "b"].map(|name| Disk::virtual_disk(bench.ext4(name)).read_only());
    GuestFixture::new(
        transport.clone(),
        LoopUnplugger::default(),
        disks,
        bench.path("m"),
        snapshot(bench),
    )
    .faults(HoldOpen::new(bench))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_transport_as_a_resolver_passes_the_checks() {
    let bench = Bench::new();
    let transport = bench.transport();
    let passed = conformance::resolver(&transport, &guest_fixture(&bench, &transport)).await;
    println!("{passed}");
    assert!(passed.successes > 0, "{passed}");
    bench.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_unplugger_passes_the_checks() {
    let bench = Bench::new();
    let unplugger = LoopUnplugger::with_timeout(Duration::from_millis(200));
    let mounter = LinuxGuest::builder()
        .resolver(SCHEME, Arc::new(LoopResolver))
        .build();
    let passed = conformance::unplugger(
        &unplugger,
        Some(&mounter),
        &guest_fixture(&bench, &bench.transport()),
    )
    .await;
    println!("{passed}");
    assert!(passed.successes > 0, "{passed}");
    bench.assert_nothing_left();
}

fn linux_guest() -> LinuxGuest {
    LinuxGuest::builder()
        .resolver(SCHEME, Arc::new(LoopResolver))
        .busy_timeout(Duration::from_millis(200))
        .build()
}

/// A guest whose disks can also be blank, written to, and of one filesystem together.
fn full_fixture(bench: &Bench) -> GuestFixture {
    let [merged, blob] = bench
        .erofs_with_blob()
        .map(|image| Disk::virtual_disk(image).read_only());
    guest_fixture(bench, &bench.transport())
        .several(merged, [blob])
        .blank(Disk::virtual_disk(bench.image("blank", 1 << 20)).read_only())
        .scratch(Disk::virtual_disk(bench.ext4("scratch")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_linux_guest_passes_the_checks_of_a_mounter() {
    let bench = Bench::new();
    let passed = conformance::mounter(&linux_guest(), &full_fixture(&bench)).await;
    println!("{passed}");
    assert!(passed.successes > 0, "{passed}");
    bench.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_linux_guest_passes_the_checks_of_a_combiner() {
    let bench = Bench::new();
    let guest = linux_guest();
    let passed = conformance::combiner(&guest, &guest, &full_fixture(&bench)).await;
    println!("{passed}");
    assert!(passed.successes > 0, "{passed}");
    bench.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_linux_guest_passes_the_checks_of_a_binder() {
    let bench = Bench::new();
    let guest = linux_guest();
    let passed = conformance::binder(&guest, &guest, &full_fixture(&bench)).await;
    println!("{passed}");
    assert!(passed.successes > 20, "{passed}");
    bench.assert_nothing_left();
}
