//! Taking over from an earlier process, which was killed at any moment.
//!
//! | the list of a target | and in the kernel | then |
//! |---|---|---|
//! | has a mount | it is there | the list is ours again, and all that it shares or excludes |
//! | has a mount | it is not there | the other steps are undone; what somebody else mounted there is not touched |
//! | has no mount yet, or no more | | its steps are undone |
//!
//! Each step is tried for itself, and one whose identity does not fit what is there changes nothing. What cannot be undone
//! for now stays on its list.

use std::sync::Arc;

use blockmount::{BackendError, Presence};

use crate::kernel::Kernel;
use crate::mount::expose;
use crate::mount::target::Target;
use crate::mount::unmount::{Now, now};
use crate::undo::journal::{Journal, Note};
use crate::undo::ledger::{Ledger, UndoList};
use crate::undo::record::Record;
use crate::undo::step::{Appearance, Identity, MountStep, Undo};

/// The ledger as the journal has it, and the targets whose mounts are not there, which are to be undone. Blocks.
///
/// # Errors
///
/// If the journal cannot be read at all; nothing that is found in it is an error.
pub(crate) fn recover(
    journal: Arc<Journal>,
    kernel: Kernel,
) -> Result<(Ledger, Vec<Target>), BackendError> {
    let found = journal.read()?;
    let ledger = Ledger::new(Some(journal));
    let adopt = |(note, record)| adopt(&ledger, note, record);
    let mut targets: Vec<Target> = found.into_iter().filter_map(adopt).collect();
    // What is in use must be known before anything is undone that it may share.
    targets.retain(|target| {
        let list = ledger.list(target);
        recover_mount(&list, kernel);
        !list.is_in_use()
    });
    Ok((ledger, targets))
}

fn adopt(ledger: &Ledger, note: Note, record: Record) -> Option<Target> {
    let path = record.target.0;
    let target = match Target::parse(&path, &[]) {
        Ok(target) => target,
        Err(error) => {
            note.set_aside(&error.to_string());
            return None;
        }
    };
    match ledger.adopt(&target, note, record.steps) {
        Ok(()) => Some(target),
        Err(note) => {
            note.set_aside(&format!("there is another one about {}", path.display()));
            None
        }
    }
}

/// What is there of a mount that another process remembers for the target of a list. Blocks.
pub(crate) fn presence(
    list: &UndoList<'_>,
    kernel: Kernel,
    is_it: impl Fn(Appearance<'_>) -> bool,
) -> Result<Presence, BackendError> {
    let steps = list.steps();
    if !list.is_in_use() {
        // Without a journal, an earlier process may have mounted what is at the target.
        let is_known = || list.has_journal() || !list.target().is_mount_point().unwrap_or(true);
        return Ok(match steps.is_empty() && is_known() {
            true => Presence::Absent,
            false => Presence::Unknown,
        });
    }
    let step = match steps.last() {
        Some(Undo::Unmount(step)) => step,
        Some(Undo::RemoveNode(node)) if expose::is_there(node) => {
            return Ok(match is_it(Appearance::Device(&node.device)) {
                true => Presence::Present(()),
                false => Presence::Absent,
            });
        }
        _ => return Ok(Presence::Unknown),
    };
    let appears = steps.last().and_then(Undo::appearance);
    match now(list.target(), &step.mount, kernel)? {
        Now::Ours(..) if appears.is_some_and(is_it) => {
            let device = step.device.as_ref();
            // A mount outlives its device, and can then only be taken away.
            Ok(match device.is_some_and(|used| used.number.is_lost()) {
                true => Presence::Unknown,
                false => Presence::Present(()),
            })
        }
        Now::Ours(..) => Ok(Presence::Absent),
        Now::Covered | Now::Replaced | Now::Gone => Ok(Presence::Unknown),
    }
}

/// Finds out whether the mount or the device node on a list is there.
fn recover_mount(list: &UndoList<'_>, kernel: Kernel) {
    let path = list.target().path().display();
    let step = match list.steps().pop() {
        Some(Undo::Unmount(step)) => step,
        // Under its first name, or under that of something else, it is none.
        Some(Undo::RemoveNode(node)) if expose::is_there(&node) => {
            list.keep();
            return tracing::info!(path = %blockmount::printable(&path), "took over a device node of an earlier process");
        }
        _ => return,
    };
    let mount = match now(list.target(), &step.mount, kernel) {
        Ok(Now::Ours(mount, _)) => Identity::Known(mount),
        Ok(Now::Covered) => step.mount.clone(),
        Ok(Now::Gone) => {
            tracing::info!(path = %blockmount::printable(&path), "a mount of an earlier process is gone");
            return list.retain(|step| !matches!(step, Undo::Unmount(_)));
        }
        Ok(Now::Replaced) => {
            tracing::warn!(path = %blockmount::printable(&path), "there is something else in the place of a mount of an earlier process");
            return list.retain(|step| !matches!(step, Undo::Unmount(_)));
        }
        Err(error) => return list.set_aside(&format!("{path} cannot be looked at: {error}")),
    };
    list.replace_last(Undo::Unmount(Box::new(MountStep { mount, ..*step })));
    list.keep_made_inside();
    list.keep();
    tracing::info!(path = %blockmount::printable(&path), "took over a mount of an earlier process");
}
