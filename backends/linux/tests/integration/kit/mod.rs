//! What the tests on real devices share: images, loop devices, and looking for what is left behind.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, ErrorKind, MountOptions, Mounter, Resolver,
};
use blockmount_linux::device::prove_free;
use blockmount_linux::mountinfo::{self, MountInfo};
use blockmount_linux::{LinuxGuest, LinuxGuestBuilder};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

/// Kernels whose ways differ: each takes another path through the engine.
pub(crate) const KERNELS: [(u32, u32); 6] =
    [(4, 19), (5, 4), (5, 10), (6, 1), (6, 8), (u32::MAX, 0)];

/// Takes the address of `test:/dev/loop3` for the node.
#[derive(Debug)]
pub(crate) struct ByPath;

#[async_trait]
impl Resolver for ByPath {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        Ok(BlockDevice::new(device.address()))
    }
}

/// For what is free as soon as a process that another test starts has closed its copies of our descriptors.
pub(crate) const PATIENT: Duration = Duration::from_secs(20);

pub(crate) fn builder() -> LinuxGuestBuilder {
    LinuxGuest::builder()
        .resolver("test", Arc::new(ByPath))
        .busy_timeout(PATIENT)
        .device_timeout(Duration::from_millis(500))
}

/// For tests in which something stays busy.
pub(crate) fn short_wait() -> LinuxGuestBuilder {
    builder().busy_timeout(Duration::from_millis(100))
}

pub(crate) fn guest() -> LinuxGuest {
    builder().build()
}

pub(crate) fn on_linux((major, minor): (u32, u32)) -> LinuxGuest {
    builder().as_on_linux(major, minor).build()
}

/// Options by their names in mount(8).
pub(crate) fn options(names: &[&str]) -> MountOptions {
    MountOptions::builder()
        .options(names.iter().copied())
        .build()
        .unwrap()
}

pub(crate) async fn mount(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    names: &[&str],
) -> Result<(), BackendError> {
    guest
        .mount(&device.locator(), target, &options(names))
        .await
}

/// Asserts that something was refused with a kind, and returns the message.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(
    result: Result<T, BackendError>,
    kind: ErrorKind,
) -> String {
    let error = result.expect_err("it should have been refused");
    assert_eq!(error.kind(), kind, "{error}");
    let message = error.message().to_owned();
    assert!(
        !message.ends_with('.') && !message.starts_with(char::is_uppercase),
        "{message}"
    );
    message
}

