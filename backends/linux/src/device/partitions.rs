//! The partitions of disks, as the kernel knows them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Instant;

use blockmount::BackendError;

use crate::device::node::node_named_in;
use crate::device::number::DeviceNumber;
use crate::discover::uevent;
use crate::errno::{blocking, errno_error};
use crate::filesystem::probe::{Content, probe};

/// The partitions that the kernel has found on a disk: their numbers and their nodes. Blocks.
///
/// Which partition is which is what sysfs says, not what the nodes are called.
///
/// # Errors
///
/// `NotFound` if the disk is gone; others as they come.
pub fn partitions(disk: DeviceNumber) -> Result<BTreeMap<u32, PathBuf>, BackendError> {
    let directory = disk.sysfs();
    let trouble = |error| {
        errno_error(
            format!("cannot list the partitions in {}", directory.display()),
            error,
        )
    };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&directory).map_err(trouble)? {
        let below = entry.map_err(trouble)?.path();
        // Only partitions have this attribute. One that vanishes while it is looked at is gone.
        let Ok(number) = fs::read_to_string(below.join("partition")) else {
            continue;
        };
        let Ok(number) = number.trim().parse() else {
            continue;
        };
        let Ok(uevent) = fs::read(below.join("uevent")) else {
            continue;
        };
        if let Some(node) = node_named_in(&uevent) {
            found.insert(number, node);
        }
    }
    Ok(found)
}

/// Waits until the kernel knows a partition of an open disk, and names its node.
///
/// The kernel lists a partition a moment before it makes the node: open it with [`await_open`](crate::device::await_open).
///
/// The kernel knows the partitions of a disk when it announces the disk, so the wait is short where
/// there is anything to wait for; and where the partition table itself can be read and has no such
/// partition, there is no wait.
///
/// # Errors
///
/// `NotFound`, naming the partitions that exist.
pub async fn await_partition(
    disk: &File,
    number: NonZeroU32,
    deadline: Instant,
) -> Result<PathBuf, BackendError> {
    let id = DeviceNumber::of(disk)?;
    let mut reader = disk
        .try_clone()
        .map_err(|error| errno_error("cannot open the disk once more", error))?;
    let look = move || {
        let mut known = partitions(id)?;
        if let Some(node) = known.remove(&number.get()) {
            return Ok(Some(Ok(node)));
        }
        let listed = table_of(&mut reader);
        Ok(listed
            .filter(|listed| !listed.contains(&number.get()))
            .map(Err))
    };
    let absent = |known: Vec<u32>| {
        let known: Vec<String> = known.iter().map(u32::to_string).collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        BackendError::not_found(format!(
            "there is no partition {number} on block device {id}; partitions that exist: {known}"
        ))
    };
    match uevent::wait_until(deadline, look).await? {
        Some(Ok(node)) => Ok(node),
        Some(Err(listed)) => Err(absent(listed)),
        None => {
            let known = blocking(move || partitions(id)).await?;
            Err(absent(known.into_keys().collect()))
        }
    }
}

/// The partitions that the table on a disk lists; `None` if the disk's content does not say.
fn table_of(disk: &mut File) -> Option<Vec<u32>> {
    match probe(disk).ok()?.content {
        Content::PartitionTable(table) => Some(table.partitions.iter().map(|p| p.number).collect()),
        Content::Unknown => None,
        _ => Some(Vec::new()),
    }
}
