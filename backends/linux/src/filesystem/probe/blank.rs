//! Proves that a device is blank.

use std::io::{self, Read, Seek};

use super::source::Source;

/// Everything known keeps its first signature in the first megabyte (the furthest: ZFS and UFS, at
/// 256 KiB), or its only one in the last (RAID, GPT's backup, ZFS).
const EDGE: u64 = 1 << 20;
/// Where copies of superblocks are that outlive an erased first one, in bytes: btrfs, and ext with
/// blocks of 1, 2 and 4 KiB.
const COPIES: [u64; 5] = [64 << 20, 256 << 30, 8193 << 10, 16384 << 11, 32768 << 12];
const COPY_LENGTH: u64 = 4096;

/// Whether there are only zeros wherever a known format has a signature. An empty device is not blank.
pub(super) fn is_blank<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<bool> {
    let size = source.size();
    if size == 0 || !is_zero(source, 0, EDGE)? || !is_zero(source, size.saturating_sub(EDGE), EDGE)?
    {
        return Ok(false);
    }
    for copy in COPIES {
        if !is_zero(source, copy, COPY_LENGTH)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the part of the range that is on the device has only zeros.
fn is_zero<R: Read + Seek>(
    source: &mut Source<'_, R>,
    start: u64,
    length: u64,
) -> io::Result<bool> {
    const PIECE: usize = 64 << 10;
    let end = source.size().min(start.saturating_add(length));
    for at in (start..end).step_by(PIECE) {
        let piece = PIECE.min(end.saturating_sub(at) as usize);
        match source.bytes(at, piece)? {
            Some(bytes) if bytes.0.iter().all(|byte| *byte == 0) => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