/// Waits until nobody uses a device any more: a process that another test starts has copies of this one's mounts and
/// descriptors, for a moment.
pub(crate) async fn free(node: &Path) {
    let deadline = Instant::now() + PATIENT;
    while let Err(error) = prove_free(node) {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Unmounts as soon as no process that another test starts has copies of our descriptors.
#[track_caller]
pub(crate) fn umount(path: impl AsRef<Path>) {
    let deadline = Instant::now() + PATIENT;
    while let Err(error) = rustix::mount::unmount(path.as_ref(), UnmountFlags::NOFOLLOW) {
        let is_busy = error == rustix::io::Errno::BUSY && Instant::now() < deadline;
        assert!(
            is_busy,
            "cannot unmount {}: {error}",
            path.as_ref().display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A loop device on an image, gone with the value.
#[derive(Debug)]
pub(crate) struct Loop {
    node: PathBuf,
}

impl Loop {
    pub(crate) fn new(image: &Path) -> Self {
        Self::with(image, &[])
    }

    pub(crate) fn read_only(image: &Path) -> Self {
        Self::with(image, &["-r"])
    }

    pub(crate) fn with_partitions(image: &Path) -> Self {
        Self::with(image, &["-P"])
    }

    fn with(image: &Path, more: &[&str]) -> Self {
        // Another test may take the free device in between.
        for _ in 0..50 {
            let mut command = Command::new("losetup");
            let output = command
                .args(["-f", "--show"])
                .args(more)
                .arg(image)
                .output()
                .unwrap();
            if output.status.success() {
                let node = String::from_utf8(output.stdout).unwrap().trim().into();
                return Loop { node };
            }
        }
        panic!("no loop device for {}", image.display());
    }

    pub(crate) fn node(&self) -> &Path {
        &self.node
    }

    pub(crate) fn locator(&self) -> DeviceLocator {
        DeviceLocator::new("test", self.node.display()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A loop device that was bound without a scan keeps its partitions for its next user.
        let _none_is_fine = Command::new("partx")
            .arg("-d")
            .arg(&self.node)
            .stderr(Stdio::null())
            .status();
        let done = Command::new("losetup")
            .arg("-d")
            .arg(&self.node)
            .status()
            .unwrap();
        assert!(done.success() || std::thread::panicking());
    }
}

/// The kinds of image that are made, each once per process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Image {
    Ext2,
    Ext3,
    Ext4,
    Xfs,
    Erofs,
    Squashfs,
    Gpt,
    Mbr,
    Swap,
    Btrfs,
}

impl Image {
    pub(crate) const FILESYSTEMS: [Image; 6] = [
        Image::Ext2,
        Image::Ext3,
        Image::Ext4,
        Image::Xfs,
        Image::Erofs,
        Image::Squashfs,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Image::Ext2 => "ext2",
            Image::Ext3 => "ext3",
            Image::Ext4 => "ext4",
            Image::Xfs => "xfs",
            Image::Erofs => "erofs",
            Image::Squashfs => "squashfs",
            Image::Gpt => "gpt",
            Image::Mbr => "mbr",
            Image::Swap => "swap",
            Image::Btrfs => "btrfs",
        }
    }

    pub(crate) fn is_writable(self) -> bool {
        !matches!(self, Image::Erofs | Image::Squashfs)
    }

    /// A copy of the image for one test. There is a file `hello` in it.
    pub(crate) fn copy(self, to: &Path) -> PathBuf {
        let to = to.join(format!("{}.img", self.name()));
        if matches!(self, Image::Xfs | Image::Btrfs) {
            // The kernel mounts no two of them with one UUID.
            let dir = tempfile::tempdir().unwrap();
            fs::rename(self.make(dir.path()), &to).unwrap();
        } else {
            self.made().write(&to);
        }
        to
    }

    fn made(self) -> &'static Kept {
        static MADE: [OnceLock<Kept>; 10] = [const { OnceLock::new() }; 10];
        MADE[self as usize].get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            Kept::of(&self.make(dir.path()))
        })
    }

    fn make(self, dir: &Path) -> PathBuf {
        let image = dir.join(self.name());
        let path = image.to_str().unwrap();
        let tree = dir.join(format!("{}.tree", self.name()));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("hello"), self.name()).unwrap();
        fs::write(tree.join("bulk"), noise(40_000)).unwrap();
        let tree = tree.to_str().unwrap();
        match self {
            Image::Ext2 | Image::Ext3 | Image::Ext4 => {
                blank(&image, 4 << 20);
                let program = format!("mkfs.{}", self.name());
                run(
                    &program,
                    &[
                        "-q",
                        "-L",
                        "the label",
                        "-d",
                        tree,
                        "-E",
                        "root_owner=0:0",
                        path,
                    ],
                );
            }
            Image::Xfs => {
                // The smallest that mkfs.xfs makes.
                blank(&image, 300 << 20);
                let proto = format!("/\n0 0\nd--755 0 0\nhello ---644 0 0 {tree}/hello\n$\n");
                fs::write(dir.join("proto"), proto).unwrap();
                run(
                    "mkfs.xfs",
                    &[
                        "-q",
                        "-L",
                        "xlabel",
                        "-p",
                        dir.join("proto").to_str().unwrap(),
                        path,
                    ],
                );
            }
            Image::Btrfs => {
                blank(&image, 128 << 20);
                run("mkfs.btrfs", &["-q", "-r", tree, path]);
            }
            Image::Erofs => {
                run("mkfs.erofs", &["--quiet", path, tree]);
            }
            Image::Squashfs => {
                run("mksquashfs", &[tree, path, "-quiet", "-no-progress"]);
            }
            Image::Swap => {
                blank(&image, 1 << 20);
                run("mkswap", &["-L", "slabel", path]);
            }
            Image::Gpt | Image::Mbr => self.make_disk(&image),
        }
        image
    }

    /// Three partitions, of which the second is ext4.
    fn make_disk(self, image: &Path) {
        blank(image, 16 << 20);
        let label = if self == Image::Gpt { "gpt" } else { "dos" };
        let name = if self == Image::Gpt {
            ", name=\"the second\""
        } else {
            ""
        };
        let script = format!("label: {label}\nsize=2MiB\nsize=4MiB{name}\nsize=1MiB\n");
        fs::write(image.with_extension("script"), script).unwrap();
        let input = fs::File::open(image.with_extension("script")).unwrap();
        let done = Command::new("sfdisk")
            .arg("-q")
            .arg(image)
            .stdin(input)
            .status()
            .unwrap();
        assert!(done.success());
        let file = fs::OpenOptions::new().write(true).open(image).unwrap();
        for (offset, piece) in &Image::Ext4.made().pieces {
            file.write_all_at(piece, (3 << 20) + offset).unwrap();
        }
    }
}

