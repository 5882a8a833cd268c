//! Whether the log of an XFS was replayed. Layout: "XFS Algorithms & Data Structures", section "Journaling Log"; what
//! counts as clean is what `xlog_check_unmount_rec` of Linux takes for it.
//!
//! The log is a ring of basic blocks. Each begins with the number of the round in which it was written, or is the header of
//! a record. Where the number falls is the head of the log; it is clean if the last record before the head says that
//! the filesystem was unmounted. Whatever else is found is not clean.

use std::io::{self, Read, Seek};

use super::super::source::{Bytes, Source};

/// The size of a basic block, in bytes.
const BLOCK: u64 = 512;
const HEADER_MAGIC: u32 = 0xfeed_babe;
/// How many bytes of data one basic block of a header describes.
const DATA_PER_HEADER_BLOCK: u32 = 32 << 10;
/// The longest record has 256 KiB of data (`XLOG_MAX_RECORD_BSIZE`) and eight blocks of header.
const LONGEST_RECORD: u64 = (256 << 10) / BLOCK + 8;
/// The flag of an operation that ends the log of an unmounted filesystem.
const UNMOUNT: u8 = 0x20;

/// The log of a filesystem, on the filesystem's own device.
#[derive(Debug)]
pub(super) struct Log {
    /// In bytes from the start of the device.
    start: u64,
    /// In basic blocks.
    length: u64,
}

impl Log {
    /// Nothing if the log is on another device, or nowhere.
    pub(super) fn of(superblock: &Bytes) -> Option<Self> {
        let block_size = u64::from(superblock.be32(4));
        let start = superblock.be64(48);
        let group_bits = u32::from(superblock.0[124]);
        if start == 0 || group_bits > 31 {
            return None;
        }
        let (group, in_group) = (start >> group_bits, start & !(u64::MAX << group_bits));
        let block = group
            .checked_mul(u64::from(superblock.be32(84)))?
            .checked_add(in_group)?;
        let length = u64::from(superblock.be32(96)).checked_mul(block_size)?;
        Some(Log {
            start: block.checked_mul(block_size)?,
            length: length.checked_div(BLOCK)?,
        })
    }

    pub(super) fn is_clean<R: Read + Seek>(&self, source: &mut Source<'_, R>) -> io::Result<bool> {
        let Some(last) = self.length.checked_sub(1) else {
            return Ok(false);
        };
        let (Some(first), Some(last)) = (self.round(source, 0)?, self.round(source, last)?) else {
            return Ok(false);
        };
        // Nothing was ever written to it.
        if first == 0 {
            return Ok(true);
        }
        if first != last && first.checked_sub(1) != Some(last) {
            return Ok(false);
        }
        match self.head(source, first)? {
            Some(head) => self.ends_with_unmount(source, head),
            None => Ok(false),
        }
    }

    fn blocks<R: Read + Seek>(
        &self,
        source: &mut Source<'_, R>,
        at: u64,
        count: u64,
    ) -> io::Result<Option<Bytes>> {
        let place = at
            .checked_mul(BLOCK)
            .and_then(|at| at.checked_add(self.start));
        let length = count
            .checked_mul(BLOCK)
            .and_then(|n| usize::try_from(n).ok());
        match (place, length) {
            (Some(place), Some(length)) => source.bytes(place, length),
            _ => Ok(None),
        }
    }

    /// The round in which a block was written.
    fn round<R: Read + Seek>(
        &self,
        source: &mut Source<'_, R>,
        at: u64,
    ) -> io::Result<Option<u32>> {
        let block = self.blocks(source, at, 1)?;
        Ok(block.map(|block| match block.be32(0) {
            HEADER_MAGIC => block.be32(4),
            round => round,
        }))
    }

    /// The first block that was not written in the round of block 0: the blocks before it are of that round.
    fn head<R: Read + Seek>(
        &self,
        source: &mut Source<'_, R>,
        first: u32,
    ) -> io::Result<Option<u64>> {
        let (mut low, mut high) = (0, self.length);
        while low < high {
            let middle = low.midpoint(high);
            let Some(round) = self.round(source, middle)? else {
                return Ok(None);
            };
            match round == first {
                true => low = middle.saturating_add(1),
                false => high = middle,
            }
        }
        Ok(Some(low))
    }

    fn ends_with_unmount<R: Read + Seek>(
        &self,
        source: &mut Source<'_, R>,
        head: u64,
    ) -> io::Result<bool> {
        let count = LONGEST_RECORD.min(self.length);
        // A record may go on at the start of the ring.
        let (before, after) = match head.checked_sub(count) {
            Some(from) => ((from, count), (0, 0)),
            None => {
                let wrapped = count.saturating_sub(head);
                ((self.length.saturating_sub(wrapped), wrapped), (0, head))
            }
        };
        let mut blocks: Vec<Bytes> = Vec::new();
        for (from, count) in [before, after] {
            let Some(piece) = self.blocks(source, from, count)? else {
                return Ok(false);
            };
            let piece = piece.0.chunks(BLOCK as usize);
            blocks.extend(piece.map(|block| Bytes(block.to_vec())));
        }
        let Some(at) = blocks
            .iter()
            .rposition(|block| block.be32(0) == HEADER_MAGIC)
        else {
            return Ok(false);
        };
        Ok(is_unmount(&blocks[at..]))
    }
}

/// Whether a record, which begins with its header, fills these blocks with the one operation that unmounts.
fn is_unmount(record: &[Bytes]) -> bool {
    let header = &record[0];
    let (version, length, operations) = (header.be32(8), header.be32(12), header.be32(40));
    let headers = match header.be32(320) {
        size if version & 2 != 0 && size > DATA_PER_HEADER_BLOCK => {
            size.div_ceil(DATA_PER_HEADER_BLOCK)
        }
        _ => 1,
    };
    let data = u64::from(length).div_ceil(BLOCK);
    let fills = u64::from(headers).checked_add(data) == Some(record.len() as u64);
    let flags = record
        .get(headers as usize)
        .and_then(|data| data.0.get(9).copied());
    fills && operations == 1 && flags.is_some_and(|flags| flags & UNMOUNT != 0)
}
