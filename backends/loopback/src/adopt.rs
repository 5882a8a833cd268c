//! Finding the loop device of an earlier process.
//!
//! A device of a process that was killed stays bound only while it is mounted or open: the kernel unbinds it with its
//! last user (`LO_FLAGS_AUTOCLEAR`).

use std::io;

use blockmount::DiskId;
use blockmount_linux::is_absent;

use crate::device::{Device, Status, bound_numbers};

/// What was bound for a disk.
pub(crate) struct Wanted<'a> {
    pub(crate) id: &'a DiskId,
    pub(crate) read_only: bool,
    pub(crate) mark: &'a [u8],
}

impl Wanted<'_> {
    /// Opens a device if it is bound so.
    fn open(&self, number: u32) -> io::Result<Option<(Device, Status)>> {
        let device = match Device::open(number) {
            Err(error) if is_absent(&error) => return Ok(None),
            opened => opened?,
        };
        let status = device.status()?.filter(|status| self.is(status));
        Ok(status.map(|status| (device, status)))
    }

    fn is(&self, status: &Status) -> bool {
        let id = match status.device_number {
            0 => DiskId::inode(status.binding.inode.device, status.binding.inode.inode),
            device => blockmount_source::device_id(device),
        };
        id == *self.id
            && status.binding.mark == self.mark
            && status.read_only == self.read_only
            && status.unbinds_itself
    }
}

/// The device that was bound for a disk: the one with this number, or any that `is_free`. Blocks.
pub(crate) fn find(
    wanted: &Wanted<'_>,
    number: Option<u32>,
    is_free: impl Fn(u32) -> bool,
) -> io::Result<Option<(Device, Status)>> {
    let numbers = number.map_or_else(bound_numbers, |number| Ok(vec![number]))?;
    for number in numbers.into_iter().filter(|number| is_free(*number)) {
        if let Some(found) = wanted.open(number)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
