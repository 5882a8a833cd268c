//! The file or block device of a Unix host behind a [`Disk`]: which one it is, and opening just that one.
//!
//! Every transport whose disks are opened on the host needs the three functions here: [`identify`] for
//! `Transport::identify`, then [`open`] and [`size`] for `Transport::attach`. All of them block; give them to
//! [`blockmount::blocking`]. What gives an image to anything but QEMU's block layer, which does so itself, locks it as well
//! ([`image_lock`]), so that nobody writes to an image beside others that use it.
//!
//! ```
//! # use blockmount::{BackendError, Disk};
//! fn bytes_of(disk: &Disk) -> Result<u64, BackendError> {
//!     let id = blockmount_source::identify(disk)?;
//!     // Fails if another file has the name by now.
//!     let source = blockmount_source::open(disk, &id)?;
//!     blockmount_source::size(disk, &source)
//! }
//! # let image = tempfile::NamedTempFile::new().unwrap();
//! # image.as_file().set_len(4096).unwrap();
//! # assert_eq!(bytes_of(&Disk::virtual_disk(image.path())).unwrap(), 4096);
//! ```
#![cfg(unix)]

pub mod image_lock;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount::{BackendError, Disk, DiskId, DiskKind};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// The smallest disk, and what the size of every disk is a multiple of, in bytes (the kernel's `SECTOR_SIZE`).
const SECTOR: u64 = 512;

/// The coarsest steps in which filesystems keep times (two seconds, FAT).
const COARSEST_TIME: Duration = Duration::from_secs(2);

/// A file by device and inode number, as the loop driver reports its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inode {
    /// The number of the device that the file is on (`st_dev`).
    pub device: u64,
    /// The number of the file there (`st_ino`).
    pub inode: u64,
}

