//! The laws that every transport, resolver and unplugger must keep, on real loop devices.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockmount::Disk;
use blockmount::testing::conformance::{self, GuestFixture, Snapshot, TransportFixture};
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopResolver, LoopTransport, LoopUnplugger, SCHEME};
use common::{Bench, with_mark};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_transport_keeps_the_laws() {
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
    .remove_source(|disk| std::fs::remove_file(disk.source()).unwrap());
    let passed = conformance::transport(&transport, &fixture).await;
    assert!(passed.successes > 0, "{passed:?}");
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_transport_as_a_resolver_keeps_the_laws() {
    let bench = Bench::new();
    let transport = bench.transport();
    let passed = conformance::resolver(&transport, &guest_fixture(&bench, &transport)).await;
    assert!(passed.successes > 0, "{passed:?}");
    bench.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_loop_unplugger_keeps_the_laws() {
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
    assert!(passed.successes > 0, "{passed:?}");
    bench.assert_nothing_left();
}
