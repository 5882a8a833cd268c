//! The files behind the devices: images as they are, copies of our own, and devices that hold many disks.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockmount::{BackendError, Disk, DiskId, DiskKind, ErrorKind};
use blockmount_source::image_lock::{self, Access};
use blockmount_vpmem::ByteRange;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use rustix::io::Errno;
use tracing::warn;

use super::ALIGNMENT;
use crate::image_format::ImageFormat;
use crate::open_file::OpenFile;

/// How much is copied before anybody looks whether it is still wanted, in bytes.
const CHUNK: u64 = 8 << 20;

/// A disk as a file that QEMU can map: of whole multiples of 2 MiB.
#[derive(Debug)]
pub(super) struct Image {
    /// Open for as long as the device is there, so that no other file becomes this disk.
    source: File,
    /// If the image itself is not long enough.
    copy: Option<Private>,
    path: PathBuf,
    size: u64,
}

impl Image {
    /// Opens a disk; copies it if its size is not one that a device can have. Blocks.
    pub(super) fn prepare(
        disk: &Disk,
        id: &DiskId,
        directory: &Path,
        given_up: &AtomicBool,
    ) -> Result<Self, BackendError> {
        let (source, length) = open_locked(disk, id)?;
        let size = length.next_multiple_of(ALIGNMENT);
        let copy = if size == length {
            None
        } else {
            let copy = Private::make(directory, size)?;
            copy_to(&source, &copy.file, 0, length, given_up)
                .map_err(|error| cannot_copy(disk, error))?;
            Some(copy)
        };
        Ok(Image {
            path: copy
                .as_ref()
                .map_or(disk.source(), Private::path)
                .to_owned(),
            source,
            copy,
            size,
        })
    }

    /// What QEMU opens.
    pub(super) fn file(&self) -> Result<OpenFile, BackendError> {
        let file = match &self.copy {
            Some(copy) => copy.file(),
            None => self.source.try_clone(),
        };
        let file = file.map_err(|error| {
            BackendError::other("cannot share an open image").with_source(error)
        })?;
        OpenFile::new(file, &self.path)
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Another descriptor of the image that QEMU has a copy of, if it has one.
    pub(super) fn copied(&self) -> Option<io::Result<File>> {
        self.copy.as_ref().map(|_| self.source.try_clone())
    }

    /// QEMU has it open: a copy needs its name no more.
    pub(super) fn opened(&mut self) {
        if let Some(copy) = &mut self.copy {
            copy.forget_name();
        }
    }

    /// The device is out. QEMU keeps the file open all the same, so what is in a copy is freed here. Blocks.
    pub(super) fn discard(self) -> Result<(), BackendError> {
        let Some(copy) = self.copy else { return Ok(()) };
        punch(&copy.file, 0, self.size)
            .map_err(|error| BackendError::other("cannot empty a copy").with_source(error))
    }
}

/// Says which disk is meant. Blocks.
pub(super) fn identify(disk: &Disk) -> Result<DiskId, BackendError> {
    ensure_file(disk)?;
    blockmount_source::identify(disk)
}

fn ensure_file(disk: &Disk) -> Result<(), BackendError> {
    let path = disk.source().display();
    let format = ImageFormat::of(disk.source());
    if format != ImageFormat::Raw {
        return Err(BackendError::unsuitable(format!(
            "{path} is a {format} image, and QEMU maps only raw ones as VPMEM"
        )));
    }
    if *disk.kind() == DiskKind::VirtualDisk {
        return Ok(());
    }
    let message = format!("{path} is no file, and QEMU maps only files as VPMEM");
    Err(BackendError::unsuitable(message))
}

/// The size of a disk in bytes. Blocks.
pub(super) fn size(disk: &Disk) -> Result<u64, BackendError> {
    open(disk, &identify(disk)?).map(|(_, size)| size)
}

/// Opens a disk for as long as QEMU has it. QEMU locks no memory, so the image is locked here: QEMU keeps the open file.
fn open_locked(disk: &Disk, id: &DiskId) -> Result<(File, u64), BackendError> {
    let (file, size) = open(disk, id)?;
    if image_lock::lock(&file, Access::Read, image_lock::MOMENT) {
        return Ok((file, size));
    }
    let holders = image_lock::holders(&file, disk.source());
    Err(image_lock::in_use(disk.source(), &holders))
}

fn open(disk: &Disk, id: &DiskId) -> Result<(File, u64), BackendError> {
    ensure_file(disk)?;
    let source = blockmount_source::open(disk, id)?;
    let size = blockmount_source::size(disk, &source)?;
    Ok((source.file, size))
}

/// A file of our own: sparse, and gone with whoever has it open.
#[derive(Debug)]
pub(super) struct Private {
    file: File,
    /// Until QEMU has opened it.
    name: Option<Name>,
}

/// The name of a file, which is removed with this.
#[derive(Debug)]
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            warn!(%error, path = %self.0.display(), "a file of ours is not removed");
        }
    }
}

