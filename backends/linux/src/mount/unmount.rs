//! Finding a mount of ours at its target, and unmounting it.

use std::os::fd::{AsFd, OwnedFd};

use blockmount::BackendError;
use rustix::fs::{CWD, Mode, OFlags, openat, syncfs};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, UnmountFlags, open_tree};

use crate::errno::errno_error;
use crate::kernel::Kernel;
use crate::mount::mount_id::MountId;
use crate::mount::mountinfo::{self, MountInfo};
use crate::mount::target::{PathAt, Target};
use crate::undo::step::{Identity, MountStep};

/// What is at a target now.
#[derive(Debug)]
pub(crate) enum Now {
    /// Our mount, on top.
    Ours(MountId, PathAt),
    /// Our mount, below something of others.
    Covered,
    /// Something of others instead.
    Replaced,
    /// Nothing of ours, and nothing of others.
    Gone,
}

/// Looks for a mount at a target. Blocks.
pub(crate) fn now(target: &Target, mount: &Identity, kernel: Kernel) -> Result<Now, BackendError> {
    let found = match target.find()? {
        Some(found) if found.is_mount_point()? => {
            Some((MountId::of(found.directory(), kernel)?, found))
        }
        _ => None,
    };
    let is_ours = match &found {
        None => false,
        Some((id, _)) => match mount {
            Identity::Known(known) => id == known,
            Identity::Expected { .. } => table()?.iter().any(|line| fits(line, *id, mount)),
        },
    };
    let is_replaced = found.is_some();
    if let Some((id, found)) = found.filter(|_| is_ours) {
        return Ok(Now::Ours(id, found.into_path_at()));
    }
    let is_covered = match mount {
        Identity::Known(mount) => {
            let table = table()?;
            let lines = mountinfo::at(&table, target.path());
            lines.iter().any(|line| mount.is(line))
        }
        Identity::Expected { .. } => false,
    };
    Ok(match (is_covered, is_replaced) {
        (true, _) => Now::Covered,
        (false, true) => Now::Replaced,
        (false, false) => Now::Gone,
    })
}

fn table() -> Result<Vec<MountInfo>, BackendError> {
    mountinfo::read().map_err(|error| errno_error("cannot read the table of mounts", error))
}

/// Whether a line of the kernel's table is of a mount, and shows what was expected of it.
fn fits(line: &MountInfo, id: MountId, expected: &Identity) -> bool {
    let Identity::Expected {
        filesystem,
        source,
        options,
    } = expected
    else {
        return false;
    };
    id.is(line)
        && line.filesystem == *filesystem
        && line.source == source.0.as_os_str()
        && options.iter().all(|option| line.has_option(option))
}

/// Unmounts what we have mounted at a target. Never lazily: a lazy unmount hides who still uses it. Blocks.
///
/// # Errors
///
/// `Busy` if somebody uses it, `Conflict` if somebody else mounted something over it or in its place. `LostWrites` if
/// it is unmounted, and the device did not take what was written.
pub(crate) fn undo(target: &Target, step: &MountStep, kernel: Kernel) -> Result<(), BackendError> {
    let path = target.path().display();
    let foreign = |what: &str| {
        let message = format!("cannot unmount {path}: somebody else mounted {what}");
        Err(BackendError::conflict(message))
    };
    match now(target, &step.mount, kernel)? {
        Now::Covered => foreign("something over it"),
        Now::Replaced => foreign("something else in its place"),
        Now::Gone => Ok(()),
        Now::Ours(_, at) => {
            let unmount = || match rustix::mount::unmount(at.path(), UnmountFlags::NOFOLLOW) {
                Ok(()) => Ok(()),
                Err(Errno::BUSY) => {
                    let message = format!("cannot unmount {path}: it is in use");
                    Err(BackendError::busy(message))
                }
                Err(errno) => Err(errno_error(format!("cannot unmount {path}"), errno)),
            };
            if !step.is_writable() {
                return unmount();
            }
            let written = match last_mount(&at, kernel) {
                // The filesystem lives as long as this mount, and nothing writes to it any more.
                Some(last) => {
                    unmount()?;
                    write_back(&last)
                }
                None => {
                    let written = at.open().and_then(write_back);
                    unmount()?;
                    written
                }
            };
            written.map_err(|errno| {
                let message = format!(
                    "{path} is unmounted, but its device did not take all that was written"
                );
                BackendError::lost_writes(message).with_source(std::io::Error::from(errno))
            })
        }
    }
}

/// Another mount of the same filesystem, which only this process has, so that errors of writing can be asked for
/// after the one that others can see has gone. Nothing where the kernel has no such mounts.
fn last_mount(at: &PathAt, kernel: Kernel) -> Option<OwnedFd> {
    if !kernel.contexts {
        return None;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    open_tree(CWD, at.path(), flags).ok()
}

/// Writes back what is cached of the filesystem of a mount. Reports each error that nothing else was told of.
fn write_back(mount: impl AsFd) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    syncfs(openat(mount, ".", flags, Mode::empty())?)
}

/// A target that we have not mounted is unmounted, unless somebody else mounted it. Blocks.
///
/// # Errors
///
/// `Conflict` if something is mounted there.
pub(crate) fn refuse_foreign(target: &Target) -> Result<(), BackendError> {
    if target.is_mount_point()? {
        let path = target.path().display();
        let message = format!("cannot unmount {path}: somebody else mounted it");
        return Err(BackendError::conflict(message));
    }
    Ok(())
}
