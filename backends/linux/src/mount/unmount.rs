//! Finding a mount of ours at its target, and unmounting it.

use std::iter;

use blockmount::BackendError;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::errno::errno_error;
use crate::kernel::Kernel;
use crate::mount::mount_id::{MountId, UNIQUE_ID};
use crate::mount::mountinfo::{self, MountInfo};
use crate::mount::target::{PathAt, Target};
use crate::mount::writes::Writes;
use crate::undo::ledger::UndoList;
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

pub(crate) fn table() -> Result<Vec<MountInfo>, BackendError> {
    mountinfo::read().map_err(|error| errno_error("cannot read the table of mounts", error))
}

/// Our mount, if it is on top at the target of a list, by the number that no other mount gets; else [`now`] says what is there.
fn on_top(list: &UndoList<'_>, mount: &Identity, kernel: Kernel) -> Option<Now> {
    let Identity::Known(known) = mount else {
        return None;
    };
    let name = list.target().path().file_name()?;
    let parent = kernel.unique_ids.then(|| list.parent().ok()).flatten()?;
    let seen = parent.look(name, UNIQUE_ID).ok()?;
    let ours = || Now::Ours(*known, parent.path_at(name));
    known.is_root(&seen).then(ours)
}

/// Whether a line of the kernel's table is of a mount, and shows what was expected of it.
fn fits(line: &MountInfo, id: MountId, expected: &Identity) -> bool {
    id.is(line) && shows(line, expected)
}

/// Whether a line of the kernel's table shows what was expected of a mount.
pub(crate) fn shows(line: &MountInfo, expected: &Identity) -> bool {
    let Identity::Expected {
        filesystem,
        source,
        further_sources,
        options,
    } = expected
    else {
        return false;
    };
    line.filesystem == *filesystem
        && (iter::once(source).chain(further_sources)).any(|path| line.source == path.0.as_os_str())
        && options.iter().all(|option| line.has_option(option))
}

/// Unmounts what we have mounted at a target. Never lazily: a lazy unmount hides who still uses it. Takes `writes` as
/// soon as the mount is gone. Blocks.
///
/// # Errors
///
/// `Busy` if somebody uses it or has mounted something over it, `Conflict` if somebody else mounted something in its
/// place. `LostWrites` if it is unmounted, and writes to it were lost.
pub(crate) fn undo(
    list: &UndoList<'_>,
    step: &MountStep,
    writes: &mut Option<Writes>,
    kernel: Kernel,
) -> Result<(), BackendError> {
    let target = list.target();
    let path = target.path().display();
    let now = match on_top(list, &step.mount, kernel) {
        Some(found) => found,
        None => now(target, &step.mount, kernel)?,
    };
    match now {
        Now::Covered => {
            let message = format!("cannot unmount {path}: it is covered");
            return Err(BackendError::busy(message));
        }
        Now::Replaced => {
            *writes = None;
            let message =
                format!("cannot unmount {path}: somebody else mounted something else in its place");
            return Err(BackendError::conflict(message));
        }
        Now::Gone => {}
        Now::Ours(mount, at) => {
            if let Some(device) = step.writable_device() {
                writes
                    .get_or_insert_with(|| Writes::to_old(&at, device, kernel.contexts))
                    .look(mount, &at);
            }
            rustix::mount::unmount(at.path(), UnmountFlags::NOFOLLOW).map_err(
                |errno| match errno {
                    Errno::BUSY => {
                        BackendError::busy(format!("cannot unmount {path}: it is in use"))
                    }
                    errno => errno_error(format!("cannot unmount {path}"), errno),
                },
            )?;
        }
    }
    writes.take().map_or(Ok(()), |writes| writes.end(path))
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
