//! Opening devices, listing their partitions, and proving that nobody uses them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::num::{NonZeroU32, NonZeroU64};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use blockmount::{BackendError, ErrorKind};
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::discover::{sysfs, uevent};
use crate::errno::{blocking, errno_error, retry_while_busy};
use crate::filesystem::probe::{Content, probe};
use crate::mount::users;

/// A block device by its numbers: the same whatever its node is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver's number.
    pub major: u32,
    /// The device's number with that driver.
    pub minor: u32,
}

impl DeviceNumber {
    /// The device behind an open node.
    ///
    /// # Errors
    ///
    /// `Invalid` if it is no block device.
    pub fn of(device: &File) -> Result<Self, BackendError> {
        let meta = device
            .metadata()
            .map_err(|error| errno_error("cannot look at the open device", error))?;
        if !meta.file_type().is_block_device() {
            return Err(BackendError::invalid("the open file is not a block device"));
        }
        Ok(Self::from_rdev(meta.rdev()))
    }

    /// The device behind a node, which is not opened. Blocks.
    ///
    /// # Errors
    ///
    /// `Invalid` if it is no block device; others as they come.
    pub(crate) fn at(node: &Path) -> Result<Self, BackendError> {
        let meta = fs::metadata(node)
            .map_err(|error| errno_error(format!("cannot look at {}", node.display()), error))?;
        if !meta.file_type().is_block_device() {
            let message = format!("{} is not a block device", node.display());
            return Err(BackendError::invalid(message));
        }
        Ok(Self::from_rdev(meta.rdev()))
    }

    /// From what `stat` calls `st_rdev`.
    pub fn from_rdev(rdev: u64) -> Self {
        DeviceNumber {
            major: rustix::fs::major(rdev),
            minor: rustix::fs::minor(rdev),
        }
    }

    /// Its directory in sysfs.
    pub fn sysfs(self) -> PathBuf {
        format!("/sys/dev/block/{self}").into()
    }

    /// How many disks the kernel had seen when this one came, which no other disk gets; nothing before
    /// Linux 5.15. Blocks.
    pub(crate) fn sequence(self) -> Result<Option<u64>, BackendError> {
        sysfs::attribute(&self.sysfs(), "diskseq")
    }
}

/// As the kernel writes it: `7:3`.
impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Reads what the kernel writes, such as the attribute `dev` in sysfs with its line feed.
impl FromStr for DeviceNumber {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        let parse = || {
            let (major, minor) = text.trim_end().split_once(':')?;
            Some(DeviceNumber {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        };
        parse().ok_or_else(|| {
            BackendError::invalid(format!("{text:?} is no device number, such as 7:3"))
        })
    }
}

/// Whether an error of opening a device means that it is not there yet, or no longer.
fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::NXIO, Errno::NOMEDIUM, Errno::NODEV];
    Errno::from_io_error(error).is_some_and(|errno| absent.contains(&errno))
}

/// Opens a device for reading, or answers `None` while it is not ready: there is no node, or the
/// node has no device or medium behind it. Blocks.
///
/// # Errors
///
/// `Invalid` if the path is something else than a block device; others as they come.
pub fn open(path: &Path) -> Result<Option<File>, BackendError> {
    // Without waiting for a medium, and never as somebody's terminal.
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(file) => match file.metadata() {
            Ok(meta) if meta.file_type().is_block_device() => Ok(Some(file)),
            Ok(_) => Err(BackendError::invalid(format!(
                "{} is not a block device",
                path.display()
            ))),
            Err(error) => Err(errno_error(
                format!("cannot look at device {}", path.display()),
                error,
            )),
        },
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(errno_error(
            format!("cannot open device {}", path.display()),
            error,
        )),
    }
}

/// Waits until a device can be opened, and opens it for reading.
///
/// # Errors
///
/// `NotFound` if it cannot be opened before the deadline; otherwise as for [`open`].
pub async fn await_open(path: &Path, deadline: Instant) -> Result<File, BackendError> {
    let wanted = path.to_owned();
    let found = uevent::wait_until(deadline, move || open(&wanted)).await?;
    found.ok_or_else(|| {
        BackendError::not_found(format!(
            "device {} did not become ready in time",
            path.display()
        ))
    })
}