/// Bytes that no filesystem can compress.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn blank(path: &Path, size: u64) {
    fs::File::create(path).unwrap().set_len(size).unwrap();
}

/// The parts of an image that are not zero, so that no file outlives a test.
#[derive(Debug)]
struct Kept {
    length: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Kept {
    fn of(image: &Path) -> Self {
        const PIECE: usize = 64 << 10;
        let content = fs::read(image).unwrap();
        let used = content
            .chunks(PIECE)
            .enumerate()
            .filter(|(_, piece)| piece.iter().any(|byte| *byte != 0));
        let pieces = used
            .map(|(index, piece)| ((index * PIECE) as u64, piece.to_vec()))
            .collect();
        Kept {
            length: content.len() as u64,
            pieces,
        }
    }

    fn write(&self, to: &Path) {
        let file = fs::File::create(to).unwrap();
        file.set_len(self.length).unwrap();
        for (offset, piece) in &self.pieces {
            file.write_all_at(piece, *offset).unwrap();
        }
    }
}

/// A directory of one test, and what was in it at the start. Nothing more may be there at the end.
#[derive(Debug)]
pub(crate) struct TestDir {
    dir: TempDir,
    before: BTreeSet<(PathBuf, u32)>,
}

impl TestDir {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("blockmount-test-")
            .tempdir()
            .unwrap();
        let mut dir = TestDir {
            dir,
            before: BTreeSet::new(),
        };
        dir.settle();
        dir
    }

    /// What is here now is what shall be here at the end.
    pub(crate) fn settle(&mut self) {
        self.before = tree(self.path());
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The mounts at and below this directory.
    pub(crate) fn mounts(&self) -> Vec<MountInfo> {
        let all = mountinfo::read().unwrap();
        all.into_iter()
            .filter(|mount| mount.mount_point.starts_with(self.path()))
            .collect()
    }

    /// Asserts that no mount and no directory is left.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.mounts(), [], "mounts are left");
        assert_eq!(tree(self.path()), self.before, "the tree has changed");
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        // A failed test must not make the removal of its directory dangerous.
        for mount in self.mounts().iter().rev() {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(&mount.mount_point)
                .status();
        }
    }
}

fn tree(dir: &Path) -> BTreeSet<(PathBuf, u32)> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        found.insert((entry.path(), meta.mode()));
        if meta.is_dir() {
            found.extend(tree(&entry.path()));
        }
    }
    found
}

/// The mount on top at a path.
#[track_caller]
pub(crate) fn mount_at(path: &Path) -> MountInfo {
    let all = mountinfo::read().unwrap();
    let found = mountinfo::at(&all, path);
    (*found
        .last()
        .unwrap_or_else(|| panic!("nothing is mounted at {}", path.display())))
    .clone()
}
