//! What is done on this host before an image is attached.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use blockmount::{BackendError, Disk, ErrorKind, MountRequest, Verity};
use blockmount_verity::{Metadata, Place, Superblock};

use crate::mkfs::NewImage;
use crate::plan::Image;

/// An image, ready to be attached.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) disk: Disk,
    pub(super) request: MountRequest,
    /// The file, if it was made for this.
    pub(super) made: Option<PathBuf>,
}

/// Makes the file if that is asked for, and reads what vouches for it. Blocks. After an error no new file is left.
pub(super) fn prepare(image: &Image) -> Result<Prepared, BackendError> {
    let made = match &image.create {
        Some(new) => create(&image.path, new)?,
        None => false,
    };
    let prepared = request(image).map(|request| Prepared {
        disk: disk(&image.path, image.read_only),
        request,
        made: made.then(|| image.path.clone()),
    });
    if prepared.is_err() && made {
        remove(&image.path);
    }
    prepared
}

/// Removes a file that was made for what has failed.
pub(super) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        let path = blockmount::printable(path.display()).to_string();
        tracing::warn!(path, %error, "a file that was made for a mount that has failed cannot be removed");
    }
}

fn request(image: &Image) -> Result<MountRequest, BackendError> {
    let mut options = image.options().map_err(invalid)?;
    if let Some(path) = &image.verity {
        options = options.verity(verity(&image.path, path)?);
    }
    let request = MountRequest::new(options.build().map_err(invalid)?);
    let devices = image.devices.iter().map(|path| disk(path, image.read_only));
    Ok(devices.fold(request, MountRequest::with_device))
}

fn invalid(error: impl std::error::Error) -> BackendError {
    BackendError::invalid(error.to_string())
}

/// An image file, or a block device. One that cannot be looked at is told of when it is attached.
fn disk(path: &Path, read_only: bool) -> Disk {
    let kind = path.metadata().map(|metadata| metadata.file_type());
    let disk = match kind.is_ok_and(|kind| kind.is_block_device()) {
        true => Disk::physical_disk(path),
        false => Disk::virtual_disk(path),
    };
    match read_only {
        true => disk.read_only(),
        false => disk,
    }
}

/// Makes a file without content, as long as it is to be; false if there is one.
fn create(path: &Path, new: &NewImage) -> Result<bool, BackendError> {
    let failed = |error| host_error("make", path, error);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    match file.set_len(new.bytes) {
        Ok(()) => Ok(true),
        Err(error) => {
            remove(path);
            Err(failed(error))
        }
    }
}

/// What the guest is told of an image that is to be checked: the superblock is read here, and the guest reads none.
fn verity(image: &Path, metadata: &Path) -> Result<Verity, BackendError> {
    let unread = |path: &Path, error: &dyn std::fmt::Display| {
        let message = format!("cannot use the hash tree of {}: {error}", path.display());
        BackendError::invalid(message)
    };
    let metadata = Metadata::read(metadata).map_err(|error| unread(metadata, &error))?;
    let mut file = File::open(image).map_err(|error| host_error("open", image, error))?;
    let size = file.seek(SeekFrom::End(0));
    let size = size.map_err(|error| host_error("measure", image, error))?;
    let (root, offset) = (&metadata.root_digest, metadata.hash_offset);
    let superblock = Superblock::read(&file, size, Place::Behind(offset));
    let options = superblock.and_then(|found| found.options(root, offset));
    options.map_err(|error| unread(image, &error))
}

fn host_error(doing: &str, path: &Path, error: io::Error) -> BackendError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
        _ => ErrorKind::Other,
    };
    let message = format!("cannot {doing} {}: {error}", path.display());
    BackendError::new(kind, message)
}