impl Private {
    /// Blocks.
    pub(super) fn make(directory: &Path, size: u64) -> Result<Self, BackendError> {
        let made = create_new(directory).and_then(|(file, name)| {
            file.set_len(size)?;
            Ok((file, name))
        });
        let (file, name) = made.map_err(|error| {
            let directory = directory.display();
            refused(
                format!("cannot make a file of {size} bytes in {directory}"),
                error,
            )
        })?;
        Ok(Private {
            file,
            name: Some(name),
        })
    }

    /// One that an earlier process has made.
    pub(super) fn found(file: File) -> Self {
        Private { file, name: None }
    }

    /// Empty once the name is forgotten.
    pub(super) fn path(&self) -> &Path {
        self.name.as_ref().map_or(Path::new(""), |name| &name.0)
    }

    pub(super) fn forget_name(&mut self) {
        self.name = None;
    }

    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

/// Makes a file that only its owner may open, under a name that no other file has.
fn create_new(directory: &Path) -> io::Result<(File, Name)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("vpmem-{}-{number}", std::process::id()));
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        match options.open(&path) {
            Ok(file) => return Ok((file, Name(path))),
            // A process with this number was killed before.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Opens a disk that is to be copied to a range; with its length. Blocks.
pub(super) fn open_for(
    disk: &Disk,
    id: &DiskId,
    range: ByteRange,
) -> Result<(File, u64), BackendError> {
    let (source, length) = open_locked(disk, id)?;
    if length > range.size() {
        return Err(BackendError::conflict(format!(
            "{disk} has grown to {length} bytes, and its range has {}; attach it again",
            range.size()
        )));
    }
    Ok((source, length))
}

/// Copies a disk of so many bytes to a range of a device. Blocks.
pub(super) fn write_range(
    disk: &Disk,
    (source, length): (&File, u64),
    device: &File,
    range: ByteRange,
    given_up: &AtomicBool,
) -> Result<(), BackendError> {
    copy_to(source, device, range.offset(), length, given_up).map_err(|error| {
        // The range is anybody's after this error.
        match clear_range(device, range) {
            Ok(()) => cannot_copy(disk, error),
            Err(left) => BackendError::uncertain(format!("cannot take back a copy of {disk}"))
                .with_source(left),
        }
    })
}

/// Makes a range read as zeros, and frees its space. Blocks.
pub(super) fn clear_range(device: &File, range: ByteRange) -> Result<(), BackendError> {
    punch(device, range.offset(), range.size()).map_err(|error| {
        BackendError::other(format!("cannot clear range {range} of a device")).with_source(error)
    })
}

fn punch(file: &File, offset: u64, size: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, offset, size) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill_with_zeros(file, offset, size),
        done => Ok(done?),
    }
}

fn fill_with_zeros(file: &File, mut offset: u64, size: u64) -> io::Result<()> {
    let end = offset + size;
    let zeros = vec![0; 1 << 20];
    while offset < end {
        let length = (end - offset).min(zeros.len() as u64);
        file.write_all_at(&zeros[..length as usize], offset)?;
        offset += length;
    }
    Ok(())
}

