//! Loop devices of a process that was killed.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{self, Bench, Mounted};
use blockmount::testing::AttachIdentified as _;
use blockmount::{DeviceLocator, Disk, Presence, Resolver, Transport};
use blockmount_loopback::LoopTransport;
use blockmount_source::image_lock::{self, Access};

/// The image and the mark of the child; without them, its test does nothing.
const IMAGE: &str = "BLOCKMOUNT_TEST_IMAGE";
const MARK: &str = "BLOCKMOUNT_TEST_MARK";

/// Not a test of its own: the process that is killed.
#[tokio::test]
async fn root_process_that_attaches() {
    let (Ok(image), Ok(mark)) = (std::env::var(IMAGE), std::env::var(MARK)) else {
        return;
    };
    let transport = LoopTransport::builder().mark(&mark).build().unwrap();
    let disk = Disk::virtual_disk(image).read_only();
    let locator = transport.attach_identified(&disk).await.unwrap();
    let node = transport.resolve(&locator).await.unwrap().path;
    println!("\nattached {locator} {}", node.display());
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Attaches a disk in another process, has `work` do something with its node, and kills the process.
fn attached_and_killed<T>(
    bench: &Bench,
    image: &Path,
    work: impl FnOnce(&Path) -> T,
) -> (DeviceLocator, T) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "root_adopt::root_process_that_attaches",
            "--nocapture",
        ])
        .env(IMAGE, image)
        .env(MARK, &bench.mark)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines.find_map(|line| line.unwrap().strip_prefix("attached ").map(str::to_owned));
    let said = said.expect("the child failed");
    let (locator, node) = said.split_once(' ').unwrap();
    let done = work(Path::new(node));
    child.kill().unwrap();
    child.wait().unwrap();
    (locator.parse().unwrap(), done)
}

#[tokio::test]
async fn root_the_device_of_a_killed_process_is_adopted_while_it_is_mounted() {
    for is_known in [true, false] {
        let bench = Bench::new();
        let image = bench.ext4("a.img");
        let target = bench.path("m");
        let mount = |node: &Path| {
            std::fs::create_dir_all(&target).unwrap();
            common::run(
                "mount",
                &["-o", "ro", node.to_str().unwrap(), target.to_str().unwrap()],
            );
        };
        let (locator, ()) = attached_and_killed(&bench, &image, mount);
        // The device keeps its process's locks.
        let other = std::fs::File::open(&image).unwrap();
        assert!(!image_lock::lock(&other, Access::Write, Duration::ZERO));
        let (transport, disk) = (bench.transport(), Disk::virtual_disk(&image).read_only());
        let id = transport.identify(&disk).await.unwrap();
        // The file may be gone by now.
        std::fs::remove_file(&image).unwrap();
        let known = is_known.then_some(&locator);
        let found = transport.adopt(&disk, &id, known).await.unwrap();
        assert_eq!(found, Presence::Present(locator.clone()));
        assert_eq!((transport.map().len(), bench.bound().len()), (1, 1));
        transport.resolve(&locator).await.unwrap();
        assert!(transport.detach(&disk).await.is_err(), "it is mounted");
        common::run("umount", &[target.to_str().unwrap()]);
        transport.detach(&disk).await.unwrap();
        bench.assert_nothing_left();
    }
}

#[tokio::test]
async fn root_what_nobody_has_mounted_goes_with_its_process() {
    let bench = Bench::new();
    let image = bench.image("a.img", 4096);
    let (locator, ()) = attached_and_killed(&bench, &image, |_| ());
    bench.assert_nothing_left();
    let (transport, disk) = (bench.transport(), Disk::virtual_disk(&image).read_only());
    let id = transport.identify(&disk).await.unwrap();
    for known in [Some(&locator), None] {
        let found = transport.adopt(&disk, &id, known).await.unwrap();
        assert_eq!(found, Presence::Absent);
    }
    assert_eq!(transport.map(), []);
}

#[tokio::test]
async fn root_u03_a_device_that_others_have_at_the_remembered_number_is_left_alone() {
    let (ours, theirs) = (Bench::new(), Bench::new());
    let image = theirs.ext4("theirs.img");
    let their_disk = Disk::virtual_disk(&image).read_only();
    let their_transport = theirs.transport();
    let locator = their_transport
        .attach_identified(&their_disk)
        .await
        .unwrap();
    let node = their_transport.resolve(&locator).await.unwrap().path;
    let mounted = Mounted::new(&node, &theirs.path("m"));
    let transport = ours.transport();
    // Another disk, and the very disk with another mark or access.
    let our_disk = Disk::virtual_disk(ours.image("ours.img", 4096)).read_only();
    for disk in [&our_disk, &their_disk, &Disk::virtual_disk(&image)] {
        let id = transport.identify(disk).await.unwrap();
        let found = transport.adopt(disk, &id, Some(&locator)).await.unwrap();
        assert_eq!(found, Presence::Absent, "{disk}");
        assert_eq!(
            transport.adopt(disk, &id, None).await.unwrap(),
            Presence::Absent
        );
        transport.detach(disk).await.unwrap();
    }
    assert_eq!((transport.map(), theirs.bound().len()), (vec![], 1));
    drop(mounted);
    their_transport.detach(&their_disk).await.unwrap();
    theirs.assert_nothing_left();
}
