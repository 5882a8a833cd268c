//! The file or block device of this machine behind a [`Disk`]: which one it is, and opening just that one.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmount::{BackendError, Disk, DiskId, DiskKind, ErrorKind};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// The smallest disk, and what the size of every disk is a multiple of, in bytes (the kernel's `SECTOR_SIZE`).
const SECTOR: u64 = 512;

/// Does blocking work within a deadline. After that, or when this future is dropped, the work is told by its argument that
/// nobody waits for it, and goes on until it notices.
///
/// # Errors
///
/// The error of the work; `Uncertain` if it was not done in time, or was cut off.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &str,
    deadline: Duration,
    work: impl FnOnce(&AtomicBool) -> Result<T, BackendError> + Send + 'static,
) -> Result<T, BackendError> {
    let given_up = Arc::new(AtomicBool::new(false));
    let _at_the_end = GiveUp(given_up.clone());
    let working = blockmount::blocking(move || work(&given_up));
    let done = tokio::time::timeout(deadline, working).await;
    done.unwrap_or_else(|_| {
        Err(BackendError::uncertain(format!(
            "work on {what} has not ended within {deadline:?}; is its filesystem there?"
        )))
    })
}

/// Tells work that it was given up, when this is dropped.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The error of work that changes nothing which anybody else sees, so that nothing is in doubt.
pub(crate) fn nothing_done(error: BackendError) -> BackendError {
    match error.kind() {
        ErrorKind::Uncertain => BackendError::other(error.message()),
        _ => error,
    }
}

/// A disk that is open for the access that it asks for.
#[derive(Debug)]
pub(crate) struct Source {
    /// A block device that is written to is claimed (`O_EXCL`) while this is open.
    pub(crate) file: File,
    pub(crate) is_device: bool,
}

/// Says which disk is meant, without opening it: a file by its inode, a block device by its number. Blocks.
///
/// # Errors
///
/// `NotFound` if there is nothing of that name, `Invalid` if it is not of the disk's kind, `Unsuitable` if a provider
/// serves the disk.
pub(crate) fn identify(disk: &Disk) -> Result<DiskId, BackendError> {
    Ok(id_of(&inspect(disk)?))
}

/// Looks at the source through links, and refuses what can never be attached.
fn inspect(disk: &Disk) -> Result<Metadata, BackendError> {
    if !matches!(disk.kind(), DiskKind::VirtualDisk | DiskKind::PhysicalDisk) {
        let path = disk.source().display();
        return Err(BackendError::unsuitable(format!(
            "{path} is served by a provider, and QEMU takes only image files and block devices"
        )));
    }
    let metadata = std::fs::metadata(disk.source());
    let metadata = metadata.map_err(|error| no_source(disk, "find", error))?;
    ensure_kind(disk, &metadata)?;
    Ok(metadata)
}

fn id_of(metadata: &Metadata) -> DiskId {
    if metadata.file_type().is_block_device() {
        let (major, minor) = (
            rustix::fs::major(metadata.rdev()),
            rustix::fs::minor(metadata.rdev()),
        );
        return DiskId::name(&format!("block device {major}:{minor}"));
    }
    DiskId::inode(metadata.dev(), metadata.ino())
}

/// Refuses a source that is not of the disk's kind.
fn ensure_kind(disk: &Disk, metadata: &Metadata) -> Result<(), BackendError> {
    let (path, found) = (disk.source().display(), metadata.file_type());
    let what = match () {
        () if found.is_dir() => "a directory",
        () if found.is_file() => "a regular file",
        () if found.is_block_device() => "a block device",
        () if found.is_char_device() => "a character device",
        () if found.is_fifo() => "a pipe",
        () if found.is_socket() => "a socket",
        () => "a file of another type",
    };
    let expected = match disk.kind() {
        DiskKind::VirtualDisk if found.is_file() => return Ok(()),
        DiskKind::PhysicalDisk if found.is_block_device() => return Ok(()),
        DiskKind::VirtualDisk if found.is_block_device() => {
            let message = format!("{path} is {what}; attach it as a physical disk");
            return Err(BackendError::invalid(message));
        }
        DiskKind::VirtualDisk => "disk image",
        _ => "block device",
    };
    let message = format!("{path} is {what}, not a {expected}");
    Err(BackendError::invalid(message))
}

