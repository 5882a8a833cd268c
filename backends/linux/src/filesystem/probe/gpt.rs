//! GUID partition tables. Layout: UEFI specification, chapter 5. A table with a wrong checksum does not count.

use std::io::{self, Read, Seek};

use crc::{CRC_32_ISO_HDLC, Crc};

use super::source::{Bytes, Source};
use super::{Partition, PartitionTable, TableKind, text};

/// Usual tables have 128 entries of 128 bytes.
const MOST_ENTRIES: u32 = 1024;
const ENTRY_SIZES: [u32; 4] = [128, 256, 512, 1024];

pub(super) fn probe<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<PartitionTable>> {
    // The size of a block is the device's, which an image in a file does not tell.
    for block in [512, 4096] {
        if let Some(partitions) = table(source, block)? {
            return Ok(Some(PartitionTable {
                kind: TableKind::Gpt,
                partitions,
            }));
        }
    }
    Ok(None)
}

fn crc(bytes: &[u8]) -> u32 {
    static CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);
    CRC.checksum(bytes)
}

/// The partitions by the header in block 1. The backup at the end is for repair tools; the kernel does not use it
/// without `gpt` on its command line.
fn table<R: Read + Seek>(
    source: &mut Source<'_, R>,
    block: u64,
) -> io::Result<Option<Vec<Partition>>> {
    let Some(header) = source
        .bytes(block, block as usize)?
        .filter(|header| header_fits(header, block))
    else {
        return Ok(None);
    };
    let (start, count, size) = (header.le64(72), header.le32(80), header.le32(84));
    if count > MOST_ENTRIES || !ENTRY_SIZES.contains(&size) || start < 2 {
        return Ok(None);
    }
    let length = count.saturating_mul(size) as usize;
    let Some(entries) = start
        .checked_mul(block)
        .map(|at| source.bytes(at, length))
        .transpose()?
        .flatten()
    else {
        return Ok(None);
    };
    if crc(&entries.0) != header.le32(88) {
        return Ok(None);
    }
    let usable = header.le64(40)..=header.le64(48);
    let entries = entries.0.chunks_exact(size as usize).zip(1..);
    let partition =
        |(entry, number): (&[u8], u32)| partition(&Bytes(entry.to_vec()), number, block, &usable);
    Ok(Some(entries.filter_map(partition).collect()))
}

fn header_fits(header: &Bytes, block: u64) -> bool {
    let length = header.le32(12);
    if !header.has(0, b"EFI PART") || !(92..=block as u32).contains(&length) || header.le64(24) != 1
    {
        return false;
    }
    let mut covered = header.0[..length as usize].to_vec();
    covered[16..20].fill(0);
    crc(&covered) == header.le32(16)
}

fn partition(
    entry: &Bytes,
    number: u32,
    block: u64,
    usable: &std::ops::RangeInclusive<u64>,
) -> Option<Partition> {
    let type_id: [u8; 16] = entry.array(0);
    let (first, last) = (entry.le64(32), entry.le64(40));
    if type_id == [0; 16] || first > last || !usable.contains(&first) || !usable.contains(&last) {
        return None;
    }
    let (start, end) = (
        first.checked_mul(block)?,
        last.checked_add(1)?.checked_mul(block)?,
    );
    Some(Partition {
        number,
        start,
        size: end.checked_sub(start)?,
        type_id: guid(type_id),
        name: name(entry),
    })
}

/// Thirty-six units of UTF-16.
fn name(entry: &Bytes) -> Option<String> {
    let units: Vec<u16> = (56..128).step_by(2).map(|at| entry.le16(at)).collect();
    text(String::from_utf16_lossy(&units).as_bytes())
}

/// A GUID prints its first three fields as little-endian numbers.
fn guid(bytes: [u8; 16]) -> String {
    let mut ordered = bytes;
    ordered[..4].reverse();
    ordered[4..6].reverse();
    ordered[6..8].reverse();
    super::uuid(ordered).unwrap_or_default()
}
