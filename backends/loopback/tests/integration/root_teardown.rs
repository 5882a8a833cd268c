//! Taking devices out: busy ones, half-done ones, and what is left when nobody does.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{self, Bench, Mounted, with_mark};
use blockmount::{BackendError, Disk, ErrorKind, Resolver, Transport, Unplugger};
use blockmount_loopback::{LoopTransport, LoopUnplugger};

const MIB: u64 = 1 << 20;

/// One attached image with a filesystem.
async fn attached(bench: &Bench, transport: &LoopTransport) -> (Disk, PathBuf) {
    let disk = Disk::virtual_disk(bench.ext4("a.img"));
    let locator = transport.attach_identified(&disk).await.unwrap();
    (
        disk,
        PathBuf::from(format!("/dev/loop{}", locator.address())),
    )
}

fn assert_busy(error: &BackendError, user: &str) {
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(
        error.message().contains(user),
        "{error} does not name {user:?}"
    );
}

#[tokio::test]
async fn root_a_device_that_is_open_is_busy_until_it_is_closed() {
    let bench = Bench::new();
    let transport = bench.transport();
    let (disk, device) = attached(&bench, &transport).await;
    let open = fs::File::open(&device).unwrap();
    for _ in 0..2 {
        assert_busy(
            &transport.detach(&disk).await.unwrap_err(),
            &std::process::id().to_string(),
        );
        assert_eq!((transport.map().len(), bench.bound().len()), (1, 1));
    }
    drop(open);
    transport.detach(&disk).await.unwrap();
    assert_eq!((transport.map(), bench.bound()), (vec![], vec![]));
}

#[tokio::test]
async fn root_a_device_that_is_closed_in_time_is_not_busy() {
    let bench = Bench::new();
    let transport = bench
        .builder()
        .busy_timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    let (disk, device) = attached(&bench, &transport).await;
    let open = fs::File::open(&device).unwrap();
    let detaching = tokio::spawn({
        let (transport, disk) = (transport.clone(), disk.clone());
        async move { transport.detach(&disk).await }
    });
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(!detaching.is_finished());
    drop(open);
    detaching.await.unwrap().unwrap();
    assert_eq!(bench.bound(), []);
}

#[tokio::test]
async fn root_a_device_that_is_mounted_is_busy_until_it_is_unmounted() {
    let bench = Bench::new();
    let transport = bench.transport();
    let (disk, device) = attached(&bench, &transport).await;
    let locator = format!("loop:{}", transport.map()[0].number)
        .parse()
        .unwrap();
    let unplugger = LoopUnplugger::with_timeout(Duration::from_millis(30));
    let target = bench.path("m");
    let mounted = Mounted::new(&device, &target);
    let name = target.to_str().unwrap();
    assert_busy(&unplugger.unplug(&locator).await.unwrap_err(), name);
    assert_busy(&transport.detach(&disk).await.unwrap_err(), name);
    fs::write(target.join("still"), "writable").unwrap();
    drop(mounted);
    unplugger.unplug(&locator).await.unwrap();
    assert_eq!(
        bench.bound().len(),
        1,
        "an unplugged device is still attached"
    );
    transport.detach(&disk).await.unwrap();
    assert_eq!(bench.bound(), []);
    unplugger.unplug(&locator).await.unwrap();
    // What was written is in the file.
    transport.attach_identified(&disk).await.unwrap();
    let again = Mounted::new(
        &PathBuf::from(format!("/dev/loop{}", transport.map()[0].number)),
        &target,
    );
    assert_eq!(
        fs::read_to_string(target.join("still")).unwrap(),
        "writable"
    );
    drop(again);
    transport.detach(&disk).await.unwrap();
}

