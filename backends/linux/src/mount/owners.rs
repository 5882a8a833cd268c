//! Giving the files of a volume to a group, before they appear.
//!
//! The image is not trusted: each file is opened below its directory without following a link, and is changed by its
//! descriptor. The root is changed last, so that a walk that was cut off shows at the root.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use blockmount::{BackendError, FsGroup, FsGroupPolicy};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RawMode, Stat, chmodat, chownat, fstat, openat,
};
use rustix::io::Errno;

use crate::errno::errno_error;
use crate::mount::target::mount_id;
use crate::undo::ledger::UndoList;

/// What owner and group may do with a file. (`SetVolumeOwnership` of the kubelet of Kubernetes)
const FILE: RawMode = 0o660;
/// The same of a directory; and what is made in it belongs to its group.
const DIRECTORY: RawMode = 0o2770;

/// How deep directories are nested at most: each one on the way is open. A path of Linux has room for 2,047.
const DEEPEST: usize = 300;

/// A group to give a volume to, and how long that may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Giving {
    pub(crate) group: FsGroup,
    pub(crate) within: Duration,
}

impl Giving {
    /// Gives everything on a mount to the group, by the directory that is its root. Blocks.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if the filesystem has no owners, `Invalid` if its directories are nested too deep, `Other` if it takes
    /// too long. What has been given then stays so, and the root is as it was.
    pub(crate) fn give(self, root: &OwnedFd, list: &UndoList<'_>) -> Result<(), BackendError> {
        let root = Level::open(root.as_fd(), c".").map_err(trouble)?;
        let mut walk = Walk {
            list,
            giving: self,
            mount: mount_id(root.fd()?)?,
            deadline: Instant::now() + self.within,
            given: 0,
            refused: 0,
        };
        let policy = self.group.policy;
        if policy == FsGroupPolicy::OnRootMismatch && walk.is_given(&root.stat, DIRECTORY) {
            return Ok(());
        }
        walk.everything(root)?;
        if walk.refused > 0 {
            let (files, gid) = (walk.refused, self.group.gid);
            tracing::warn!(
                files,
                gid,
                "files of a volume that may not be changed keep their group"
            );
        }
        Ok(())
    }
}

/// A directory on the way, and what in it is still to be looked at.
struct Level {
    stat: Stat,
    entries: Dir,
}

impl Level {
    fn open(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(parent, name, flags, Mode::empty())?;
        let stat = fstat(&directory)?;
        let entries = Dir::new(directory)?;
        Ok(Level { stat, entries })
    }

    fn fd(&self) -> Result<BorrowedFd<'_>, BackendError> {
        self.entries.fd().map_err(trouble)
    }

    /// The next file in it, open and as it is; nothing at the end.
    fn next(&mut self) -> rustix::io::Result<Option<(OwnedFd, Stat)>> {
        while let Some(entry) = self.entries.read() {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(self.entries.fd()?, entry.file_name(), flags, Mode::empty())?;
            let stat = fstat(&file)?;
            return Ok(Some((file, stat)));
        }
        Ok(None)
    }
}

struct Walk<'a> {
    list: &'a UndoList<'a>,
    giving: Giving,
    /// The mount that is not left.
    mount: u64,
    deadline: Instant,
    /// How many files were changed.
    given: u64,
    /// How many files may not be changed, such as those that are immutable.
    refused: u64,
}

impl Walk<'_> {
    /// From the bottom up.
    fn everything(&mut self, root: Level) -> Result<(), BackendError> {
        let mut way = vec![root];
        while let Some(level) = way.last_mut() {
            self.ensure_in_time()?;
            match level.next().map_err(trouble)? {
                Some((directory, stat)) if is(&stat, FileType::Directory) => {
                    if mount_id(&directory)? == self.mount {
                        if way.len() == DEEPEST {
                            return Err(too_deep());
                        }
                        way.push(Level::open(directory.as_fd(), c".").map_err(trouble)?);
                    }
                }
                Some((file, stat)) => drop(self.give(file.as_fd(), &stat, FILE)?),
                None => {
                    self.list.step()?;
                    let is_given = self.give(level.fd()?, &level.stat, DIRECTORY)?;
                    way.pop();
                    if way.is_empty() && !is_given {
                        return Err(self.no_owners());
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives one file to the group; false if it may not be changed.
    fn give(
        &mut self,
        file: BorrowedFd<'_>,
        stat: &Stat,
        mode: RawMode,
    ) -> Result<bool, BackendError> {
        if self.is_given(stat, mode) {
            return Ok(true);
        }
        match self.change(file, stat, mode) {
            Ok(()) => {
                self.given += 1;
                Ok(true)
            }
            Err(Errno::PERM) => {
                self.refused += 1;
                Ok(false)
            }
            Err(errno) => Err(trouble(errno)),
        }
    }

    fn change(&self, file: BorrowedFd<'_>, stat: &Stat, mode: RawMode) -> rustix::io::Result<()> {
        let group = Some(Gid::from_raw(self.giving.group.gid));
        chownat(file, c"", None, group, AtFlags::EMPTY_PATH)?;
        if is(stat, FileType::Symlink) {
            return Ok(());
        }
        // The change of the group takes set-user-id away, which the owner has given.
        let mode = Mode::from_raw_mode((stat.st_mode & 0o7777) | mode);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmodat(CWD, path, mode, AtFlags::empty())
    }

    fn is_given(&self, stat: &Stat, mode: RawMode) -> bool {
        let has_mode = is(stat, FileType::Symlink) || stat.st_mode & mode == mode;
        stat.st_gid == self.giving.group.gid && has_mode
    }

    fn ensure_in_time(&self) -> Result<(), BackendError> {
        if Instant::now() < self.deadline {
            return Ok(());
        }
        let Giving { group, within } = self.giving;
        let message = format!(
            "gave {} files of the volume to group {} in {within:?}, and there are more: those stay given, so try again, \
             or allow more time",
            self.given, group.gid
        );
        Err(BackendError::other(message))
    }

    fn no_owners(&self) -> BackendError {
        let gid = self.giving.group.gid;
        BackendError::unsuitable(format!(
            "cannot give the volume to group {gid}: its filesystem has no owners, or its root may not be changed"
        ))
    }
}

fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

fn too_deep() -> BackendError {
    BackendError::invalid(format!(
        "cannot give the volume to a group: its directories are nested deeper than {DEEPEST}"
    ))
}

fn trouble(errno: Errno) -> BackendError {
    errno_error("cannot give the files of the volume to a group", errno)
}