/// The size of a device in bytes. Blocks.
///
/// # Errors
///
/// The system's.
pub fn size(device: &File) -> io::Result<u64> {
    (&*device).seek(SeekFrom::End(0))
}

/// Has the kernel read at once what a probe looks at, and a mount after it: where filesystems and partition tables have
/// their signatures, at the start of a device and at its end. One after the other, each would be a wait of its own.
pub(crate) fn read_ahead(device: &File) {
    /// The last one at the start is that of btrfs, in the page at 64 KiB.
    const START: NonZeroU64 = NonZeroU64::new(68 << 10).expect("it is not zero");
    const END: u64 = 64 << 10;
    let last = size(device).unwrap_or_default().saturating_sub(END);
    for (from, length) in [(0, Some(START)), (last, None)] {
        // It is advice: without it, reading is only slower.
        let _ = rustix::fs::fadvise(device, from, length, Advice::WillNeed);
    }
}

/// The smallest unit that a device reads and writes, in bytes. Blocks.
///
/// # Errors
///
/// The system's.
pub fn logical_block_size(device: &File) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(device)?)
}

/// The partitions that the kernel has found on a disk: their numbers and their nodes. Blocks.
///
/// Which partition is which is what sysfs says, not what the nodes are called.
///
/// # Errors
///
/// `NotFound` if the disk is gone; others as they come.
pub fn partitions(disk: DeviceNumber) -> Result<BTreeMap<u32, PathBuf>, BackendError> {
    let directory = disk.sysfs();
    let trouble = |error| {
        errno_error(
            format!("cannot list the partitions in {}", directory.display()),
            error,
        )
    };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&directory).map_err(trouble)? {
        let below = entry.map_err(trouble)?.path();
        // Only partitions have this attribute. One that vanishes while it is looked at is gone.
        let Ok(number) = fs::read_to_string(below.join("partition")) else {
            continue;
        };
        let Ok(number) = number.trim().parse() else {
            continue;
        };
        let Ok(uevent) = fs::read(below.join("uevent")) else {
            continue;
        };
        if let Some(node) = node_named_in(&uevent) {
            found.insert(number, node);
        }
    }
    Ok(found)
}

/// Waits for a partition of an open disk, and names its node.
///
/// The kernel knows the partitions of a disk when it announces the disk, so the wait is short where
/// there is anything to wait for; and where the partition table itself can be read and has no such
/// partition, there is no wait.
///
/// # Errors
///
/// `NotFound`, naming the partitions that exist.
pub async fn await_partition(
    disk: &File,
    number: NonZeroU32,
    deadline: Instant,
) -> Result<PathBuf, BackendError> {
    let id = DeviceNumber::of(disk)?;
    let mut reader = disk
        .try_clone()
        .map_err(|error| errno_error("cannot open the disk once more", error))?;
    let mut is_hopeless = false;
    let look = move || {
        let mut known = partitions(id)?;
        if let Some(node) = known.remove(&number.get()) {
            return Ok(Some(Ok(node)));
        }
        if !is_hopeless {
            is_hopeless = !table_has(&mut reader, number).unwrap_or(true);
        }
        Ok(is_hopeless.then_some(Err(known)))
    };
    let absent = |known: BTreeMap<u32, PathBuf>| {
        let known: Vec<String> = known.keys().map(u32::to_string).collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        BackendError::not_found(format!(
            "there is no partition {number} on block device {id}; partitions that exist: {known}"
        ))
    };
    match uevent::wait_until(deadline, look).await? {
        Some(Ok(node)) => Ok(node),
        Some(Err(known)) => Err(absent(known)),
        None => Err(absent(blocking(move || partitions(id)).await?)),
    }
}

/// The node of a disk as the kernel names it; nothing if there is no such disk. Blocks.
pub(crate) fn node(disk: DeviceNumber) -> Option<PathBuf> {
    node_named_in(&fs::read(disk.sysfs().join("uevent")).ok()?)
}