/// Opens the disk for the access that it asks for, and proves on what is open that it is what [`identify`] has
/// answered as `id`. Blocks, but never on what was put in its place meanwhile: a pipe is opened without waiting, then
/// refused.
///
/// # Errors
///
/// As for [`identify`]; `Invalid` if it cannot be written to and the disk is not read-only, `Conflict` if another
/// program has claimed it, or if it is another disk by now.
pub(crate) fn open(disk: &Disk, id: &DiskId) -> Result<Source, BackendError> {
    // An error about the kind is better than one about opening, and devices have side effects when opened.
    let is_device = inspect(disk)?.file_type().is_block_device();
    let mut flags = OFlags::NONBLOCK;
    if is_device && !disk.is_read_only() {
        // On a block device this claims it: no other program mounts it meanwhile.
        flags |= OFlags::EXCL;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(!disk.is_read_only())
        .custom_flags(flags.bits().cast_signed())
        .open(disk.source())
        .map_err(|error| no_source(disk, "open", error))?;
    let opened = file
        .metadata()
        .map_err(|error| no_source(disk, "look at", error))?;
    ensure_kind(disk, &opened)?;
    if id_of(&opened) != *id {
        let path = disk.source().display();
        return Err(BackendError::conflict(format!(
            "{path} was replaced while it was being opened: it was {id}"
        )));
    }
    rustix::fs::fcntl_setfl(&file, OFlags::empty())
        .map_err(|error| no_source(disk, "open", error.into()))?;
    Ok(Source { file, is_device })
}

/// The size of a disk in bytes. Blocks.
///
/// # Errors
///
/// `Invalid` unless there is at least one sector of 512 bytes, and nothing but whole ones: a program that reads whole
/// sectors would hide what is left over at the end.
pub(crate) fn size(disk: &Disk, source: &Source) -> Result<u64, BackendError> {
    let path = disk.source().display();
    // Unlike the metadata, the end of the file also knows the size of a block device.
    let size = (&source.file).seek(SeekFrom::End(0));
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
    let message = format!("{path} has {size} bytes, but {advice}");
    Err(BackendError::invalid(message))
}

/// A file for QEMU to open, kept open until it has.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: Arc<File>,
    path: String,
}

impl OpenFile {
    /// # Errors
    ///
    /// `Invalid` if the path is not UTF-8.
    pub(crate) fn new(file: File, path: &Path) -> Result<Self, BackendError> {
        let (file, path) = (Arc::new(file), absolute(path)?);
        Ok(OpenFile { file, path })
    }

    /// Absolute: QEMU may run in another directory.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Another descriptor of the open file.
    pub(crate) fn share(&self) -> Result<OwnedFd, BackendError> {
        let shared = self.file.try_clone();
        let shared = shared.map_err(|error| self.cannot("share", error))?;
        Ok(shared.into())
    }

    /// Proves that the path still names the open file. A path that is replaced and put back meanwhile is not noticed:
    /// what has to be proof against that is passed as a descriptor.
    pub(crate) async fn is_still_at_its_path(&self, timeout: Duration) -> Result<(), BackendError> {
        let (file, path) = (self.file.clone(), self.path.clone());
        let look = move |_: &_| Ok((file.metadata(), std::fs::metadata(path)));
        let looked = blocking(&self.path, timeout, look).await;
        let (opened, named) = looked.map_err(nothing_done)?;
        let opened = opened.map_err(|error| self.cannot("look at", error))?;
        match named.is_ok_and(|named| id_of(&named) == id_of(&opened)) {
            true => Ok(()),
            false => Err(BackendError::conflict(format!(
                "{} was replaced while QEMU opened it",
                self.path
            ))),
        }
    }

    fn cannot(&self, verb: &str, error: io::Error) -> BackendError {
        BackendError::other(format!("cannot {verb} {}", self.path)).with_source(error)
    }
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

/// A path as QEMU is given it, which may run in another directory.
///
/// # Errors
///
/// `Invalid` if it is not UTF-8.
fn absolute(path: &Path) -> Result<String, BackendError> {
    let absolute = std::path::absolute(path).map_err(|error| {
        BackendError::other(format!("cannot find out where {} is", path.display()))
            .with_source(error)
    })?;
    absolute.into_os_string().into_string().map_err(|path| {
        let path = path.display();
        BackendError::invalid(format!(
            "{path} cannot be given to QEMU, whose file names are UTF-8; rename it"
        ))
    })
}
