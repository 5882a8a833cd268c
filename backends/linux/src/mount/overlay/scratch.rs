//! The scratch of an overlay: what is written goes into it.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use blockmount::BackendError;
use rustix::fs::{Gid, Mode, Stat, Uid};

use crate::errno::errno_error;
use crate::mount::directory::{self, Wanted, readable};
use crate::mount::target::{FileId, Target};
use crate::undo::ledger::UndoList;

/// A scratch directory, open.
#[derive(Debug)]
pub(super) struct Directory {
    open: OwnedFd,
    /// Through no symbolic link.
    path: PathBuf,
    pub(super) id: FileId,
}

/// Opens a scratch directory through no symbolic link. The image on the scratch disk is not trusted: a link in it
/// could lead anywhere in the guest, and `upper` and `work` would be made there.
pub(super) fn open(path: &Path) -> Result<Directory, BackendError> {
    let scratch = Target::directory(&without_parents(path))?;
    let path = scratch.path().to_owned();
    let Some(place) = scratch.find()? else {
        let message = format!("there is no scratch directory {}", path.display());
        return Err(BackendError::not_found(message));
    };
    let open = readable(place.directory(), OsStr::new("."))
        .map_err(|errno| errno_error(format!("cannot open scratch {}", path.display()), errno))?;
    let id = place
        .id()
        .map_err(|errno| errno_error("cannot look at the scratch", errno))?;
    Ok(Directory { open, path, id })
}

/// The path without `..`, which is exact as long as no component is a symbolic link.
fn without_parents(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

/// A directory for what is written, with what overlay keeps in it.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) id: FileId,
    pub(super) upper: OwnedFd,
    pub(super) work: OwnedFd,
}

impl Scratch {
    /// Makes what is missing, which is on the undo list until there is the overlay; the root of the tree looks like
    /// the topmost layer's.
    pub(super) fn prepare(
        list: &UndoList<'_>,
        directory: Directory,
        root: &Stat,
    ) -> Result<Self, BackendError> {
        if list.has_scratch(directory.id) {
            let path = directory.path.display();
            let message = format!("scratch {path} is in use by another overlay");
            return Err(BackendError::conflict(message));
        }
        let (upper, is_new) = directory.subdirectory("upper", list)?;
        if is_new {
            let what = || {
                let path = directory.path.display();
                format!("cannot give {path}/upper the owner and mode of the topmost layer")
            };
            let (owner, group) = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
            rustix::fs::fchown(&upper, Some(owner), Some(group))
                .map_err(|errno| errno_error(what(), errno))?;
            let mode = Mode::from_raw_mode(root.st_mode);
            rustix::fs::fchmod(&upper, mode).map_err(|errno| errno_error(what(), errno))?;
        }
        let (work, _) = directory.subdirectory("work", list)?;
        let id = directory.id;
        Ok(Scratch { id, upper, work })
    }
}

impl Directory {
    /// Opens a directory in the scratch, and says whether it was made for that.
    fn subdirectory(
        &self,
        name: &str,
        list: &UndoList<'_>,
    ) -> Result<(OwnedFd, bool), BackendError> {
        let path = self.path.join(name);
        let wanted = Wanted {
            parent: &self.open,
            name: OsStr::new(name),
            path: &path,
            mode: Mode::from_raw_mode(0o755),
            scratch: true,
        };
        let is_new = directory::make(list, &wanted)?;
        let open = readable(&self.open, wanted.name).map_err(|errno| {
            errno_error(format!("cannot open directory {}", path.display()), errno)
        })?;
        Ok((open, is_new))
    }
}
