//! Disks of the host: which one is meant, and how documents name it.

use std::io;
use std::path::{Path, PathBuf};

use blockmount::{BackendError, Disk, DiskId, DiskKind};

/// The source of a disk as text for a document.
pub(crate) fn path(disk: &Disk) -> Result<String, BackendError> {
    let refuse = |reason: &str| {
        let shown: String = disk.to_string().chars().take(128).collect();
        Err(BackendError::invalid(format!(
            "disk {shown:?} cannot be named to Hyper-V: its path {reason}"
        )))
    };
    match disk.source().to_str() {
        None => refuse("is not Unicode"),
        Some("") => refuse("is empty"),
        Some(text) if text.contains('\0') => refuse("has a NUL character in it"),
        Some(text) => Ok(text.to_owned()),
    }
}

/// The disk with a name that another process understands, which has another working directory.
pub(crate) fn absolute(disk: &Disk) -> Result<Disk, BackendError> {
    // Only Windows knows which of its paths are absolute.
    if !cfg!(windows) || *disk.kind() != DiskKind::VirtualDisk {
        return Ok(disk.clone());
    }
    path(disk)?;
    let absolute =
        std::path::absolute(disk.source()).map_err(|error| unreachable(disk.source(), error))?;
    let named = Disk::virtual_disk(absolute).with_options(disk.options().clone());
    Ok(match disk.is_read_only() {
        true => named.read_only(),
        false => named,
    })
}

/// Whether it is in the newer format of Hyper-V's own, by its name.
pub(crate) fn is_vhdx(disk: &Disk) -> bool {
    let extension = disk.source().extension();
    // On other systems than Windows a backslash is no separator, which makes no difference here.
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("vhdx"))
}

/// Refuses a disk that VPMEM is not for.
pub(crate) fn fit_for_vpmem(disk: &Disk) -> Result<(), BackendError> {
    disk.options().require_only(&[])?;
    if *disk.kind() != DiskKind::VirtualDisk {
        let message = format!("disk {disk} is no image file, as VPMEM needs; attach it over SCSI");
        return Err(BackendError::unsuitable(message));
    }
    if !disk.is_read_only() {
        let message = format!(
            "disk {disk} cannot be written to over VPMEM; attach it read-only, or over SCSI"
        );
        return Err(BackendError::unsuitable(message));
    }
    Ok(())
}

/// Says which disk is meant.
pub(crate) async fn identify(disk: &Disk) -> Result<DiskId, BackendError> {
    let text = path(disk)?;
    match disk.kind() {
        // What a provider serves is what it is called.
        DiskKind::Extensible { provider } => Ok(DiskId::name(&format!("{provider}:{text}"))),
        DiskKind::VirtualDisk | DiskKind::PhysicalDisk => on_file(disk.source(), file_id).await,
        other => Err(BackendError::unsuitable(format!(
            "Hyper-V has no disks like {disk} ({other:?})"
        ))),
    }
}

/// Proves that a disk still is the one that was identified. Call it right before the request is sent.
///
/// The service takes no handle and opens the file by its path, so a file that is replaced between this and the service's
/// own look is not noticed. A directory that only trusted users can write to is what protects from that.
pub(crate) async fn prove(disk: &Disk, id: &DiskId) -> Result<(), BackendError> {
    let now = identify(disk).await?;
    if now == *id {
        return Ok(());
    }
    Err(BackendError::conflict(format!(
        "disk {disk} was replaced before it was attached: it was {id} and is {now}"
    )))
}

/// The size of the file behind a disk, in bytes.
pub(crate) async fn size(disk: &Disk) -> Result<u64, BackendError> {
    fit_for_vpmem(disk)?;
    path(disk)?;
    let metadata = on_file(disk.source(), |path| path.metadata()).await?;
    match metadata.len() {
        _ if !metadata.is_file() => {
            Err(BackendError::invalid(format!("disk {disk} is not a file")))
        }
        0 => Err(BackendError::invalid(format!(
            "disk {disk} is empty, so it is no disk"
        ))),
        size => Ok(size),
    }
}

/// Looks at a file away from the runtime's threads: it may be on a share that is slow.
async fn on_file<T: Send + 'static>(
    path: &Path,
    look: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> Result<T, BackendError> {
    let path: PathBuf = path.to_owned();
    let looking = tokio::task::spawn_blocking(move || match look(&path) {
        Ok(seen) => Ok(seen),
        Err(error) => Err(unreachable(&path, error)),
    });
    looking.await.unwrap_or_else(|error| {
        Err(BackendError::other("the runtime is shutting down").with_source(error))
    })
}

fn unreachable(path: &Path, error: io::Error) -> BackendError {
    let tried = format!("cannot look at {}", path.display());
    let classified = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => BackendError::not_found(tried),
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => {
            BackendError::invalid(tried)
        }
        _ => BackendError::other(tried),
    };
    classified.with_source(error)
}

#[cfg(windows)]
use crate::files::file_id;

#[cfg(unix)]
fn file_id(path: &Path) -> io::Result<DiskId> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.metadata()?;
    Ok(DiskId::inode(metadata.dev(), metadata.ino()))
}
