//! What a frozen manager has, as a value that can be sent to another host.

use std::collections::{HashMap, HashSet};
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

    /// The disks that are attached, in the order of their records.
    pub(crate) fn disks(&self) -> Vec<Disk> {
        let disks = self.records.iter().filter_map(|record| match record {
            Record::Attachment(record) => Some(record.disk.clone()),
            _ => None,
        });
        disks.collect()
    }

    /// Writes the id that each of the [disks](Self::disks) has here, in their order, wherever the one that it had is. All at
    /// once: the id of one may be what another had.
    pub(crate) fn reidentify(&mut self, ids: Vec<DiskId>) {
        let mut ids = ids.into_iter();
        let mut now = HashMap::new();
        for record in &mut self.records {
            if let Record::Attachment(record) = record
                && let Some(id) = ids.next()
            {
                now.insert(std::mem::replace(&mut record.id, id.clone()), id);
            }
        }
        let rename = |id: &mut DiskId| {
            if let Some(now) = now.get(id) {
                *id = now.clone();
            }
        };
        for record in &mut self.records {
            match record {
                Record::Mount(mount) => {
                    let disks = mount.disk.iter_mut().chain(&mut mount.devices);
                    disks.for_each(rename);
                }
                Record::Holder(holder) => {
                    if let RecordKey::Attachment(of) = &mut holder.of {
                        rename(of);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{AttachmentRecord, HolderRecord, MountKey, MountRecord, Progress};
    use crate::{HolderName, MountOptions};

    #[test]
    fn n18_disks_keep_their_mounts_when_another_host_exchanges_their_ids() {
        let old = |number| DiskId::inode(1, number);
        let disk = |number| Disk::virtual_disk(format!("/{number}.img"));
        let locator = |number: u64| format!("fake:{number}").parse().unwrap();
        let mut records = Vec::new();
        for number in 0..3 {
            records.push(Record::Attachment(AttachmentRecord {
                id: old(number),
                disk: disk(number),
                progress: Progress::Up,
                locator: Some(locator(number)),
                unplugged: false,
            }));
            records.push(Record::Holder(HolderRecord {
                name: HolderName::new(format!("h{number}")).unwrap(),
                of: RecordKey::Attachment(old(number)),
            }));
        }
        let device = locator(0);
        let options = MountOptions::default();
        records.push(Record::Mount(MountRecord {
            key: MountKey { device, options },
            disk: Some(old(0)),
            devices: vec![old(2), old(1)],
            target: "/mnt".into(),
            progress: Progress::Up,
        }));
        let mut snapshot = Snapshot::new(records);
        assert_eq!(snapshot.disks(), [disk(0), disk(1), disk(2)]);
        // Here each has the id that the next one had there.
        let here = |number| old((number + 1) % 3);
        snapshot.reidentify(vec![here(0), here(1), here(2)]);
        for record in snapshot.records() {
            match record {
                Record::Attachment(record) => {
                    let number = (0..3).find(|number| record.disk == disk(*number)).unwrap();
                    assert_eq!(record.id, here(number));
                }
                Record::Holder(record) => {
                    let number = (0..3).find(|number| record.name.as_str() == format!("h{number}"));
                    assert_eq!(record.of, RecordKey::Attachment(here(number.unwrap())));
                }
                Record::Mount(record) => {
                    assert_eq!(record.disk, Some(here(0)));
                    assert_eq!(record.devices, [here(2), here(1)]);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