impl Inode {
    fn of(metadata: &Metadata) -> Self {
        Inode {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// A source that is open for the access that its disk asks for.
#[derive(Debug)]
pub struct Source {
    /// The open file; a block device that is written to is claimed (`O_EXCL`) while it is open.
    pub file: File,
    /// Which file it is.
    pub inode: Inode,
    /// The number of the block device (`st_rdev`); 0 for a file.
    pub device_number: u64,
    /// The size of a file when it was opened.
    bytes: Option<u64>,
}

impl Source {
    /// Whether it is a block device, in place of an image file.
    pub fn is_device(&self) -> bool {
        self.device_number != 0
    }
}

/// Says which disk is meant, without opening it: a file by its inode, a block device by its number. Blocks.
///
/// A file has the time of its last change as its version ([`DiskId::with_version`]), unless that is so recent that another
/// change might get the same time.
///
/// # Errors
///
/// `NotFound` if there is nothing of that name, `Invalid` if it is not of the disk's kind, `Unsuitable` if the disk
/// is served by a provider.
pub fn identify(disk: &Disk) -> Result<DiskId, BackendError> {
    let metadata = inspect(disk)?;
    let id = id_of(&metadata);
    let version = version_of(&metadata, SystemTime::now());
    Ok(match version {
        Some(version) => id.with_version(version),
        None => id,
    })
}

/// When a file was changed for the last time (`st_ctime`, which no program can set), in nanoseconds. None for a device, and
/// for a file whose next change might get the same time.
fn version_of(metadata: &Metadata, now: SystemTime) -> Option<NonZeroU64> {
    if !metadata.is_file() {
        return None;
    }
    let changed = Duration::new(
        metadata.ctime().try_into().ok()?,
        metadata.ctime_nsec().try_into().ok()?,
    );
    let age = now.duration_since(UNIX_EPOCH).ok()?.checked_sub(changed)?;
    let nanos = u64::try_from(changed.as_nanos()).ok()?;
    NonZeroU64::new(nanos).filter(|_| age > COARSEST_TIME)
}

/// What [`identify`] answers for a file with this metadata.
pub fn id_of(metadata: &Metadata) -> DiskId {
    if metadata.file_type().is_block_device() {
        return device_id(metadata.rdev());
    }
    DiskId::inode(metadata.dev(), metadata.ino())
}

/// What [`identify`] answers for the block device with this number (`st_rdev`).
pub fn device_id(number: u64) -> DiskId {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    DiskId::name(&format!("block device {major}:{minor}"))
}

/// Looks at the source through links, and refuses what can never be attached.
fn inspect(disk: &Disk) -> Result<Metadata, BackendError> {
    if !matches!(disk.kind(), DiskKind::VirtualDisk | DiskKind::PhysicalDisk) {
        return Err(no_file(disk));
    }
    let metadata =
        std::fs::metadata(disk.source()).map_err(|error| no_source(disk, "find", error))?;
    fits_kind(disk, &metadata)?;
    Ok(metadata)
}

fn no_file(disk: &Disk) -> BackendError {
    let path = disk.source().display();
    BackendError::unsuitable(format!(
        "{path} is served by a provider, but only image files and block devices can be attached here"
    ))
}

/// Refuses a source that is not of the disk's kind.
fn fits_kind(disk: &Disk, metadata: &Metadata) -> Result<(), BackendError> {
    let (path, found) = (disk.source().display(), metadata.file_type());
    match disk.kind() {
        DiskKind::VirtualDisk if found.is_file() => Ok(()),
        DiskKind::PhysicalDisk if found.is_block_device() => Ok(()),
        DiskKind::VirtualDisk if found.is_block_device() => Err(BackendError::invalid(format!(
            "{path} is a block device; attach it as a physical disk"
        ))),
        DiskKind::VirtualDisk => Err(BackendError::invalid(format!(
            "{path} is {}, not a disk image",
            kind_of(metadata)
        ))),
        _ => Err(BackendError::invalid(format!(
            "{path} is {}, not a block device",
            kind_of(metadata)
        ))),
    }
}

fn kind_of(metadata: &Metadata) -> &'static str {
    let found = metadata.file_type();
    match () {
        () if found.is_dir() => "a directory",
        () if found.is_file() => "a regular file",
        () if found.is_fifo() => "a pipe",
        () if found.is_socket() => "a socket",
        () if found.is_char_device() => "a character device",
        () => "a file of another type",
    }
}

/// Opens the source for the access that the disk asks for, and proves that it is what
/// [`identify`] answered as `id`. Blocks, but never on what is put in its place meanwhile: a pipe is opened without waiting,
/// then refused.
///
/// # Errors
///
/// As for [`identify`]; `Invalid` if it cannot be written to and the disk is not read-only, `Conflict` if another
/// program has claimed it, or if it is another disk by now.
pub fn open(disk: &Disk, id: &DiskId) -> Result<Source, BackendError> {
    let is_device = *disk.kind() == DiskKind::PhysicalDisk;
    if !is_device && *disk.kind() != DiskKind::VirtualDisk {
        return Err(no_file(disk));
    }
    let write = !disk.is_read_only();
    let mut flags = OFlags::NONBLOCK;
    if is_device && write {
        // On a block device this claims it: nobody mounts it or writes to it beside us.
        flags |= OFlags::EXCL;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags.bits().cast_signed())
        .open(disk.source())
        // What can never be attached is another error.
        .map_err(|error| match inspect(disk) {
            Ok(_) => no_source(disk, "open", error),
            Err(refused) => refused,
        })?;
    let opened = file
        .metadata()
        .map_err(|error| no_source(disk, "look at", error))?;
    fits_kind(disk, &opened)?;
    if id_of(&opened) != *id {
        let path = disk.source().display();
        return Err(BackendError::conflict(format!(
            "{path} was replaced while it was being opened: it was {id}"
        )));
    }
    if is_device {
        // What is a disk can block, and the loop driver may go by the flags of the file. On a regular file it means nothing.
        rustix::fs::fcntl_setfl(&file, OFlags::empty())
            .map_err(|error| no_source(disk, "open", error.into()))?;
    }
    Ok(Source {
        file,
        inode: Inode::of(&opened),
        device_number: opened.rdev(),
        bytes: opened.is_file().then_some(opened.len()),
    })
}

/// The size of a source in bytes, if it is that of a disk: who reads whole sectors would hide what is left over
/// at the end, which for a filesystem is a hole that shows up much later. Blocks.
///
/// # Errors
///
/// `Invalid` unless there is at least one sector of 512 bytes, and nothing but whole ones.
pub fn size(disk: &Disk, source: &Source) -> Result<u64, BackendError> {
    let path = disk.source().display();
    // The metadata does not have the size of a block device.
    let end = || (&source.file).seek(SeekFrom::End(0));
    let size = source.bytes.map_or_else(end, Ok);
    let size = size.map_err(|error| no_source(disk, "find the size of", error))?;
    let advice = match size {
        0 => {
            let message = format!("{path} is empty, so it is no disk");
            return Err(BackendError::invalid(message));
        }
        1..SECTOR => "a disk has at least one sector of 512 bytes",
        _ if size.is_multiple_of(SECTOR) => return Ok(size),
        _ => {
            "a disk has whole sectors of 512 bytes; if the image is not cut short, pad it \
             (truncate --size=%512)"
        }
    };
    Err(BackendError::invalid(format!(
        "{path} has {size} bytes, but {advice}"
    )))
}

/// Refuses to grow what cannot be written to, and to a size that no disk has.
///
/// # Errors
///
/// `Invalid`.
pub fn ensure_can_grow(disk: &Disk, bytes: u64) -> Result<(), BackendError> {
    let why = match () {
        () if disk.is_read_only() => "it is attached read-only",
        () if !bytes.is_multiple_of(SECTOR) => "a disk has whole sectors of 512 bytes",
        () => return Ok(()),
    };
    let message = format!("cannot grow disk {disk} to {bytes} bytes: {why}");
    Err(BackendError::invalid(message))
}

/// Refuses to make a disk smaller, which would destroy what is on it.
///
/// # Errors
///
/// `Invalid`.
pub fn ensure_larger(disk: &Disk, size: u64, bytes: u64) -> Result<(), BackendError> {
    if size <= bytes {
        return Ok(());
    }
    let message = format!("disk {disk} has {size} bytes, and is not made smaller, to {bytes}");
    Err(BackendError::invalid(message))
}

/// Sorts an error about the source by what the caller can do.
fn no_source(disk: &Disk, verb: &str, error: io::Error) -> BackendError {
    let path = disk.source().display();
    let tried = format!("cannot {verb} {path}");
    let classified = match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR | Errno::NXIO | Errno::NOMEDIUM) => {
            BackendError::not_found(tried)
        }
        Some(Errno::LOOP | Errno::NAMETOOLONG) => BackendError::invalid(tried),
        Some(Errno::BUSY) => BackendError::conflict(format!(
            "{path} is mounted or claimed by another program; attach it read-only, or free it first"
        )),
        Some(Errno::ROFS | Errno::PERM | Errno::TXTBSY) if !disk.is_read_only() => {
            BackendError::invalid(format!("{path} cannot be written to; attach it read-only"))
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            BackendError::other(format!("{tried}: it needs root, or the right to the file"))
        }
        None if error.kind() == io::ErrorKind::InvalidInput => BackendError::invalid(tried),
        _ => BackendError::other(tried),
    };
    classified.with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_another_version_after_each_change() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let look = || image.as_file().metadata().unwrap();
        let later = |by| SystemTime::now() + by;
        let minute = Duration::from_secs(60);
        let first = version_of(&look(), later(minute)).expect("it is an old file by then");
        assert_eq!(version_of(&look(), later(2 * minute)), Some(first));
        // The clock of the kernel's times ticks a few hundred times a second.
        std::thread::sleep(Duration::from_millis(50));
        rustix::io::pwrite(image.as_file(), b"changed", 0).unwrap();
        let second = version_of(&look(), later(minute));
        assert!(second.is_some_and(|second| second > first));
        // The next change might not be seen.
        assert_eq!(version_of(&look(), SystemTime::now()), None);
        let disk = Disk::virtual_disk(image.path());
        assert_eq!(identify(&disk).unwrap().version(), None);
        // A clock that was set back says nothing.
        assert_eq!(version_of(&look(), UNIX_EPOCH), None);
        let device = std::fs::metadata("/dev/null").unwrap();
        assert_eq!(version_of(&device, later(minute)), None);
    }
}
