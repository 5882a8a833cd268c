//! Directories for image files: locked by the run that they belong to, and found again when nothing else is left of it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::files::{ensure_private, open_directory};
use super::{RunPaths, WORK, create, is_id};

/// A file in the directory of a run with a name, whose scratch may be all that is left of somebody's work.
const NAMED: &str = "named";

/// Locks the directory that this run has just made.
pub(super) fn lock(path: &Path, is_named: bool) -> io::Result<File> {
    let directory = try_lock(path)?;
    let taken = || io::Error::other("a clean-up has taken it away; run the command again");
    let directory = directory.ok_or_else(taken)?;
    if directory.metadata()?.nlink() == 0 {
        return Err(taken());
    }
    if is_named {
        create(&path.join(NAMED))?;
    }
    Ok(directory)
}

/// Locks the directory of a run that is resumed, if it has one.
pub(super) fn relock(path: &Path) -> io::Result<Option<File>> {
    match try_lock(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Ok(None) => Err(io::Error::other("another process has locked it")),
        locked => locked,
    }
}

/// None if somebody else has it locked.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let directory = open_directory(path)?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// A directory for image files whose run has no directory of its own here.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) id: String,
    /// Whether its run could be resumed, as long as it had one.
    pub(crate) is_named: bool,
    /// Keeps the directory from being anybody else's meanwhile; none if its run is alive elsewhere.
    pub(crate) lock: Option<File>,
}

/// Looks for such directories of root's. `/run` is empty after each boot, and each container has its own; what is in
/// `/var/tmp` stays.
pub(crate) fn orphans() -> io::Result<Vec<Orphan>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(WORK)? {
        let name = entry?.file_name();
        let id = name
            .to_str()
            .and_then(|name| name.strip_prefix("blockmount-"));
        let Some(paths) = id.filter(|id| is_id(id)).map(RunPaths::of) else {
            continue;
        };
        if paths.dir.symlink_metadata().is_ok() {
            continue;
        }
        // One that is not root's alone has such a name by chance, or to be removed by us.
        let Ok(lock) = try_lock_private(&paths.work) else {
            continue;
        };
        found.push(Orphan {
            is_named: paths.work.join(NAMED).symlink_metadata().is_ok(),
            id: paths.id,
            lock,
        });
    }
    Ok(found)
}

fn try_lock_private(path: &Path) -> io::Result<Option<File>> {
    ensure_private(&open_directory(path)?, path)?;
    try_lock(path)
}
