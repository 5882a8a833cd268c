//! Which disks are attached, how, and which are refused with nothing left behind.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount::testing::AttachIdentified as _;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{Bench, run};
use blockmount::{BackendError, DeviceLocator, Disk, DiskOptions, ErrorKind, Resolver, Transport};
use blockmount_loopback::{LoopResolver, LoopTransport};
use blockmount_source::image_lock::{self, Access};

const MIB: u64 = 1 << 20;

async fn device_of(locator: &DeviceLocator) -> PathBuf {
    LoopResolver.resolve(locator).await.unwrap().path
}

/// Refused with a kind and a word of the message, and no device or slot is taken.
async fn refused(
    bench: &Bench,
    transport: &LoopTransport,
    disk: Disk,
    kind: ErrorKind,
    word: &str,
) {
    let error = transport.attach_identified(&disk).await.unwrap_err();
    assert_error(&error, kind, word);
    assert_eq!(
        (transport.map(), bench.bound()),
        (vec![], vec![]),
        "{disk} left something"
    );
}

fn assert_error(error: &BackendError, kind: ErrorKind, word: &str) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(
        error.message().contains(word),
        "{error:?} does not say {word:?}"
    );
    assert!(
        !error.message().ends_with('.') && !error.message().contains('\n'),
        "{error}"
    );
}

#[tokio::test]
async fn root_what_is_written_to_the_device_is_in_the_file() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = bench.image("a.img", MIB);
    let disk = Disk::virtual_disk(&image);
    let locator = transport.attach_identified(&disk).await.unwrap();
    let mut device = fs::OpenOptions::new()
        .write(true)
        .open(device_of(&locator).await)
        .unwrap();
    device.seek(SeekFrom::Start(4096)).unwrap();
    device.write_all(b"over there").unwrap();
    device.sync_all().unwrap();
    drop(device);
    transport.detach(&disk).await.unwrap();
    assert_eq!(&fs::read(&image).unwrap()[4096..4106], b"over there");
    assert_eq!(bench.bound(), []);
    transport.detach(&disk).await.unwrap();
}

#[tokio::test]
async fn root_names_of_one_file_are_one_disk() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = bench.image("a.img", MIB);
    std::os::unix::fs::symlink(&image, bench.path("link")).unwrap();
    fs::hard_link(&image, bench.path("hard")).unwrap();
    let up = "../".repeat(std::env::current_dir().unwrap().components().count());
    let relative = PathBuf::from(up).join(image.strip_prefix("/").unwrap());
    let id = transport
        .identify(&Disk::virtual_disk(&image))
        .await
        .unwrap();
    for name in [
        bench.path("link"),
        bench.path("hard"),
        bench.path("./a.img"),
        relative,
    ] {
        let other = transport
            .identify(&Disk::virtual_disk(&name).read_only())
            .await
            .unwrap();
        assert_eq!(other, id, "{}", name.display());
    }
    let copy = bench.image("b.img", MIB);
    assert_ne!(
        transport.identify(&Disk::virtual_disk(copy)).await.unwrap(),
        id
    );
}

#[tokio::test]
async fn root_names_that_are_no_text_are_attached() {
    let bench = Bench::new();
    let transport = bench.transport();
    let odd = std::ffi::OsString::from_vec(b"a b,c:d\n\xff\\".to_vec());
    let image = bench.dir.path().join(odd);
    fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    let disk = Disk::virtual_disk(&image).read_only();
    transport.attach_identified(&disk).await.unwrap();
    assert_eq!(bench.bound()[0].backing_file(), &image);
    transport.detach(&disk).await.unwrap();
    bench.assert_nothing_left();
}

#[tokio::test]
async fn root_read_only_is_read_only_down_to_the_kernel() {
    let bench = Bench::new();
    let transport = bench.transport();
    let disk = Disk::virtual_disk(bench.image("a.img", MIB)).read_only();
    let locator = transport.attach_identified(&disk).await.unwrap();
    let path = device_of(&locator).await;
    let error = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| {
            file.write_all(&[1; 512])?;
            file.sync_all()
        });
    assert!(error.is_err(), "{} was written to", path.display());
    let name = path.file_name().unwrap().to_str().unwrap();
    assert_eq!(
        fs::read_to_string(format!("/sys/block/{name}/ro"))
            .unwrap()
            .trim(),
        "1"
    );
    assert!(transport.map()[0].read_only && bench.bound()[0].is_read_only());
    transport.detach(&disk).await.unwrap();
}

