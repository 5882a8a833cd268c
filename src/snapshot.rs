//! What a frozen manager has, as a value that can be sent to another host.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::journal::{Record, RecordKey, Recorded};
use crate::{BackendError, Disk, DiskId, Error, Step};

/// The version of the format. One that is higher is refused.
const VERSION: u32 = 1;

/// All that a frozen manager has: the records that its journal would have.
///
/// It is checked when it is read: its records must fit each other, and what is recorded as up must stand on what is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Snapshot {
    version: u32,
    records: Vec<Record>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    version: u32,
    records: Vec<Record>,
}

impl Snapshot {
    pub(crate) fn new(records: Vec<Record>) -> Self {
        let version = VERSION;
        Snapshot { version, records }
    }

    /// The records, in no order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Gives each disk the name that it has on another host.
    ///
    /// # Errors
    ///
    /// `Invalid` if two disks would have one name; nothing is then changed.
    pub fn rewrite_sources(
        &mut self,
        mut rewrite: impl FnMut(&Path) -> PathBuf,
    ) -> Result<(), Error> {
        let (mut names, mut rewritten) = (HashSet::new(), self.records.clone());
        for record in &mut rewritten {
            if let Record::Attachment(record) = record {
                record.disk = record
                    .disk
                    .clone()
                    .with_source(rewrite(record.disk.source()));
                let (kind, source) = (record.disk.kind().clone(), record.disk.source().to_owned());
                if !names.insert((kind, source)) {
                    let cause = BackendError::invalid("two disks would have one name");
                    return Err(Error::new(Step::Recover, cause).on_disk(&record.disk));
                }
            }
        }
        self.records = rewritten;
        Ok(())
    }

    pub(crate) fn disks(&self) -> Vec<Disk> {
        let disks = self.records.iter().filter_map(|record| match record {
            Record::Attachment(record) => Some(record.disk.clone()),
            _ => None,
        });
        disks.collect()
    }

    /// Writes the id that a disk has here wherever the one that it had is.
    pub(crate) fn reidentify(&mut self, disk: &Disk, id: &DiskId) {
        let before = self.records.iter_mut().find_map(|record| match record {
            Record::Attachment(record) if record.disk == *disk => {
                Some(std::mem::replace(&mut record.id, id.clone()))
            }
            _ => None,
        });
        for record in &mut self.records {
            match record {
                Record::Mount(mount) => {
                    let disks = mount.disk.iter_mut().chain(&mut mount.devices);
                    disks
                        .filter(|disk| Some(&**disk) == before.as_ref())
                        .for_each(|disk| *disk = id.clone());
                }
                Record::Holder(holder) => {
                    if let RecordKey::Attachment(of) = &mut holder.of
                        && Some(&*of) == before.as_ref()
                    {
                        *of = id.clone();
                    }
                }
                _ => {}
            }
        }
    }

    pub(crate) fn recorded(&self) -> Result<Recorded, Error> {
        let recorded = Recorded::sort(self.records.clone());
        recorded.ensure_whole()?;
        Ok(recorded)
    }
}

impl TryFrom<Unchecked> for Snapshot {
    type Error = String;

    fn try_from(read: Unchecked) -> Result<Self, String> {
        let Unchecked { version, records } = read;
        if version != VERSION {
            return Err(format!(
                "a snapshot of version {version}; this one reads {VERSION}"
            ));
        }
        let snapshot = Snapshot { version, records };
        match snapshot.recorded() {
            Ok(_) => Ok(snapshot),
            Err(error) => Err(format!("the snapshot is none: {}", error.cause())),
        }
    }
}
