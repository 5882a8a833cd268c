//! Undoes what is on a target's list, the last step first.

use blockmount::{BackendError, ErrorKind};

use crate::device::{crypt, dm_linear, free, integrity, partition, verity};
use crate::kernel::Kernel;
use crate::mount::{directory, expose, unmount, users};
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{Identity, Undo};

/// One attempt to undo all that was made for a target. Blocks.
///
/// # Errors
///
/// `Busy` if a step is busy, which the next attempt goes on with; a mount is if somebody else mounted something over it.
/// `Conflict` if somebody else mounted something in its place. `LostWrites` if all is undone, and writes to the mount were lost.
pub(crate) fn undo_all(list: &UndoList<'_>, kernel: Kernel) -> Result<(), BackendError> {
    undo(list, 0, kernel)?;
    list.end().map_or(Ok(()), Err)
}

/// One attempt to undo all steps of a list but the first ones. What cannot be undone for now without keeping up the
/// rest stays on the list. Blocks.
pub(crate) fn undo(list: &UndoList<'_>, first: usize, kernel: Kernel) -> Result<(), BackendError> {
    for step in list.steps().into_iter().skip(first).rev() {
        let done = undo_step(list, &step, kernel);
        done.inspect_err(|_| list.save_or_warn())?;
    }
    Ok(())
}

fn undo_step(list: &UndoList<'_>, step: &Undo, kernel: Kernel) -> Result<(), BackendError> {
    let _held = Key::of(step).map(|key| list.hold(key)).transpose()?;
    list.step()?;
    if list.hand_over(step) {
        return Ok(());
    }
    match step {
        Undo::Unmount(mount) => {
            let source = Key::Source(list.target().key().to_owned());
            let _no_new_view = list.hold(source)?;
            ensure_no_view(list)?;
            let mut writes = list.take_writes();
            let done = unmount::undo(list, mount, &mut writes, kernel);
            list.keep_writes(writes);
            match done {
                Err(error) if error.kind() == ErrorKind::LostWrites => list.lost(error),
                done => done?,
            }
        }
        Undo::CloseCrypt(step) => crypt::undo(step)?,
        Undo::CloseIntegrity(step) => integrity::undo(step)?,
        Undo::CloseVerity(step) => verity::undo(step)?,
        Undo::RemoveNode(node) => match expose::undo(node) {
            Err(error) if error.kind() == ErrorKind::LostWrites => list.lost(error),
            done => done?,
        },
        Undo::RemoveRange(range) => dm_linear::undo(range)?,
        Undo::DeletePartition(step) => partition::undo(step)?,
        // One that somebody else has put something into stays on the list, without keeping up the rest.
        Undo::RemoveDirectory(step) if !directory::undo(list, step) => return Ok(()),
        Undo::RemoveDirectory(_) => {}
    }
    list.undone(step);
    Ok(())
}

/// A view would keep up the filesystem that is to end.
fn ensure_no_view(list: &UndoList<'_>) -> Result<(), BackendError> {
    let Some(view) = list.view_of_it() else {
        return Ok(());
    };
    let (path, view) = (list.target().path().display(), view.display());
    let message = format!("cannot unmount {path}: there is a view of it at {view}");
    Err(BackendError::busy(message))
}

/// The error `Busy` with the names of those who use what is to be undone next. They cost a walk through `/proc`. A
/// directory that is in use is no error.
pub(crate) fn name_users(list: &UndoList<'_>, error: BackendError) -> BackendError {
    let is_device = |step: &Undo| !matches!(step, Undo::RemoveDirectory(_));
    let node = match list.steps().into_iter().rfind(is_device) {
        Some(Undo::Unmount(step)) => {
            let Identity::Known(mount) = step.mount else {
                return error;
            };
            if list.view_of_it().is_some() {
                return error;
            }
            let users = users::of_mount(list.target().path(), mount.number());
            let by = users::listed(&users);
            return BackendError::busy(format!("{} by {by}", error.message()));
        }
        Some(Undo::CloseCrypt(step)) => crypt::node(&step),
        Some(Undo::CloseIntegrity(step)) => integrity::node(&step),
        Some(Undo::CloseVerity(step)) => verity::node(&step),
        // Who uses the device is in the error already.
        Some(Undo::RemoveNode(_)) => None,
        Some(Undo::RemoveRange(range)) => dm_linear::node(&range),
        Some(Undo::DeletePartition(step)) => partition::node(&step),
        Some(Undo::RemoveDirectory(_)) | None => None,
    };
    match node {
        Some(node) => free::name_users(&node, error),
        None => error,
    }
}