#[tokio::test]
async fn root_direct_io_is_what_the_kernel_says() {
    let bench = Bench::new();
    let transport = bench.transport();
    for wanted in [None, Some(true), Some(false)] {
        let mut options = DiskOptions::default();
        if let Some(wanted) = wanted {
            options = options.direct_io(wanted);
        }
        let disk = Disk::virtual_disk(bench.image("a.img", MIB)).with_options(options);
        let locator = transport.attach_identified(&disk).await.unwrap();
        let shown = transport.map()[0].direct_io;
        let attribute = format!("/sys/block/loop{}/loop/dio", locator.address());
        assert_eq!(fs::read_to_string(attribute).unwrap().trim() == "1", shown);
        // The filesystem of these images can do it.
        assert_eq!(shown, wanted != Some(false));
        transport.detach(&disk).await.unwrap();
    }
    let options = DiskOptions::default().discard(true);
    let disk = Disk::virtual_disk(bench.image("a.img", MIB)).with_options(options);
    let refused = transport.attach_identified(&disk).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsuitable);
    assert!(transport.map().is_empty());
}

#[tokio::test]
async fn root_partitions_are_looked_for() {
    let bench = Bench::new();
    let transport = bench.transport();
    let disk = Disk::virtual_disk(bench.image("a.img", MIB));
    let locator = transport.attach_identified(&disk).await.unwrap();
    // Whether any are found depends on the tables that the kernel was built to read.
    let attribute = format!("/sys/block/loop{}/loop/partscan", locator.address());
    assert_eq!(fs::read_to_string(attribute).unwrap().trim(), "1");
    transport.detach(&disk).await.unwrap();
}

#[tokio::test]
async fn root_a_block_device_is_claimed_while_it_is_written_to() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = Disk::virtual_disk(bench.ext4("a.img"));
    let device = device_of(&transport.attach_identified(&image).await.unwrap()).await;

    let physical = Disk::physical_disk(&device);
    transport.attach_identified(&physical).await.unwrap();
    let beside = Disk::physical_disk(&device).read_only();
    let error = transport.attach_identified(&beside).await.unwrap_err();
    assert_error(&error, ErrorKind::Conflict, "already bound read-write");
    let error = bench
        .builder()
        .build()
        .unwrap()
        .attach_identified(&physical)
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Conflict, "claimed");
    assert_eq!(bench.bound().len(), 2);

    let error = transport
        .attach_identified(&Disk::virtual_disk(&device))
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Invalid, "physical disk");
    transport.detach(&physical).await.unwrap();
    transport.detach(&image).await.unwrap();
    assert_eq!(bench.bound(), []);
}

#[tokio::test]
async fn root_a_file_that_somebody_else_has_is_a_conflict_unless_both_only_read() {
    let bench = Bench::new();
    let (ours, theirs) = (Bench::new().transport(), bench.transport());
    let image = bench.image("a.img", MIB);
    let hard = bench.path("hard");
    fs::hard_link(&image, &hard).unwrap();
    let (write, read) = (
        Disk::virtual_disk(&hard),
        Disk::virtual_disk(&hard).read_only(),
    );
    for (held, refused) in [(&write, &write), (&write, &read), (&read, &write)] {
        let locator = theirs.attach_identified(held).await.unwrap();
        let error = ours.attach_identified(refused).await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::Conflict,
            &format!("/dev/loop{} ", locator.address()),
        );
        assert_eq!((ours.map(), bench.bound().len()), (vec![], 1));
        theirs.detach(held).await.unwrap();
    }
    theirs.attach_identified(&read).await.unwrap();
    ours.attach_identified(&Disk::virtual_disk(&image).read_only())
        .await
        .unwrap();
    ours.detach(&Disk::virtual_disk(&image).read_only())
        .await
        .unwrap();
    theirs.detach(&read).await.unwrap();
    bench.assert_nothing_left();
}

/// The bytes of an image that are locked for each open file, from the kernel's table: `100-101`.
fn locked_bytes(image: &Path) -> Vec<String> {
    let inode = format!(":{}", fs::metadata(image).unwrap().ino());
    let table = fs::read_to_string("/proc/locks").unwrap();
    let of_image = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [.., "OFDLCK", _, "READ", _, file, first, last] = words[..] else {
            return None;
        };
        file.ends_with(&inode).then(|| format!("{first}-{last}"))
    };
    let mut found: Vec<String> = table.lines().filter_map(of_image).collect();
    found.sort();
    found
}

/// A process that another test has just started may have copies of all descriptors for a moment.
fn lock(image: &fs::File, access: Access) -> bool {
    image_lock::lock(image, access, Duration::from_secs(10))
}