/// The node of a device by the `uevent` attribute of its directory in sysfs. A name that would
/// lead out of `/dev` is none.
pub(crate) fn node_named_in(uevent: &[u8]) -> Option<PathBuf> {
    let mut lines = uevent.split(|byte| *byte == b'\n');
    let name = lines.find_map(|line| line.strip_prefix(b"DEVNAME="))?;
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    let is_below = |part| matches!(part, Component::Normal(_));
    let is_name = name.components().next().is_some() && name.components().all(is_below);
    is_name.then(|| Path::new("/dev").join(name))
}

/// Whether the table on a disk has the partition; `None` if there is no table to ask.
fn table_has(disk: &mut File, number: NonZeroU32) -> Option<bool> {
    match probe(disk).ok()?.content {
        Content::PartitionTable(table) => {
            Some(table.partitions.iter().any(|p| p.number == number.get()))
        }
        Content::Unknown => None,
        _ => Some(false),
    }
}

/// Proves that nobody uses a device: no filesystem, no device stacked on it, no exclusive user,
/// also in other mount namespaces and after a lazy unmount. Blocks.
///
/// As long as the answer is kept, the device is held exclusively and nobody can start to use it.
///
/// # Errors
///
/// `Busy`, naming who uses it; `NotFound` if it is not there.
pub fn prove_free(path: &Path) -> Result<File, BackendError> {
    claim(path)?.ok_or_else(|| busy(path, &users::of_device_at(path)))
}

/// Holds a device exclusively, or answers `None` if somebody uses it.
fn claim(path: &Path) -> Result<Option<File>, BackendError> {
    let flags = OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(held) => {
            let is_free = users::holders_of_disk(DeviceNumber::of(&held)?).is_empty();
            Ok(is_free.then_some(held))
        }
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => Ok(None),
        Err(error) if is_absent(&error) => Err(BackendError::not_found(format!(
            "device {} is not there",
            path.display()
        ))
        .with_source(error)),
        Err(error) => Err(errno_error(
            format!("cannot hold device {}", path.display()),
            error,
        )),
    }
}

/// The error `Busy` of a device that somebody uses, with the users that can be found: mounts in
/// whatever mount namespace, devices stacked on it or on a partition, swap; or else the processes
/// that have it open, apart from a single handle of this process, which the caller may have. Blocks.
pub fn in_use(path: &Path) -> BackendError {
    let mut users = users::of_device_at(path);
    if users.is_empty() {
        users = users::openers_of(path);
    }
    busy(path, &users)
}

fn busy(path: &Path, users: &[String]) -> BackendError {
    let by = if users.is_empty() {
        "somebody who cannot be seen from here".into()
    } else {
        users.join(", ")
    };
    BackendError::busy(format!("device {} is in use by {by}", path.display()))
}

/// Writes what is cached of a device to it. Blocks.
///
/// # Errors
///
/// The system's: an error means that data may be lost.
pub fn flush(device: &File) -> io::Result<()> {
    device.sync_all()
}

/// What every guest does before a device is taken out: proves it free, for which it tries as long as
/// `timeout` lasts, then flushes it.
///
/// # Errors
///
/// As for [`prove_free`] and [`flush`]; `Busy` as [`in_use`] tells it.
pub async fn let_go(path: &Path, timeout: Duration) -> Result<(), BackendError> {
    hold_free(path, timeout).await.map(drop)
}

/// The same as [`let_go`], and keeps holding the device exclusively: as long as the answer lives,
/// nobody can start to use it.
///
/// # Errors
///
/// As for [`let_go`].
pub async fn hold_free(path: &Path, timeout: Duration) -> Result<File, BackendError> {
    let path = path.to_owned();
    let attempt = {
        let path = path.clone();
        move || match claim(&path)? {
            // Who uses it is searched for once, when the timeout is over.
            None => Err(busy(&path, &[])),
            Some(held) => match flush(&held) {
                Ok(()) => Ok(held),
                Err(error) => Err(errno_error(
                    format!("cannot flush device {}", path.display()),
                    error,
                )),
            },
        }
    };
    match retry_while_busy(timeout, attempt).await {
        Err(error) if error.kind() == ErrorKind::Busy => blocking(move || Err(in_use(&path))).await,
        done => done,
    }
}
