//! Volumes: given to a group, asked how full they are, trimmed, grown, and checked before.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::kit::{
    Image, Loop, TestDir, blank, builder, free, guest, mount, noise, on_linux, options, refused,
    run,
};
use blockmount::{
    BackendError, Check, DeviceLocator, ErrorKind, Expose, Format, FsGroup, FsGroupPolicy,
    MountOptions, Mounter,
};
use blockmount_linux::LinuxGuest;

const MIB: u64 = 1 << 20;

async fn make(guest: &LinuxGuest, device: &Loop, target: &Path, filesystem: &str) {
    let options = MountOptions::builder().format(Format::new(filesystem));
    let options = options.build().unwrap();
    guest
        .mount(&device.locator(), target, &options)
        .await
        .unwrap();
}

/// Grows an image and its loop device, as a host does.
fn grow_disk(image: &Path, device: &Loop, bytes: u64) {
    let file = fs::File::options().write(true).open(image).unwrap();
    file.set_len(bytes).unwrap();
    run("losetup", &["-c", device.node().to_str().unwrap()]);
}

/// Whether this process has the capability that ext4 wants for that, which root has not in every container.
fn can_grow_ext4() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let bits = lines.find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(bits.trim(), 16).unwrap() & 1 << 24 != 0
}

#[tokio::test]
async fn root_a_filesystem_grows_while_it_is_used_and_keeps_its_files() {
    for (filesystem, before, after) in [("ext4", 64, 256), ("xfs", 320, 512), ("btrfs", 128, 512)] {
        let mut dir = TestDir::new();
        let image = dir.at("disk");
        blank(&image, before * MIB);
        let device = Loop::new(&image);
        dir.settle();
        let (guest, target) = (guest(), dir.at("mnt"));
        if filesystem == "btrfs" {
            run("mkfs.btrfs", &["-q", device.node().to_str().unwrap()]);
            mount(&guest, &device, &target, &[]).await.unwrap();
        } else {
            make(&guest, &device, &target, filesystem).await;
        }
        let content = noise(3 << 20);
        fs::write(target.join("file"), &content).unwrap();
        if filesystem == "ext4" && !can_grow_ext4() {
            let message = refused(guest.grow(&target, before * MIB).await, ErrorKind::Other);
            assert!(message.contains("CAP_SYS_RESOURCE"), "{message}");
            guest.unmount(&target).await.unwrap();
            continue;
        }
        // What has not grown stays, and what the kernel has not seen is awaited in vain.
        guest.grow(&target, before * MIB).await.unwrap();
        let early = guest.grow(&target, after * MIB).await;
        let message = refused(early, ErrorKind::NotFound);
        assert!(message.contains("in time"), "{message}");
        let small = guest.usage(&target).await.unwrap().bytes;
        grow_disk(&image, &device, after * MIB);
        for _ in 0..2 {
            guest.grow(&target, after * MIB).await.unwrap();
        }
        let large = guest.usage(&target).await.unwrap().bytes;
        assert!(small.total <= before * MIB, "{small:?}");
        assert!(large.total > after * MIB * 8 / 10, "{large:?}");
        let used = match filesystem {
            // Written back, it counts.
            "btrfs" => content.len() as u64 / 2,
            _ => content.len() as u64,
        };
        assert!(
            large.used >= used && large.available > small.total,
            "{large:?}"
        );
        // It can be filled beyond what it was.
        fs::write(
            target.join("more"),
            noise(before as usize * 2 * MIB as usize / 3),
        )
        .unwrap();
        guest.unmount(&target).await.unwrap();
        let check = match filesystem {
            "ext4" => "e2fsck -f -n",
            "xfs" => "xfs_repair -n",
            _ => "btrfs check --readonly",
        };
        let (tool, arguments) = check.split_once(' ').unwrap();
        let arguments: Vec<&str> = arguments.split(' ').collect();
        free(device.node()).await;
        let node = device.node().to_str().unwrap();
        run(tool, &[&arguments[..], &[node]].concat());
        mount(&guest, &device, &target, &["ro"]).await.unwrap();
        assert!(fs::read(target.join("file")).unwrap() == content);
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_what_cannot_grow_says_what_it_is() {
    let mut dir = TestDir::new();
    let (ext4, erofs, gpt) = (
        Loop::new(&Image::Ext4.copy(dir.path())),
        Loop::new(&Image::Erofs.copy(dir.path())),
        Loop::new(&Image::Gpt.copy(dir.path())),
    );
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    refused(guest.grow(&target, 1).await, ErrorKind::NotFound);
    let part = MountOptions::builder().partition(2.try_into().unwrap());
    for (device, options, kind, words) in [
        (&ext4, options(&["ro"]), ErrorKind::Invalid, "read-only"),
        (&erofs, options(&[]), ErrorKind::Invalid, "read-only"),
        (
            &gpt,
            part.build().unwrap(),
            ErrorKind::Unsuitable,
            "a partition",
        ),
    ] {
        let locator = device.locator();
        guest.mount(&locator, &target, &options).await.unwrap();
        let message = refused(guest.grow(&target, 1).await, kind);
        assert!(message.contains(words), "{message}");
        guest.unmount(&target).await.unwrap();
    }
    dir.assert_clean();
    // Linux takes a btrfs to no size below this.
    let image = Image::Btrfs.copy(dir.path());
    let btrfs = Loop::new(&image);
    mount(&guest, &btrfs, &target, &[]).await.unwrap();
    grow_disk(&image, &btrfs, 192 * MIB);
    let grown = guest.grow(&target, 192 * MIB).await;
    let message = refused(grown, ErrorKind::Unsuitable);
    assert!(message.contains("256 MiB"), "{message}");
    guest.unmount(&target).await.unwrap();
}

#[tokio::test]
async fn root_a_mount_tells_its_usage_and_frees_what_it_does_not_use() {
    let mut dir = TestDir::new();
    let image = dir.at("disk");
    blank(&image, 64 * MIB);
    let device = Loop::new(&image);
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    refused(guest.usage(&target).await, ErrorKind::NotFound);
    refused(guest.trim(&target).await, ErrorKind::NotFound);
    make(&guest, &device, &target, "ext4").await;
    let empty = guest.usage(&target).await.unwrap();
    fs::write(target.join("file"), noise(8 << 20)).unwrap();
    rustix::fs::sync();
    let full = guest.usage(&target).await.unwrap();
    assert!(full.bytes.used >= empty.bytes.used + (8 << 20), "{full:?}");
    assert_eq!(full.inodes.used, empty.inodes.used + 1);
    assert_eq!(full.bytes.total, empty.bytes.total);
    let held = || fs::metadata(&image).unwrap().blocks() * 512;
    let with_file = held();
    fs::remove_file(target.join("file")).unwrap();
    rustix::fs::sync();
    let trimmed = guest.trim(&target).await.unwrap();
    assert!(trimmed > 8 << 20, "{trimmed}");
    assert!(held() + (8 << 20) <= with_file, "{} of {with_file}", held());
    guest.unmount(&target).await.unwrap();
    mount(&guest, &device, &target, &["ro"]).await.unwrap();
    refused(guest.trim(&target).await, ErrorKind::Invalid);
    guest.unmount(&target).await.unwrap();
    // A device is used by whoever has its node.
    let exposed = MountOptions::builder().expose(Expose::BlockDevice);
    let (locator, exposed) = (device.locator(), exposed.build().unwrap());
    guest.mount(&locator, &target, &exposed).await.unwrap();
    let usage = guest.usage(&target).await.unwrap();
    assert_eq!((usage.bytes.total, usage.bytes.used), (64 * MIB, 64 * MIB));
    refused(guest.trim(&target).await, ErrorKind::Unsuitable);
    grow_disk(&image, &device, 96 * MIB);
    guest.grow(&target, 96 * MIB).await.unwrap();
    assert_eq!(guest.usage(&target).await.unwrap().bytes.total, 96 * MIB);
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}

async fn checked(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    check: Check,
) -> Result<(), BackendError> {
    let options = MountOptions::builder().check(check).build().unwrap();
    guest.mount(&device.locator(), target, &options).await
}

fn debugfs(image: &Path, request: &str) {
    let done = Command::new("debugfs")
        .args(["-w", "-R", request])
        .arg(image)
        .output();
    assert!(done.unwrap().status.success());
}

#[tokio::test]
async fn root_a_damaged_filesystem_is_mounted_only_when_its_repair_was_asked_for() {
    let mut dir = TestDir::new();
    let image = Image::Ext4.copy(dir.path());
    // The file is in a directory, and does not know it: that is repaired without a loss.
    debugfs(&image, "set_inode_field hello links_count 7");
    let device = Loop::new(&image);
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    let before = fs::read(&image).unwrap();
    let message = refused(
        checked(&guest, &device, &target, Check::Verify).await,
        ErrorKind::Invalid,
    );
    assert!(
        message.contains("is damaged") && message.contains("ref count"),
        "{message}"
    );
    assert!(fs::read(&image).unwrap() == before, "nothing was written");
    dir.assert_clean();
    checked(&guest, &device, &target, Check::Repair)
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(target.join("hello")).unwrap(), "ext4");
    guest.unmount(&target).await.unwrap();
    checked(&guest, &device, &target, Check::Verify)
        .await
        .unwrap();
    // One that is mounted already is not checked under its users.
    checked(&guest, &device, &dir.at("again"), Check::Verify)
        .await
        .unwrap_err();
    guest.unmount(&target).await.unwrap();
    // What a repair would lose something by is for people.
    debugfs(device.node(), "set_inode_field <2> mode 0100644");
    let message = refused(
        checked(&guest, &device, &target, Check::Repair).await,
        ErrorKind::Invalid,
    );
    assert!(message.contains("not repaired unasked"), "{message}");
    dir.assert_clean();
}

#[tokio::test]
async fn root_what_cannot_be_checked_is_said() {
    let mut dir = TestDir::new();
    let dirty = Image::Ext4.copy(dir.path());
    debugfs(&dirty, "feature needs_recovery");
    let xfs = Image::Xfs.copy(dir.path());
    let (dirty, xfs) = (Loop::new(&dirty), Loop::new(&xfs));
    let erofs = Loop::new(&Image::Erofs.copy(dir.path()));
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    for (device, check, kind, words) in [
        (
            &dirty,
            Check::Verify,
            ErrorKind::Invalid,
            "was not replayed",
        ),
        (&xfs, Check::Repair, ErrorKind::Unsuitable, "for people"),
        (
            &erofs,
            Check::Verify,
            ErrorKind::Unsuitable,
            "only of ext and xfs",
        ),
    ] {
        let message = refused(checked(&guest, device, &target, check).await, kind);
        assert!(message.contains(words), "{message}");
        dir.assert_clean();
    }
    checked(&guest, &xfs, &target, Check::Verify).await.unwrap();
    guest.unmount(&target).await.unwrap();
    dir.assert_clean();
}

/// How many directories the volume of a pod has, and how many files each.
const DIRECTORIES: usize = 100;
const FILES: usize = 100;

/// A volume with 10,000 files, and with all that could lead a walk astray; and a file outside that must not change.
fn fill(volume: &Path, outside: &Path) {
    for directory in 0..DIRECTORIES {
        let directory = volume.join(format!("d{directory}"));
        fs::create_dir(&directory).unwrap();
        for file in 0..FILES {
            fs::write(directory.join(file.to_string()), "").unwrap();
        }
    }
    let odd = volume.join("odd");
    fs::create_dir(&odd).unwrap();
    symlink(outside, odd.join("out")).unwrap();
    symlink("/etc", odd.join("etc")).unwrap();
    symlink("..", odd.join("up")).unwrap();
    symlink("loop", odd.join("loop")).unwrap();
    fs::write(odd.join("new\nline"), "").unwrap();
    fs::write(odd.join("setuid"), "").unwrap();
    fs::hard_link(odd.join("setuid"), odd.join("hard")).unwrap();
    fs::set_permissions(odd.join("setuid"), fs::Permissions::from_mode(0o4711)).unwrap();
    let path = |name: &str| odd.join(name).to_str().unwrap().to_owned();
    run("mkfifo", &[&path("fifo")]);
    run("mknod", &[&path("null"), "c", "1", "3"]);
    let deep = (0..100).fold(odd.join("deep"), |at, _| at.join("x"));
    fs::create_dir_all(&deep).unwrap();
    fs::set_permissions(odd.join("deep"), fs::Permissions::from_mode(0o000)).unwrap();
}

/// Whose each file of a volume is, and with which mode: its path, its group, its mode.
fn owners(at: &Path) -> Vec<(PathBuf, u32, u32)> {
    let meta = fs::symlink_metadata(at).unwrap();
    let mut all = vec![(at.to_owned(), meta.gid(), meta.mode())];
    if meta.is_dir() {
        let entries = fs::read_dir(at).unwrap();
        all.extend(entries.flat_map(|entry| owners(&entry.unwrap().path())));
    }
    all
}

/// Every file belongs to the group, but for these.
#[track_caller]
fn assert_given(volume: &Path, gid: u32, but: &[&Path]) {
    for (path, group, mode) in owners(volume) {
        let (is_link, is_directory) =
            (mode & 0o170_000 == 0o120_000, mode & 0o170_000 == 0o040_000);
        let wanted = match is_directory {
            true => 0o2770,
            false => 0o660,
        };
        let has = group == gid && (is_link || mode & wanted == wanted);
        assert_eq!(
            has,
            !but.contains(&&*path),
            "{} {group} {mode:o}",
            path.display()
        );
    }
}

fn given_to(group: FsGroup) -> MountOptions {
    MountOptions::builder().fs_group(group).build().unwrap()
}

#[tokio::test]
async fn root_u22_a_volume_of_10_000_files_belongs_to_the_group_of_its_pod() {
    for kernel in [(4, 19), (u32::MAX, 0)] {
        let mut dir = TestDir::new();
        let image = dir.at("disk");
        blank(&image, 256 * MIB);
        let outside = dir.at("outside");
        fs::write(&outside, "").unwrap();
        let device = Loop::new(&image);
        dir.settle();
        let (guest, target) = (on_linux(kernel), dir.at("mnt"));
        make(&guest, &device, &target, "ext4").await;
        fill(&target, &outside);
        let immutable = target.join("odd/immutable");
        fs::write(&immutable, "").unwrap();
        run("chattr", &["+i", immutable.to_str().unwrap()]);
        guest.unmount(&target).await.unwrap();

        let always = given_to(FsGroup::new(2000));
        let once = FsGroup::new(2000).policy(FsGroupPolicy::OnRootMismatch);
        let once = given_to(once);
        let start = Instant::now();
        guest
            .mount(&device.locator(), &target, &always)
            .await
            .unwrap();
        println!("{kernel:?}: 10,000 files in {:?}", start.elapsed());
        assert_given(&target, 2000, &[&immutable]);
        // Owners and what else the modes say stay, and nothing outside is touched.
        let setuid = fs::metadata(target.join("odd/setuid")).unwrap();
        assert_eq!((setuid.mode() & 0o7777, setuid.uid()), (0o4771, 0));
        let plain = fs::metadata(&outside).unwrap();
        assert_eq!((plain.gid(), plain.mode() & 0o7777), (0, 0o644));
        assert_eq!(fs::metadata("/etc").unwrap().gid(), 0);
        // What is made in a directory belongs to the group.
        fs::write(target.join("d1/new"), "").unwrap();
        assert_eq!(fs::metadata(target.join("d1/new")).unwrap().gid(), 2000);
        run("chattr", &["-i", immutable.to_str().unwrap()]);
        let other = target.join("d7/7");
        chown(&other, None, Some(5)).unwrap();
        lchown(target.join("odd/out"), None, Some(5)).unwrap();
        guest.unmount(&target).await.unwrap();

        // The root is as it was given, so nothing else is looked at.
        guest
            .mount(&device.locator(), &target, &once)
            .await
            .unwrap();
        let link = target.join("odd/out");
        let new = target.join("d1/new");
        assert_given(&target, 2000, &[&immutable, &other, &link, &new]);
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
        guest.unmount(&target).await.unwrap();
        guest
            .mount(&device.locator(), &target, &once)
            .await
            .unwrap();
        assert_given(&target, 2000, &[]);
        guest.unmount(&target).await.unwrap();

        // A time that is over ends it, and it has not begun for the next one.
        let (major, minor) = kernel;
        let hasty = builder()
            .as_on_linux(major, minor)
            .format_timeout(Duration::ZERO);
        let late = given_to(FsGroup::new(3000).policy(FsGroupPolicy::OnRootMismatch));
        let late = hasty.build().mount(&device.locator(), &target, &late).await;
        let message = refused(late, ErrorKind::Other);
        assert!(message.contains("allow more time"), "{message}");
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u22_what_cannot_be_given_to_a_group_is_refused() {
    let mut dir = TestDir::new();
    let erofs = Loop::new(&Image::Erofs.copy(dir.path()));
    let ext4 = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let (guest, target) = (guest(), dir.at("mnt"));
    let options = given_to(FsGroup::new(7));
    let tried = guest.mount(&erofs.locator(), &target, &options).await;
    let message = refused(tried, ErrorKind::Unsuitable);
    assert!(message.contains("cannot be written to"), "{message}");
    dir.assert_clean();
    // An image whose directories are nested deeper than any path.
    mount(&guest, &ext4, &target, &[]).await.unwrap();
    let mut at: rustix::fd::OwnedFd = fs::File::open(&target).unwrap().into();
    for _ in 0..400 {
        rustix::fs::mkdirat(&at, "x", rustix::fs::Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, "x", flags, rustix::fs::Mode::empty()).unwrap();
    }
    drop(at);
    guest.unmount(&target).await.unwrap();
    let tried = guest.mount(&ext4.locator(), &target, &options).await;
    let message = refused(tried, ErrorKind::Invalid);
    assert!(message.contains("nested deeper than 300"), "{message}");
    dir.assert_clean();
}

/// How the child is told what to do; without it, the child's test does nothing.
const ORDERS: &str = "BLOCKMOUNT_TEST_ORDERS";
static STEP: AtomicU32 = AtomicU32::new(0);
/// A step that is within the walk: a mount has fewer before.
const WITHIN: u32 = 30;

fn fail_within() -> Result<(), BackendError> {
    match STEP.fetch_add(1, Ordering::SeqCst) {
        WITHIN => Err(BackendError::other("this step was to fail")),
        _ => Ok(()),
    }
}

fn die_within() -> Result<(), BackendError> {
    if STEP.fetch_add(1, Ordering::SeqCst) == WITHIN {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }
    Ok(())
}

/// The process that is killed: this test in a process of its own.
#[tokio::test]
#[ignore = "only the other tests start it"]
async fn a_child() {
    let Ok(orders) = std::env::var(ORDERS) else {
        return;
    };
    let orders: Vec<&str> = orders.split('\n').collect();
    let [node, target, journal, major] = orders[..] else {
        panic!("these are no orders: {orders:?}");
    };
    let builder = builder().as_on_linux(major.parse().unwrap(), 19);
    let guest = builder.at_step(die_within).journal(journal).await.unwrap();
    let locator = DeviceLocator::new("test", node).unwrap();
    let options = given_to(FsGroup::new(2000).policy(FsGroupPolicy::OnRootMismatch));
    guest
        .mount(&locator, Path::new(target), &options)
        .await
        .unwrap();
}

#[tokio::test]
async fn root_u22_what_was_cut_off_while_it_was_given_to_a_group_is_begun_anew() {
    for major in [4, u32::MAX] {
        let mut dir = TestDir::new();
        let device = Loop::new(&Image::Ext4.copy(dir.path()));
        let journal = dir.at("journal");
        fs::create_dir(&journal).unwrap();
        fs::set_permissions(&journal, fs::Permissions::from_mode(0o700)).unwrap();
        dir.settle();
        let (plain, target) = (guest(), dir.at("mnt"));
        mount(&plain, &device, &target, &[]).await.unwrap();
        for directory in 0..100 {
            fs::create_dir(target.join(directory.to_string())).unwrap();
        }
        plain.unmount(&target).await.unwrap();
        // Some of it is given, and the root is not.
        let half = async |gid| {
            mount(&plain, &device, &target, &[]).await.unwrap();
            let owners = owners(&target);
            let given = owners.iter().filter(|(_, group, _)| *group == gid).count();
            assert!(given > 0 && given < owners.len() / 2, "{given}");
            assert_eq!(owners[0].1, 0, "the root is last");
            plain.unmount(&target).await.unwrap();
        };
        let options = |gid| given_to(FsGroup::new(gid).policy(FsGroupPolicy::OnRootMismatch));
        let failing = builder()
            .as_on_linux(major, 19)
            .at_step(fail_within)
            .build();
        // An attempt that has to be repeated would count its steps again.
        free(device.node()).await;
        STEP.store(0, Ordering::SeqCst);
        let failed = failing
            .mount(&device.locator(), &target, &options(1000))
            .await;
        let message = refused(failed, ErrorKind::Other);
        assert_eq!(message, "this step was to fail");
        dir.assert_clean();
        half(1000).await;

        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let orders = [
            text(device.node()),
            text(&target),
            text(&journal),
            major.to_string(),
        ];
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "root_volumes::a_child",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env(ORDERS, orders.join("\n"))
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        let next = builder()
            .as_on_linux(major, 19)
            .journal(&journal)
            .await
            .unwrap();
        next.unmount(&target).await.unwrap();
        dir.assert_clean();
        half(2000).await;
        next.mount(&device.locator(), &target, &options(2000))
            .await
            .unwrap();
        assert_given(&target, 2000, &[]);
        next.unmount(&target).await.unwrap();
        drop(next);
        dir.assert_clean();
    }
}
