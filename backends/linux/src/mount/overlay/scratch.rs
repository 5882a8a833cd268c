//! The scratch of an overlay: what is written goes into it.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmount::BackendError;
use rustix::fs::{AtFlags, Gid, Mode, Stat, Uid, fstat, unlinkat};
use rustix::io::Errno;

use super::{open_tree, readable};
use crate::errno::errno_error;
use crate::guest::Inner;
use crate::mount::mounting::path_of;
use crate::mount::target::{FileId, Target};
use crate::undo::journal::{self, Journal, Note, Wanted, strike};
use crate::undo::ledger::ScratchClaim;

/// A directory for what is written, with what overlay keeps in it.
pub(super) struct Scratch {
    pub(super) upper: OwnedFd,
    pub(super) work: OwnedFd,
    /// What was made just now; removed again unless the overlay comes to be.
    made: Made,
    pub(super) claim: Option<ScratchClaim>,
}

impl Scratch {
    /// Makes what is missing; the root of the tree looks like the topmost layer's.
    pub(super) fn prepare(
        guest: &Inner,
        path: &Path,
        root: &Stat,
        target: &Target,
    ) -> Result<Self, BackendError> {
        let directory = open_tree(path, "scratch")?;
        let stat =
            fstat(&directory).map_err(|errno| errno_error("cannot look at the scratch", errno))?;
        let claim = guest.scratches.claim(FileId::of(&stat)).ok_or_else(|| {
            BackendError::conflict(format!(
                "scratch {} is in use by another overlay",
                path.display()
            ))
        })?;
        let kept = directory
            .try_clone()
            .map_err(|error| errno_error("cannot keep the scratch open", error))?;
        let mut made = Made {
            path: path_on_record(guest, &directory, path)?,
            directory: kept,
            names: Vec::new(),
        };
        let journal = guest.journal.as_ref();
        let upper = made.subdirectory("upper", journal, target)?;
        if made.has("upper") {
            let what = || {
                format!(
                    "cannot give {}/upper the owner and mode of the topmost layer",
                    path.display()
                )
            };
            let (owner, group) = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
            rustix::fs::fchown(&upper, Some(owner), Some(group))
                .map_err(|errno| errno_error(what(), errno))?;
            let mode = Mode::from_raw_mode(root.st_mode);
            rustix::fs::fchmod(&upper, mode).map_err(|errno| errno_error(what(), errno))?;
        }
        let work = made.subdirectory("work", journal, target)?;
        Ok(Scratch {
            upper,
            work,
            made,
            claim: Some(claim),
        })
    }

    /// The overlay is there: what was made stays.
    pub(super) fn keep(&mut self) -> Option<ScratchClaim> {
        for (_, note) in self.made.names.drain(..) {
            strike(note);
        }
        self.claim.take()
    }
}

/// Directories made in a scratch, removed when this is dropped.
struct Made {
    directory: OwnedFd,
    path: PathBuf,
    names: Vec<(&'static str, Option<Note>)>,
}

/// What names the scratch on record: its path through no symbolic link.
fn path_on_record(
    guest: &Inner,
    directory: &OwnedFd,
    path: &Path,
) -> Result<PathBuf, BackendError> {
    if guest.journal.is_none() {
        return Ok(path.to_owned());
    }
    std::fs::read_link(path_of(directory))
        .map_err(|error| errno_error(format!("cannot find scratch {}", path.display()), error))
}

impl Made {
    fn subdirectory(
        &mut self,
        name: &'static str,
        journal: Option<&Arc<Journal>>,
        target: &Target,
    ) -> Result<OwnedFd, BackendError> {
        let path = self.path.join(name);
        let wanted = Wanted {
            name: OsStr::new(name),
            mode: Mode::from_raw_mode(0o755),
            path: &path,
            scratch_of: Some(target.path()),
        };
        if let Some(made) = journal::make_directory(journal, &self.directory, &wanted)? {
            self.names.push((name, made.note));
        }
        readable(&self.directory, wanted.name).map_err(|errno| {
            errno_error(format!("cannot open directory {}", path.display()), errno)
        })
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|(made, _)| *made == name)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (name, note) in self.names.drain(..) {
            let done = readable(&self.directory, OsStr::new(name)).and_then(|made| {
                empty_of_kernels(&made);
                unlinkat(&self.directory, name, AtFlags::REMOVEDIR)
            });
            match done {
                Ok(()) | Err(Errno::NOENT) => strike(note),
                Err(errno) => {
                    tracing::warn!(name, %errno, "cannot remove a directory made in a scratch");
                }
            }
        }
    }
}

/// Removes from a directory of a scratch what the kernel made in it before there was no overlay
/// after all.
fn empty_of_kernels(directory: &OwnedFd) {
    for name in ["work", "index"] {
        // There is most often none; and if one stays, so does the directory.
        let _none_is_fine = unlinkat(directory, name, AtFlags::REMOVEDIR);
    }
}

/// Removes a directory that an earlier process made in a scratch, for an overlay that did not come to
/// be, and says whether that is settled.
pub(crate) fn remove_left(path: &Path, meant: FileId) -> bool {
    let found = Target::parse(path, &[]).and_then(|target| target.find());
    let Ok(Some(place)) = found else { return true };
    if place.id().ok() == Some(meant) {
        empty_of_kernels(place.directory());
    }
    match place.into_path_at().remove(meant) {
        // What somebody has written to is not ours to remove.
        Ok(()) | Err(Errno::NOENT | Errno::EXIST | Errno::NOTEMPTY) => true,
        Err(errno) => {
            tracing::warn!(path = %path.display(), %errno, "cannot remove a directory made in a scratch");
            false
        }
    }
}
