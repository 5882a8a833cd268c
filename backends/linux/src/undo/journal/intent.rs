//! What will be on record about a mount, put there just before it becomes visible.

use std::path::Path;
use std::sync::Arc;

use blockmount::{BackendError, MountOptions};

use super::{DeviceUse, Identity, Journal, MountRecord, Note, PartitionId, Record};
use crate::device::DeviceNumber;
use crate::mount::mounting::MountId;
use crate::mount::target::FileId;

/// A mount that is about to be made. Without a journal, nothing is written or even put together.
#[derive(Debug)]
pub(crate) struct Intent<'a> {
    pub(crate) journal: Option<&'a Arc<Journal>>,
    pub(crate) target: &'a Path,
    pub(crate) device: Option<(DeviceNumber, &'a MountOptions)>,
    pub(crate) partition: Option<PartitionId>,
    pub(crate) scratch: Option<FileId>,
}

/// A mount that was made, and its record.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) mount: MountId,
    pub(crate) note: Option<Note>,
}

impl Intent<'_> {
    /// Puts the mount on record.
    pub(crate) fn note(
        &self,
        mount: impl FnOnce() -> Identity,
    ) -> Result<Option<Note>, BackendError> {
        let Some(journal) = self.journal else {
            return Ok(None);
        };
        journal.note(&self.record(mount())).map(Some)
    }

    /// Puts the identity on record that the mount turned out to have.
    pub(crate) fn identified(
        &self,
        note: Option<&Note>,
        mount: MountId,
    ) -> Result<(), BackendError> {
        match note {
            Some(note) => note.rewrite(&self.record(Identity::Known(mount))),
            None => Ok(()),
        }
    }

    fn record(&self, mount: Identity) -> Record {
        let device = self.device.map(|(number, options)| DeviceUse {
            number,
            options: options.clone(),
        });
        Record::Mount(Box::new(MountRecord {
            target: self.target.into(),
            mount,
            device,
            partition: self.partition,
            scratch: self.scratch,
        }))
    }
}
