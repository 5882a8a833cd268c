//! Partitions of a byte range of a device, which the kernel does not look for.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::Path;

use blockmount::BackendError;

use crate::errno::errno_error;
use crate::filesystem::probe::{Content, probe};

/// The bytes of a partition on a device, where the partition table is in a range of the device. Blocks.
///
/// # Errors
///
/// `NotFound` if there is no table, or no such partition in it; `Invalid` if the partition is not inside the range.
pub(crate) fn partition(
    path: &Path,
    open: &File,
    range: Range<u64>,
    number: NonZeroU32,
) -> Result<Range<u64>, BackendError> {
    let node = path.display();
    let Range { start, end } = range;
    let found = probe(&mut Subrange::new(open, range)).map_err(|error| {
        errno_error(
            format!("cannot read bytes {start} to {end} of {node}"),
            error,
        )
    })?;
    let Content::PartitionTable(table) = found.content else {
        let message = format!("there is no partition table in bytes {start} to {end} of {node}");
        return Err(BackendError::not_found(message));
    };
    let known: Vec<String> = table
        .partitions
        .iter()
        .map(|partition| partition.number.to_string())
        .collect();
    let mut partitions = table.partitions.iter();
    let partition = partitions
        .find(|partition| partition.number == number.get())
        .ok_or_else(|| {
            BackendError::not_found(format!(
                "there is no partition {number} in bytes {start} to {end} of {node}; \
                 partitions that exist: {}",
                known.join(", ")
            ))
        })?;
    let first = start.checked_add(partition.start);
    let last = first.and_then(|first| first.checked_add(partition.size));
    match (first, last) {
        (Some(first), Some(last)) if last <= end => Ok(first..last),
        _ => Err(BackendError::invalid(format!(
            "partition {number} is not inside of bytes {start} to {end} of {node}"
        ))),
    }
}

/// A range of a device, read as if it were one.
pub(super) struct Subrange<'a> {
    open: &'a File,
    range: Range<u64>,
    /// Where it reads next, from the start of the device.
    at: u64,
}

impl<'a> Subrange<'a> {
    pub(super) fn new(open: &'a File, range: Range<u64>) -> Self {
        let at = range.start;
        Subrange { open, range, at }
    }
}

impl Read for Subrange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        self.open.seek(SeekFrom::Start(self.at))?;
        let read = self.open.read(&mut buffer[..length])?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Subrange<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let Range { start, end } = self.range;
        let to = match to {
            SeekFrom::Start(offset) => start.checked_add(offset),
            SeekFrom::End(offset) => end.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.at.checked_add_signed(offset),
        };
        let to = to.filter(|to| *to >= start);
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at - start)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A table with one partition, from block 8 and of 16 blocks.
    fn table() -> [u8; 512] {
        let mut table = [0; 512];
        table[446 + 4] = 0x83;
        table[446 + 8..446 + 12].copy_from_slice(&8_u32.to_le_bytes());
        table[446 + 12..446 + 16].copy_from_slice(&16_u32.to_le_bytes());
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        table
    }

    fn find(range: Range<u64>, number: u32) -> Result<Range<u64>, BackendError> {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.seek(SeekFrom::Start(4096)).unwrap();
        file.write_all(&table()).unwrap();
        partition(Path::new("x"), &file, range, number.try_into().unwrap())
    }

    #[test]
    fn a_partition_is_a_range_in_the_range() {
        let (start, end) = (4096 + 8 * 512, 4096 + 24 * 512);
        assert_eq!(find(4096..1 << 19, 1).unwrap(), start..end);
        assert_eq!(find(4096..end, 1).unwrap(), start..end);
    }

    #[test]
    fn what_is_not_there_or_not_inside_is_an_error() {
        let error = find(4096..1 << 19, 2).unwrap_err();
        assert!(
            error.message().ends_with("partitions that exist: 1"),
            "{error}"
        );
        assert!(
            find(0..1 << 19, 1)
                .unwrap_err()
                .message()
                .contains("no partition table")
        );
        // The table is in the range, and its partition goes beyond.
        assert!(find(4096..4096 + 23 * 512, 1).is_err());
    }

    #[test]
    fn reading_and_seeking_stay_inside() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let mut subrange = Subrange {
            open: &file,
            range: 10..30,
            at: 10,
        };
        assert_eq!(subrange.seek(SeekFrom::End(0)).unwrap(), 20);
        assert_eq!(subrange.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(subrange.seek(SeekFrom::Start(15)).unwrap(), 15);
        assert_eq!(subrange.read(&mut [0; 8]).unwrap(), 5);
        assert!(subrange.seek(SeekFrom::End(-21)).is_err());
        assert!(subrange.seek(SeekFrom::Start(u64::MAX)).is_err());
    }
}