/// Copies `length` bytes from the start of one file to an offset of another: by sharing the blocks where the
/// filesystem can, else in the kernel, else by hand.
fn copy_to(
    from: &File,
    to: &File,
    offset: u64,
    length: u64,
    given_up: &AtomicBool,
) -> io::Result<()> {
    let (mut read, mut written) = (0, offset);
    while read < length {
        if given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for the copy any more"));
        }
        let chunk = usize::try_from((length - read).min(CHUNK)).unwrap_or(usize::MAX);
        let copied = copy_file_range(from, Some(&mut read), to, Some(&mut written), chunk);
        match copied {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Filesystems that are too different, or too old.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                let mut buffer = vec![0; chunk];
                from.read_exact_at(&mut buffer, read)?;
                to.write_all_at(&buffer, written)?;
                read += chunk as u64;
                written += chunk as u64;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn cannot_copy(disk: &Disk, error: io::Error) -> BackendError {
    let advice = match error.kind() {
        io::ErrorKind::StorageFull => "; there is no space for it",
        _ => "",
    };
    refused(
        format!("cannot copy {disk} to a file for QEMU{advice}"),
        error,
    )
}

/// Files of our own cannot be had. Another transport needs none, and may take the disk.
fn refused(tried: String, error: io::Error) -> BackendError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
        // Nobody waits for it.
        io::ErrorKind::Other => ErrorKind::Other,
        _ => ErrorKind::Unsuitable,
    };
    BackendError::new(kind, tried).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(content: &[u8]) -> (File, File) {
        let [from, to] = [(); 2].map(|()| tempfile::tempfile_in("/var/tmp").unwrap());
        from.write_all_at(content, 0).unwrap();
        to.write_all_at(&[7; 3 << 20], 0).unwrap();
        (from, to)
    }

    fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
        let mut buffer = vec![1; length];
        file.read_exact_at(&mut buffer, offset).unwrap();
        buffer
    }

    #[test]
    fn a_copy_is_where_it_should_be_and_nowhere_else() {
        let content: Vec<u8> = (0..(1 << 20) + 512)
            .map(|at: u32| (at % 251) as u8)
            .collect();
        let (from, to) = files(&content);
        copy_to(
            &from,
            &to,
            8192,
            content.len() as u64,
            &AtomicBool::new(false),
        )
        .unwrap();
        assert_eq!(read(&to, 8192, content.len()), content);
        assert_eq!(read(&to, 0, 8192), [7; 8192]);
        assert_eq!(read(&to, 8192 + content.len() as u64, 4096), [7; 4096]);
        let range = ByteRange::new(8192, 4096).unwrap();
        clear_range(&to, range).unwrap();
        assert_eq!(
            read(&to, 8191, 4098),
            [&[7][..], &[0; 4096], &content[4096..4097]].concat()
        );
        fill_with_zeros(&to, 1, (2 << 20) + 5).unwrap();
        assert_eq!(read(&to, 0, 2), [7, 0]);
        assert_eq!(read(&to, (2 << 20) + 5, 2), [0, 7]);
    }

    #[test]
    fn a_copy_ends_when_it_is_given_up_or_the_image_is_cut_short() {
        let (from, to) = files(&[1; 4096]);
        let given_up = AtomicBool::new(false);
        let error = copy_to(&from, &to, 0, 8192, &given_up).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        given_up.store(true, Ordering::Relaxed);
        copy_to(&from, &to, 0, 4096, &given_up).unwrap_err();
    }

    #[test]
    fn a_private_file_has_a_name_only_while_it_is_needed() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let count = || std::fs::read_dir(directory.path()).unwrap().count();
        let mut private = Private::make(directory.path(), 4 << 30).unwrap();
        assert_eq!(std::fs::metadata(private.path()).unwrap().len(), 4 << 30);
        private.forget_name();
        assert_eq!(count(), 0);
        drop(Private::make(directory.path(), 4096).unwrap());
        assert_eq!(count(), 0);
        let error = Private::make(&directory.path().join("none"), 1).unwrap_err();
        assert!(
            error.message().contains("cannot make a file of 1 bytes"),
            "{error}"
        );
    }
}