#[tokio::test]
async fn root_an_image_has_the_locks_of_qemu_for_as_long_as_it_is_bound() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = bench.image("a.img", MIB);
    let (write, read) = (
        Disk::virtual_disk(&image),
        Disk::virtual_disk(&image).read_only(),
    );
    // As QEMU 7.2 has them for a disk that it reads, and for a qcow2 image that it writes to.
    for (disk, bytes) in [
        (&read, &["100-100", "201-201"][..]),
        (&write, &["100-101", "103-103", "201-201", "203-203"]),
    ] {
        let locator = transport.attach_identified(disk).await.unwrap();
        assert_eq!(locked_bytes(&image), bytes);
        // What keeps a device is its mount, once its process is gone.
        let kept = fs::File::open(device_of(&locator).await).unwrap();
        transport.detach(disk).await.unwrap_err();
        assert_eq!(locked_bytes(&image), bytes);
        drop(kept);
        transport.detach(disk).await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while locked_bytes(&image) != [""; 0] {
            assert!(Instant::now() < deadline, "{:?}", locked_bytes(&image));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[tokio::test]
async fn root_an_image_that_a_vm_has_is_refused_unless_both_only_read() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = bench.image("a.img", MIB);
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).open(&image).unwrap()
    };
    let (write, read) = (
        Disk::virtual_disk(&image),
        Disk::virtual_disk(&image).read_only(),
    );
    let holder = format!(
        "{} is in use by process {} (",
        image.display(),
        std::process::id()
    );
    for (held, asked) in [
        (Access::Write, &write),
        (Access::Write, &read),
        (Access::Read, &write),
    ] {
        let vm = open();
        assert!(lock(&vm, held));
        refused(
            &bench,
            &transport,
            asked.clone(),
            ErrorKind::Conflict,
            &holder,
        )
        .await;
        drop(vm);
        transport.attach_identified(asked).await.unwrap();
        // The other way round.
        assert!(!image_lock::lock(&open(), held, Duration::ZERO));
        transport.detach(asked).await.unwrap();
        assert!(lock(&open(), held));
    }
    let vm = open();
    assert!(lock(&vm, Access::Read));
    transport.attach_identified(&read).await.unwrap();
    assert!(lock(&open(), Access::Read));
    transport.detach(&read).await.unwrap();
    bench.assert_nothing_left();
}

#[tokio::test]
async fn root_a_file_that_was_replaced_is_not_mistaken_for_the_one_before() {
    let bench = Bench::new();
    let transport = bench.transport();
    let disk = Disk::virtual_disk(bench.image("a.img", MIB));
    transport.attach_identified(&disk).await.unwrap();
    let before = bench.bound();
    fs::rename(bench.image("b.img", MIB), bench.path("a.img")).unwrap();
    let error = transport.attach_identified(&disk).await.unwrap_err();
    assert_error(&error, ErrorKind::Conflict, "replaced");
    assert_eq!(bench.bound()[0].number(), before[0].number());
    // The first is detached although its name is now another file's.
    transport.detach(&disk).await.unwrap();
    assert_eq!(bench.bound(), []);
}

#[tokio::test]
async fn root_what_is_no_disk_is_refused() {
    let bench = Bench::new();
    let transport = bench.transport();
    let long = "x".repeat(4000);
    std::os::unix::fs::symlink(bench.path("circle"), bench.path("circle")).unwrap();
    run("mkfifo", &[bench.path("pipe").to_str().unwrap()]);
    bench.image("empty", 0);
    bench.image("tiny", 511);
    bench.image("odd", MIB + 100);
    bench.image("file", MIB);
    use ErrorKind::{Invalid, NotFound};
    for (name, kind, word) in [
        ("none", NotFound, "cannot find"),
        ("file/below", NotFound, "cannot find"),
        ("circle", Invalid, "cannot find"),
        (&*long, Invalid, "cannot find"),
        ("a\0b", Invalid, "cannot find"),
        ("", Invalid, "a directory"),
        ("pipe", Invalid, "a pipe"),
        ("empty", Invalid, "is empty"),
        ("tiny", Invalid, "511 bytes"),
        ("odd", Invalid, "whole sectors"),
    ] {
        for disk in [
            Disk::virtual_disk(bench.path(name)),
            Disk::virtual_disk(bench.path(name)).read_only(),
        ] {
            refused(&bench, &transport, disk, kind, word).await;
        }
    }
    refused(
        &bench,
        &transport,
        Disk::virtual_disk("/dev/null"),
        Invalid,
        "a character device",
    )
    .await;
    refused(
        &bench,
        &transport,
        Disk::physical_disk(bench.path("file")),
        Invalid,
        "a regular file",
    )
    .await;
    let extensible = Disk::extensible("provider", "x");
    refused(
        &bench,
        &transport,
        extensible,
        ErrorKind::Unsuitable,
        "provider",
    )
    .await;
    // All of it was really about the sources.
    let disk = Disk::virtual_disk(bench.path("file"));
    transport.attach_identified(&disk).await.unwrap();
    transport.detach(&disk).await.unwrap();
}