#[tokio::test]
async fn root_a_detach_that_nobody_waits_for_is_done_all_the_same() {
    let bench = Bench::new();
    let transport = bench.transport();
    let (disk, _) = attached(&bench, &transport).await;
    let _ = tokio::time::timeout(Duration::ZERO, transport.detach(&disk)).await;
    transport.detach(&disk).await.unwrap();
    bench.assert_nothing_left();
    assert_eq!(transport.map(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_an_attach_that_nobody_waits_for_leaves_nothing() {
    let bench = Bench::new();
    let transport = bench.builder().max_devices(1).build().unwrap();
    let disk = Disk::virtual_disk(bench.image("a.img", MIB));
    let mut given_up = 0;
    for round in 0..60 {
        // Sooner than a timer could: an attach takes less than a millisecond.
        let give_up = async {
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
        };
        let answer = tokio::select! {
            biased;
            answer = transport.attach_identified(&disk) => Some(answer),
            () = give_up => None,
        };
        match answer {
            Some(Ok(_)) => transport.detach(&disk).await.unwrap(),
            // The one before has not quite let go of the only slot or of the file.
            Some(Err(error)) => {
                assert!(
                    matches!(error.kind(), ErrorKind::Full | ErrorKind::Conflict),
                    "{error}"
                );
            }
            None => given_up += 1,
        }
        assert_eq!(transport.map(), []);
    }
    assert!(
        given_up > 0,
        "no attach was given up, so this shows nothing"
    );
    // The last one may still be on its way out.
    let deadline = Instant::now() + Duration::from_secs(60);
    while transport.attach_identified(&disk).await.is_err() {
        assert!(Instant::now() < deadline, "the slot never came back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transport.detach(&disk).await.unwrap();
    bench.assert_nothing_left();
}

#[tokio::test]
async fn root_a_transport_that_is_dropped_leaves_nothing() {
    let bench = Bench::new();
    let transport = bench.transport();
    attached(&bench, &transport).await;
    assert_eq!(bench.bound().len(), 1);
    drop(transport);
    assert_eq!(bench.bound(), []);
}

/// Not a test of its own: what the next one runs as a process, and kills.
#[tokio::test]
async fn root_process_to_be_killed() {
    let Ok(mark) = std::env::var("BLOCKMOUNT_TEST_MARK") else {
        return;
    };
    let dir = PathBuf::from(std::env::var("BLOCKMOUNT_TEST_DIR").unwrap());
    let transport = LoopTransport::builder().mark(mark).build().unwrap();
    for name in ["mounted.img", "other.img"] {
        transport
            .attach_identified(&Disk::virtual_disk(dir.join(name)))
            .await
            .unwrap();
    }
    let device = format!("/dev/loop{}", transport.map()[0].number);
    std::mem::forget(Mounted::new(device.as_ref(), &dir.join("m")));
    println!("\nready");
    std::future::pending::<()>().await;
}

#[test]
fn root_a_killed_process_leaves_only_what_is_mounted() {
    let bench = Bench::new();
    bench.ext4("mounted.img");
    bench.image("other.img", MIB);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "root_teardown::root_process_to_be_killed",
            "--nocapture",
        ])
        .env("BLOCKMOUNT_TEST_MARK", &bench.mark)
        .env("BLOCKMOUNT_TEST_DIR", bench.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap() == "ready"),
        "the process ended before it was killed"
    );
    assert_eq!(with_mark(&bench.mark).len(), 2);
    child.kill().unwrap();
    child.wait().unwrap();

    let left = with_mark(&bench.mark);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].backing_file(), &bench.path("mounted.img"));
    let busy = left[0].unbind(Duration::from_millis(20)).unwrap_err();
    assert_busy(&busy, bench.path("m").to_str().unwrap());
    common::run("umount", &[bench.path("m").to_str().unwrap()]);
    bench.assert_nothing_left();
    left[0].unbind(Duration::from_millis(20)).unwrap();
}

#[tokio::test]
async fn root_x07_a_device_that_did_not_take_what_was_written_is_unplugged_and_says_so() {
    let bench = Bench::new();
    let small = bench.path("small");
    fs::create_dir(&small).unwrap();
    let small = small.to_str().unwrap();
    common::run("mount", &["-t", "tmpfs", "-o", "size=1m", "small", small]);
    let disk = Disk::virtual_disk(bench.image("small/image", 8 * MIB));
    let transport = bench.transport();
    let locator = transport.attach_identified(&disk).await.unwrap();
    let node = transport.resolve(&locator).await.unwrap().path;
    // The page cache takes it.
    let mut open = fs::File::options().write(true).open(node).unwrap();
    open.write_all(&vec![1; 4 * MIB as usize]).unwrap();
    drop(open);
    let unplugger = LoopUnplugger::default();
    let lost = unplugger.unplug(&locator).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::LostWrites, "{lost}");
    unplugger.unplug(&locator).await.unwrap();
    transport.detach(&disk).await.unwrap();
    bench.assert_nothing_left();
    common::run("umount", &[small]);
}
