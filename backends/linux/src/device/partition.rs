//! Partitions that the kernel does not find by itself: kernels for small guests are built without
//! the code that reads partition tables.

use std::fs::File;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{BackendError, ErrorKind};
use rustix::io::Errno;

use crate::device::node;
use crate::device::number::DeviceNumber;
use crate::device::partitions::{await_partition, partitions};
use crate::discover::sysfs;
use crate::errno::{blocking, errno_error};
use crate::filesystem::probe::{Content, Partition, probe};
use crate::mount::target::Target;
use crate::sys;
use crate::undo::ledger::{Ledger, UndoList};
use crate::undo::locks::Key;
use crate::undo::step::{PartitionStep, Undo};

/// How long the kernel gets to announce a partition that is in the table. It knows them when it
/// announces the disk, so this is for the case that the disk's announcement is under way.
const GRACE: Duration = Duration::from_millis(100);

/// Finds the node of a partition, and makes it known if the kernel did not find it by itself.
///
/// # Errors
///
/// `NotFound`, naming the partitions that exist; others as they come.
pub(crate) async fn open(
    ledger: &Arc<Ledger>,
    target: &Target,
    disk: &File,
    number: NonZeroU32,
    deadline: Instant,
) -> Result<PathBuf, BackendError> {
    let soon = deadline.min(Instant::now() + GRACE);
    let missing = match await_partition(disk, number, soon).await {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        awaited => awaited.err(),
    };
    let disk = disk
        .try_clone()
        .map_err(|error| errno_error("cannot open the disk once more", error))?;
    let (ledger, target) = (ledger.clone(), target.clone());
    let found = blocking(move || find(&ledger.list(&target), disk, number.get())).await?;
    found.ok_or_else(|| {
        let vanished = || BackendError::not_found(format!("partition {number} has vanished"));
        missing.unwrap_or_else(vanished)
    })
}

/// Nothing if the partition is neither known to the kernel nor in the table.
fn find(list: &UndoList<'_>, mut disk: File, number: u32) -> Result<Option<PathBuf>, BackendError> {
    let id = DeviceNumber::of(&disk)?;
    let _held = list.hold(Key::Partition(id, number))?;
    let find = || Ok(partitions(id)?.remove(&number));
    if let Some(node) = find()? {
        list.join(|step| {
            matches!(step, Undo::DeletePartition(known) if known.disk == id && known.number == number)
        });
        return Ok(Some(node));
    }
    let Some(Partition { start, size, .. }) = in_table(&mut disk, number) else {
        return Ok(None);
    };
    list.add(Undo::DeletePartition(PartitionStep {
        disk: id,
        number,
        sequence: sequence(id),
        start,
        size,
    }))?;
    sys::add_partition(&disk, number, start, size).map_err(|errno| {
        let what = format!("cannot make partition {number} of block device {id} known");
        errno_error(what, errno)
    })?;
    find()
}

/// Makes the kernel forget a partition. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(step: &PartitionStep) -> Result<(), BackendError> {
    let PartitionStep { disk, number, .. } = *step;
    let open = match node::of(disk) {
        Some(node) => node::open(&node)?,
        None => None,
    };
    let is_disk = |open: &File| DeviceNumber::of(open).is_ok_and(|number| number == disk);
    let Some(open) = open.filter(is_disk).filter(|_| node(step).is_some()) else {
        return Ok(());
    };
    match sys::delete_partition(&open, number) {
        Ok(()) | Err(Errno::NXIO) => Ok(()),
        Err(errno) => {
            let what = format!("cannot remove partition {number} of block device {disk}");
            Err(errno_error(what, errno))
        }
    }
}

/// The node of the partition that is meant; nothing if the kernel does not know it, or if a disk that has the number
/// now has another one.
pub(crate) fn node(step: &PartitionStep) -> Option<PathBuf> {
    // What sysfs counts in, in bytes, whatever the sectors of the disk are.
    const UNIT: u64 = 512;
    let node = partitions(step.disk).ok()?.remove(&step.number)?;
    let directory = DeviceNumber::at(&node).ok()?.sysfs();
    let is = |name: &str, bytes: u64| {
        let found = sysfs::attribute(&directory, name).ok().flatten();
        found == Some(bytes / UNIT)
    };
    let is_same = sequence(step.disk) == step.sequence;
    (is_same && is("start", step.start) && is("size", step.size)).then_some(node)
}

/// The number of a disk that no other disk gets, as far as it can be read.
pub(crate) fn sequence(disk: DeviceNumber) -> Option<u64> {
    sysfs::attribute(&disk.sysfs(), "diskseq").ok().flatten()
}

fn in_table(disk: &mut File, number: u32) -> Option<Partition> {
    match probe(disk).ok()?.content {
        Content::PartitionTable(table) => table.partitions.into_iter().find(|p| p.number == number),
        _ => None,
    }
}