#[tokio::test]
async fn root_a_file_that_cannot_be_written_to_is_attached_read_only_or_not_at_all() {
    let bench = Bench::new();
    let transport = bench.transport();
    let image = bench.image("a.img", MIB);
    run("chattr", &["+i", image.to_str().unwrap()]);
    let error = transport
        .attach_identified(&Disk::virtual_disk(&image))
        .await;
    let read = transport
        .attach_identified(&Disk::virtual_disk(&image).read_only())
        .await;
    run("chattr", &["-i", image.to_str().unwrap()]);
    assert_error(
        &error.unwrap_err(),
        ErrorKind::Invalid,
        "cannot be written to; attach it read-only",
    );
    read.unwrap();
    transport
        .detach(&Disk::virtual_disk(&image).read_only())
        .await
        .unwrap();
    bench.assert_nothing_left();
}

/// Not a test of its own: what the next one runs as a user without rights.
#[tokio::test]
async fn root_process_without_rights() {
    let Ok(image) = std::env::var("BLOCKMOUNT_TEST_IMAGE") else {
        return;
    };
    let disk = Disk::virtual_disk(image).read_only();
    let error = LoopTransport::default()
        .attach_identified(&disk)
        .await
        .unwrap_err();
    println!("\n{:?}: {error}", error.kind());
}

#[test]
fn root_who_is_not_root_is_told_so() {
    let bench = Bench::new();
    let image = bench.image("a.img", MIB);
    let program = bench.path("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    run("chmod", &["755", bench.dir.path().to_str().unwrap()]);
    let output = std::process::Command::new(program)
        .args([
            "--exact",
            "root_attach::root_process_without_rights",
            "--nocapture",
        ])
        .env("BLOCKMOUNT_TEST_IMAGE", image)
        .current_dir("/")
        .uid(65_534)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("Other: ") && said.contains("need root (CAP_SYS_ADMIN)"),
        "{said}"
    );
}

#[tokio::test]
async fn root_locators_of_others_and_of_nothing_are_refused() {
    let resolve = async |text: &str| {
        LoopResolver
            .resolve(&text.parse().unwrap())
            .await
            .unwrap_err()
    };
    assert_error(
        &resolve("scsi:0/3").await,
        ErrorKind::Unsuitable,
        "not a loop device",
    );
    for text in [
        "loop:x",
        "loop:-1",
        "loop:07",
        "loop:+7",
        "loop:99999999999",
        "loop:7/8",
    ] {
        assert_error(&resolve(text).await, ErrorKind::Invalid, "not the locator");
    }
    assert_error(
        &resolve("loop:1048575").await,
        ErrorKind::NotFound,
        "no loop device",
    );
}

#[test]
fn limits_are_checked_when_a_transport_is_made() {
    let long = "x".repeat(64);
    for builder in [
        LoopTransport::builder().max_devices(0),
        LoopTransport::builder().max_devices(u16::MAX),
        LoopTransport::builder().mark(long),
        LoopTransport::builder().mark(""),
        LoopTransport::builder().mark("a\0b"),
    ] {
        assert_eq!(builder.build().unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(
        LoopTransport::builder()
            .mark("x".repeat(63))
            .build()
            .is_ok()
    );
    assert_eq!(LoopTransport::default().max_devices(), 256);
}

#[tokio::test]
async fn root_x02_a_path_that_was_swapped_after_its_disk_was_identified_is_refused() {
    let bench = Bench::new();
    let transport = bench.transport();
    let disk = Disk::virtual_disk(bench.image("ours", 4096)).read_only();
    let theirs = bench.image("theirs", 4096);
    let id = transport.identify(&disk).await.unwrap();
    std::fs::rename(bench.path("ours"), bench.path("moved")).unwrap();
    std::os::unix::fs::symlink(&theirs, bench.path("ours")).unwrap();
    let error = transport.attach(&disk, &id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(bench.bound(), []);
    // The id is of the file and not of its name.
    let moved = Disk::virtual_disk(bench.path("moved")).read_only();
    transport.attach(&moved, &id).await.unwrap();
    transport.detach(&moved).await.unwrap();
    bench.assert_nothing_left();
}
