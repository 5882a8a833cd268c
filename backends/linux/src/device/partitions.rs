//! Partitions that the kernel does not find by itself: kernels for small guests are built without
//! the code that reads partition tables.

use std::collections::HashMap;
use std::fs::File;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use blockmount::{BackendError, ErrorKind};
use rustix::io::Errno;

use crate::device::{self, DeviceNumber};
use crate::discover::sysfs;
use crate::errno::{blocking, errno_error};
use crate::filesystem::probe::{Content, Partition, probe};
use crate::sys;
use crate::undo::journal::{Journal, Note, PartitionId, PartitionRecord, Record, strike};

/// How long the kernel gets to announce a partition that is in the table. It knows them when it
/// announces the disk, so this is for the case that the disk's announcement is under way.
const GRACE: Duration = Duration::from_millis(100);

/// The partitions that we made known.
#[derive(Debug, Default)]
pub(crate) struct Partitions {
    /// Where they are put on record, if anywhere.
    journal: Option<Arc<Journal>>,
    known: Mutex<Known>,
}

type Known = HashMap<PartitionId, Weak<Added>>;

/// A partition that the kernel knows from us; dropping the last handle makes it forget.
#[derive(Debug)]
pub(crate) struct Added {
    disk: File,
    id: PartitionId,
    note: Option<Note>,
}

/// How often and after which pauses a partition that is busy for a moment is tried again.
const RETRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(5);

impl Added {
    pub(crate) fn id(&self) -> PartitionId {
        self.id
    }
}

impl Drop for Added {
    fn drop(&mut self) {
        let PartitionId { disk, number } = self.id;
        for _ in 0..RETRIES {
            match sys::delete_partition(&self.disk, number) {
                Ok(()) | Err(Errno::NXIO) => {
                    strike(self.note.take());
                    return;
                }
                // Such as by a process that is being started, with copies of all open descriptors.
                Err(Errno::BUSY) => std::thread::sleep(PAUSE),
                Err(errno) => {
                    tracing::warn!(%disk, number, %errno, "cannot remove a partition");
                    return;
                }
            }
        }
        tracing::warn!(%disk, number, "a partition made known is in use and stays");
    }
}

impl Partitions {
    pub(crate) fn new(journal: Option<Arc<Journal>>) -> Self {
        Partitions {
            journal,
            known: Mutex::default(),
        }
    }

    /// Takes over a partition that an earlier process has made known; nothing if it is not there
    /// any more. Blocks.
    pub(crate) fn adopt(&self, note: Note, record: &PartitionRecord) -> Option<Arc<Added>> {
        let id = record.id;
        let disk = device::node(id.disk)
            .and_then(|node| device::open(&node).ok().flatten())
            .filter(|disk| DeviceNumber::of(disk).is_ok_and(|number| number == id.disk))
            .filter(|_| is_still(record));
        let Some(disk) = disk else {
            note.done();
            return None;
        };
        let note = Some(note);
        let added = Arc::new(Added { disk, id, note });
        self.lock().insert(id, Arc::downgrade(&added));
        Some(added)
    }

    /// Finds the node of a partition, and makes it known if the kernel did not find it by itself.
    pub(crate) async fn find(
        self: &Arc<Self>,
        disk: &File,
        wanted: NonZeroU32,
        deadline: Instant,
    ) -> Result<(PathBuf, Option<Arc<Added>>), BackendError> {
        let (id, number) = (DeviceNumber::of(disk)?, wanted.get());
        let partition = PartitionId { disk: id, number };
        let soon = deadline.min(Instant::now() + GRACE);
        let missing = match device::await_partition(disk, wanted, soon).await {
            Ok(node) => return Ok((node, self.known(partition))),
            Err(error) if error.kind() == ErrorKind::NotFound => error,
            Err(error) => return Err(error),
        };
        let this = self.clone();
        let disk = disk
            .try_clone()
            .map_err(|error| errno_error("cannot open the disk once more", error))?;
        let added = blocking(move || this.add(disk, partition)).await?;
        match (added, device::partitions(id)?.remove(&number)) {
            (Some(added), Some(node)) => Ok((node, Some(added))),
            _ => Err(missing),
        }
    }

    /// Makes a partition known by the table on the disk; nothing if it is not in a table.
    fn add(&self, mut disk: File, id: PartitionId) -> Result<Option<Arc<Added>>, BackendError> {
        let Some(Partition { start, size, .. }) = in_table(&mut disk, id.number) else {
            return Ok(None);
        };
        let note = match &self.journal {
            Some(journal) => Some(journal.note(&Record::Partition(PartitionRecord {
                id,
                sequence: sequence(id.disk),
                start,
                size,
            }))?),
            None => None,
        };
        let mut known = self.lock();
        let answer = match known.get(&id).and_then(Weak::upgrade) {
            Some(added) => Ok(Some(added)),
            None => match sys::add_partition(&disk, id.number, start, size) {
                Ok(()) => {
                    let added = Arc::new(Added { disk, id, note });
                    known.retain(|_, added| added.strong_count() > 0);
                    known.insert(id, Arc::downgrade(&added));
                    return Ok(Some(added));
                }
                Err(errno) => Err(errno_error(
                    format!(
                        "cannot make partition {} of block device {} known to the kernel",
                        id.number, id.disk
                    ),
                    errno,
                )),
            },
        };
        drop(known);
        strike(note);
        answer
    }

    fn known(&self, partition: PartitionId) -> Option<Arc<Added>> {
        self.lock().get(&partition).and_then(Weak::upgrade)
    }

    /// Held across one call into the kernel's tables, which does no I/O.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of a disk that no other disk gets, as far as it can be read.
fn sequence(disk: DeviceNumber) -> Option<u64> {
    disk.sequence().ok().flatten()
}

/// Whether the kernel knows the partition that is meant, and not one of a disk that has the number
/// now.
fn is_still(record: &PartitionRecord) -> bool {
    // What sysfs counts in, in bytes, whatever the sectors of the disk are.
    const UNIT: u64 = 512;
    let PartitionId { disk, number } = record.id;
    let node = device::partitions(disk)
        .ok()
        .and_then(|mut found| found.remove(&number));
    let Some(partition) = node.and_then(|node| DeviceNumber::at(&node).ok()) else {
        return false;
    };
    let is = |name: &str, bytes: u64| {
        let found = sysfs::attribute(&partition.sysfs(), name).ok().flatten();
        found == Some(bytes / UNIT)
    };
    sequence(disk) == record.sequence && is("start", record.start) && is("size", record.size)
}

fn in_table(disk: &mut File, number: u32) -> Option<Partition> {
    match probe(disk).ok()?.content {
        Content::PartitionTable(table) => table.partitions.into_iter().find(|p| p.number == number),
        _ => None,
    }
}
