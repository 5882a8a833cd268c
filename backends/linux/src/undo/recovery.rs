//! Taking over from an earlier process, which was killed at any moment.
//!
//! | on record | and in the kernel | then |
//! |---|---|---|
//! | a mount | it is there | it is ours again: its target, device, scratch and partition as well |
//! | a mount | nothing is at its target | struck |
//! | a mount | something else is at its target | struck, and nothing is touched |
//! | a directory | on the way to a mount of ours | goes with the last such mount |
//! | a directory | on nobody's way | removed if it is the same and empty |
//! | a directory of a scratch | its overlay is there | struck; it stays |
//! | a partition | a mount of ours needs it | goes with that mount |
//! | a partition | nobody needs it | forgotten by the kernel if it is the same and free |
//!
//! Windows are not on record: the kernel has the names of their devices, which say what they are parts of. One that a mount
//! of ours is on goes with that mount, and one that no mount is on is removed. So there must be one agent in a guest.

use std::collections::HashMap;
use std::sync::Arc;

use blockmount::BackendError;

use crate::device::partitions::Added;
use crate::errno::errno_error;
use crate::guest::Inner;
use crate::kernel::Kernel;
use crate::mount::mountinfo;
use crate::mount::mounting::MountId;
use crate::mount::overlay::remove_left;
use crate::mount::target::Target;
use crate::undo::journal::{
    DirectoryRecord, Identity, Journal, MountRecord, Note, PartitionId, Record, RecordedPath,
};
use crate::undo::ledger::{Claim, Entry, Now, now};

type Partitions = HashMap<PartitionId, Arc<Added>>;

/// Brings a guest that has done nothing yet to what its journal says. Blocks.
///
/// # Errors
///
/// If the journal cannot be read at all; nothing that is found in it is an error.
pub(crate) fn recover(guest: &Inner, journal: &Arc<Journal>) -> Result<(), BackendError> {
    let mut mounts = Vec::new();
    let mut of_scratches = Vec::new();
    let mut partitions = Partitions::new();
    for (note, record) in journal.read()? {
        match record {
            Record::Mount(mount) => mounts.push((note, mount)),
            Record::Directory(directory) => {
                remove_staged(&directory);
                match (directory.id, directory.scratch_of) {
                    (None, _) => note.done(),
                    (Some(id), None) => guest.places().adopt(&directory.path.0, id, note),
                    (Some(id), Some(overlay)) => {
                        of_scratches.push((note, directory.path, id, overlay));
                    }
                }
            }
            Record::Partition(record) => {
                if let Some(added) = guest.partitions.adopt(note, &record) {
                    partitions.insert(record.id, added);
                }
            }
        }
    }
    for (note, record) in mounts {
        recover_mount(guest, note, *record, &partitions);
    }
    for (note, path, id, overlay) in of_scratches {
        let is_there = guest.ledger.has(&overlay.0);
        if is_there || remove_left(&path.0, id) {
            note.done();
        }
    }
    // Those that no mount has taken are forgotten here.
    drop(partitions);
    if let Err(error) = guest.windows.sweep() {
        tracing::warn!(%error, "cannot remove the windows of an earlier process");
    }
    guest.places().sweep();
    Ok(())
}

fn recover_mount(guest: &Inner, note: Note, record: MountRecord, partitions: &Partitions) {
    let path = record.target.0.display().to_string();
    let kernel = guest.kernel();
    let found = Target::parse(&record.target.0, &[])
        .and_then(|target| Ok((look(&target, &record.mount, kernel)?, target)));
    match found {
        Ok((Found::Ours(mount), target)) => {
            match adopt(guest, note, &record, &target, mount, partitions) {
                Ok(()) => tracing::info!(path, "took over a mount of an earlier process"),
                Err(error) => tracing::error!(path, %error, "cannot take over a mount"),
            }
        }
        Ok((Found::Gone, _)) => {
            tracing::info!(path, "a mount of an earlier process is gone");
            note.done();
        }
        Ok((Found::Replaced, _)) => {
            tracing::warn!(
                path,
                "there is something else in the place of a mount of an earlier process"
            );
            note.done();
        }
        Err(error) => note.set_aside(&format!("{path} cannot be looked at: {error}")),
    }
}

enum Found {
    Ours(MountId),
    Replaced,
    Gone,
}

fn look(target: &Target, mount: &Identity, kernel: Kernel) -> Result<Found, BackendError> {
    match mount {
        Identity::Known(mount) => Ok(match now(target, *mount, kernel)? {
            Now::Ours(_) | Now::Covered => Found::Ours(*mount),
            Now::Replaced => Found::Replaced,
            Now::Gone => Found::Gone,
        }),
        Identity::Expected {
            filesystem,
            source,
            options,
        } => look_for(target, filesystem, source, options, kernel),
    }
}

/// Looks for a mount that the earlier process may or may not have made before it was killed.
fn look_for(
    target: &Target,
    filesystem: &str,
    source: &RecordedPath,
    options: &[String],
    kernel: Kernel,
) -> Result<Found, BackendError> {
    let Some(place) = target.find()? else {
        return Ok(Found::Gone);
    };
    if !place.is_mount_point()? {
        return Ok(Found::Gone);
    }
    let mount = MountId::of(place.directory(), kernel)?;
    let table =
        mountinfo::read().map_err(|error| errno_error("cannot read the table of mounts", error))?;
    let is_expected = table.iter().any(|line| {
        mount.is(line)
            && line.filesystem == filesystem
            && line.source == source.0.as_os_str()
            && options.iter().all(|option| line.has_option(option))
    });
    Ok(match is_expected {
        true => Found::Ours(mount),
        false => Found::Replaced,
    })
}

fn adopt(
    guest: &Inner,
    note: Note,
    record: &MountRecord,
    target: &Target,
    mount: MountId,
    partitions: &Partitions,
) -> Result<(), BackendError> {
    // One target has one mount of ours: of two records for it, the later one is struck.
    let place = match guest.places().enter(target) {
        Ok(place) => place,
        Err(error) => {
            note.done();
            return Err(error);
        }
    };
    if record.mount != Identity::Known(mount) {
        let identified = MountRecord {
            mount: Identity::Known(mount),
            ..record.clone()
        };
        // If this fails, the mount can be recognised as it was just now.
        if let Err(error) = note.rewrite(&Record::Mount(Box::new(identified))) {
            tracing::warn!(path = %target.path().display(), %error, "a record is less exact than it could be");
        }
    }
    let claim = match &record.device {
        Some(device) => Claim::Device(guest.devices.adopt(device.number, &device.options)),
        None => Claim::Scratch(record.scratch.and_then(|id| guest.scratches.claim(id))),
    };
    let partition = record.partition.and_then(|id| partitions.get(&id).cloned());
    let window = match &record.device {
        Some(device) => guest.windows.adopt(device.number, target.path())?,
        None => None,
    };
    guest.ledger.insert(Entry {
        mount,
        note: Some(note),
        place,
        claim,
        partition,
        window: window.map(Arc::new),
    });
    Ok(())
}

/// Removes a directory that had not got its name yet.
fn remove_staged(record: &DirectoryRecord) {
    let staged = record.path.0.with_file_name(&record.staged);
    let found = Target::parse(&staged, &[]).and_then(|target| target.find());
    let Ok(Some(place)) = found else { return };
    let way = place.into_path_at();
    // Nobody else makes a directory of that name.
    if let Err(errno) = way.id().and_then(|id| way.remove(id)) {
        tracing::warn!(path = %staged.display(), %errno, "cannot remove a directory of an earlier process");
    }
}
