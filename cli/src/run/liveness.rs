//! Whether a run is alive, and what one that is not has left in somebody's way.

use std::fs::File;
use std::io;
use std::path::Path;

use blockmount_linux::mountinfo;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::files::open_file;
use super::{Kept, OVERLAY, RunPaths, id_in};

impl RunPaths {
    /// Whether somebody holds the run's lock. Without a lock, it was killed at its start or its end.
    pub(crate) fn is_alive(&self) -> io::Result<bool> {
        let file = match open_file(&self.lock(), File::options().read(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// What to do about a tree of another run that is at a target, if there is one. Blocks.
pub(crate) fn in_the_way(target: &Path) -> Option<String> {
    let mounts = mountinfo::read().ok()?;
    let at = mountinfo::at(&mounts, target);
    let mut trees = at.iter().filter(|mount| mount.filesystem == OVERLAY);
    let mark =
        trees.find_map(|mount| mount.source.to_str().filter(|mark| id_in(mark).is_some()))?;
    let paths = RunPaths::of(id_in(mark)?);
    if paths.is_alive().ok()? {
        return Some(
            "another \"blockmount mount\" holds a tree there: end it, or choose another path"
                .to_owned(),
        );
    }
    if paths.dir.symlink_metadata().is_err() {
        let advice =
            "a tree of blockmount is there, perhaps of another container: choose another path";
        return Some(advice.to_owned());
    }
    Some(match paths.kept() {
        Kept::Resumable(kept) => format!(
            "a killed run has left its tree there; go on with it: sudo blockmount mount --resume {}",
            kept.name
        ),
        Kept::Lost(_) => {
            "a killed run has left its tree there; remove it, with all that was written to it: \
                          sudo blockmount cleanup --resumable"
                .to_owned()
        }
        Kept::No => {
            "a killed run has left its tree there; remove it: sudo blockmount cleanup".to_owned()
        }
    })
}
