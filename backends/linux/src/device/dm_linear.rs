//! Byte ranges of devices as devices of their own: each is made once, for all who mount it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use blockmount::BackendError;

use crate::device::mapper::{Access, Names, SECTOR, Target};
use crate::device::node::Measured;
use crate::device::number::DeviceNumber;
use crate::device::partition::sequence;
use crate::device::{mapped, node};
use crate::undo::ledger::UndoList;
use crate::undo::step::{RangeStep, Undo};

impl RangeStep {
    /// Long enough to tell all ranges apart, and short enough for the kernel: at most 85 bytes.
    fn suffix(&self) -> String {
        let DeviceNumber { major, minor } = self.backing;
        let size = self.end - self.start;
        format!("range-{major}.{minor}-{}-{size}", self.start)
    }

    pub(crate) fn names(&self) -> Names {
        Names::new(&self.suffix(), self.mark.as_deref())
    }
}

/// Makes a device of a byte range, or takes the one that there is for it, and names its node. Blocks.
///
/// # Errors
///
/// `Invalid` if the device has no such range, `Conflict` if somebody else has made a device of that name; `Busy`
/// and others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    path: &Path,
    range: Range<u64>,
) -> Result<PathBuf, BackendError> {
    let mut range = validate(path, &node::measure(path)?, range)?;
    range.mark = list.device_mark();
    let table = Target::linear(range.backing, range.start..range.end)?;
    let step = Undo::RemoveRange(range.clone());
    mapped::open(list, &range.names(), step, |mapper, names| {
        mapper.create_mapped(names, &table, Access::ReadOnly)
    })
}

/// Removes the device of a range. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(range: &RangeStep) -> Result<(), BackendError> {
    mapped::remove(&range.names())
}

/// The node of the device of a range. Blocks.
pub(crate) fn node(range: &RangeStep) -> Option<PathBuf> {
    mapped::node(&range.names())
}

/// Whether a device has such a range, which may come from anybody.
fn validate(path: &Path, device: &Measured, range: Range<u64>) -> Result<RangeStep, BackendError> {
    let node = path.display();
    let Measured { size, number, .. } = *device;
    let block = u64::from(device.block_size).max(SECTOR);
    let Range { start, end } = range;
    let refused = |why: String| {
        let message = format!("bytes {start} to {end} are no range of device {node}: {why}");
        Err(BackendError::invalid(message))
    };
    if start >= end {
        return refused("there are none".to_owned());
    }
    if end > size {
        return refused(format!("it has {size} bytes"));
    }
    if !start.is_multiple_of(block) || !end.is_multiple_of(block) {
        return refused(format!("they are not whole blocks of {block} bytes"));
    }
    Ok(RangeStep {
        backing: number,
        sequence: sequence(number),
        start,
        end,
        mark: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g14_the_longest_name_of_a_range_fits_and_tells_it() {
        let range = |major, minor, start, end| RangeStep {
            backing: DeviceNumber { major, minor },
            sequence: None,
            start,
            end,
            mark: Some("m".repeat(40)),
        };
        let Names { name, uuid } = range(u32::MAX, u32::MAX, 0, u64::MAX).names();
        assert!(name.len().max(uuid.len()) <= 127, "{uuid}");
        assert_eq!(
            range(259, 1, 4096, 12_288).names().name,
            "blockmount-range-259.1-4096-8192"
        );
    }
}
