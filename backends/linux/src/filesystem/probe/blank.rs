//! Proves that a device is blank.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::source::Source;

/// Everything known keeps its first signature in the first megabyte (the furthest: ZFS and UFS, at
/// 256 KiB), or its only one in the last (RAID, GPT's backup, ZFS).
const EDGE: u64 = 1 << 20;
/// Where copies of superblocks are that outlive an erased first one, in bytes: btrfs, and ext with
/// blocks of 1, 2 and 4 KiB.
const COPIES: [u64; 5] = [64 << 20, 256 << 30, 8193 << 10, 16384 << 11, 32768 << 12];
const COPY_LENGTH: u64 = 4096;

/// Where a device must have only zeros to be blank, within its size in bytes.
fn places(size: u64) -> impl Iterator<Item = Range<u64>> {
    let copies = COPIES.map(|copy| (copy, COPY_LENGTH));
    let edges = [(0, EDGE), (size.saturating_sub(EDGE), EDGE)];
    let places = edges.into_iter().chain(copies);
    places.map(move |(start, length)| start..size.min(start.saturating_add(length)))
}

/// Writes zeros wherever a device must have them to be blank, in whole blocks of so many bytes. Blocks.
pub(crate) fn make_blank(device: &File, size: u64, block: u64) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    let zeros = [0; PIECE];
    for place in places(size) {
        let before = place.start.checked_rem(block).unwrap_or_default();
        let start = place.start.saturating_sub(before);
        let end = place.end.checked_next_multiple_of(block);
        let end = size.min(end.unwrap_or(size));
        for at in (start..end).step_by(PIECE) {
            let length = PIECE.min(end.saturating_sub(at) as usize);
            device.write_all_at(&zeros[..length], at)?;
        }
    }
    device.sync_all()
}

/// Whether there are only zeros wherever a known format has a signature. An empty device is not blank.
pub(super) fn is_blank<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<bool> {
    if source.size() == 0 {
        return Ok(false);
    }
    for place in places(source.size()) {
        if !is_zero(source, place)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a range has only zeros.
fn is_zero<R: Read + Seek>(source: &mut Source<'_, R>, range: Range<u64>) -> io::Result<bool> {
    const PIECE: usize = 64 << 10;
    for at in range.clone().step_by(PIECE) {
        let piece = PIECE.min(range.end.saturating_sub(at) as usize);
        match source.bytes(at, piece)? {
            Some(bytes) if bytes.0.iter().all(|byte| *byte == 0) => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
