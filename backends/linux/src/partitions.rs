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
use crate::fault::{blocking, fault};
use crate::probe::{Content, Partition, probe};
use crate::sys;

/// How long the kernel gets to announce a partition that is in the table. It knows them when it
/// announces the disk, so this is for the case that the disk's announcement is under way.
const GRACE: Duration = Duration::from_millis(100);

/// The partitions that we made known.
#[derive(Debug, Default)]
pub(crate) struct Partitions(Mutex<HashMap<(DeviceNumber, u32), Weak<Added>>>);

/// A partition that the kernel knows from us; dropping the last handle makes it forget.
#[derive(Debug)]
pub(crate) struct Added {
    disk: File,
    number: u32,
}

/// How often and after which pauses a partition that is busy for a moment is tried again.
const RETRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(5);

impl Drop for Added {
    fn drop(&mut self) {
        for _ in 0..RETRIES {
            match sys::delete_partition(&self.disk, self.number) {
                Ok(()) | Err(Errno::NXIO) => return,
                // Such as by a process that is being started, with copies of all open descriptors.
                Err(Errno::BUSY) => std::thread::sleep(PAUSE),
                Err(errno) => {
                    tracing::warn!(number = self.number, %errno, "cannot remove a partition");
                    return;
                }
            }
        }
        tracing::warn!(
            number = self.number,
            "a partition made known is in use and stays"
        );
    }
}

impl Partitions {
    /// Finds the node of a partition, and makes it known if the kernel did not find it by itself.
    pub(crate) async fn find(
        self: &Arc<Self>,
        disk: &File,
        number: NonZeroU32,
        deadline: Instant,
    ) -> Result<(PathBuf, Option<Arc<Added>>), BackendError> {
        let id = DeviceNumber::of(disk)?;
        let soon = deadline.min(Instant::now() + GRACE);
        let missing = match device::await_partition(disk, number, soon).await {
            Ok(node) => return Ok((node, self.known((id, number.get())))),
            Err(error) if error.kind() == ErrorKind::NotFound => error,
            Err(error) => return Err(error),
        };
        let this = self.clone();
        let disk = disk
            .try_clone()
            .map_err(|error| fault("cannot open the disk once more", error))?;
        let added = blocking(move || this.add(disk, id, number.get())).await?;
        match (added, device::partitions(id)?.remove(&number.get())) {
            (Some(added), Some(node)) => Ok((node, Some(added))),
            _ => Err(missing),
        }
    }

    /// Makes a partition known by the table on the disk; nothing if it is not in a table.
    fn add(
        &self,
        mut disk: File,
        id: DeviceNumber,
        number: u32,
    ) -> Result<Option<Arc<Added>>, BackendError> {
        let Some(Partition { start, size, .. }) = in_table(&mut disk, number) else {
            return Ok(None);
        };
        let mut known = self.lock();
        if let Some(added) = known.get(&(id, number)).and_then(Weak::upgrade) {
            return Ok(Some(added));
        }
        sys::add_partition(&disk, number, start, size).map_err(|errno| {
            let disk = format!("block device {}:{}", id.major, id.minor);
            fault(
                format!("cannot make partition {number} of {disk} known to the kernel"),
                errno,
            )
        })?;
        let added = Arc::new(Added { disk, number });
        known.retain(|_, added| added.strong_count() > 0);
        known.insert((id, number), Arc::downgrade(&added));
        Ok(Some(added))
    }

    fn known(&self, partition: (DeviceNumber, u32)) -> Option<Arc<Added>> {
        self.lock().get(&partition).and_then(Weak::upgrade)
    }

    /// Held across one call into the kernel's tables, which does no I/O.
    fn lock(&self) -> MutexGuard<'_, HashMap<(DeviceNumber, u32), Weak<Added>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_table(disk: &mut File, number: u32) -> Option<Partition> {
    match probe(disk).ok()?.content {
        Content::PartitionTable(table) => table.partitions.into_iter().find(|p| p.number == number),
        _ => None,
    }
}
