//! XFS. Layout: "XFS Algorithms & Data Structures", section "Superblocks".

use std::io::{self, Read, Seek};

use crc::{CRC_32_ISCSI, Crc};

use super::source::{Bytes, Source};
use super::{Superblock, text, uuid};

/// The superblock fills one sector.
const SECTORS: std::ops::RangeInclusive<u16> = 512..=32768;
const BLOCKS: std::ops::RangeInclusive<u32> = 512..=65536;
/// Offset and length of the checksum, which version 5 has.
const CHECKSUM: usize = 224;

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let Some(start) = source.bytes(0, 512)?.filter(|start| start.has(0, b"XFSB")) else {
        return Ok(None);
    };
    let sector = start.be16(102);
    if !SECTORS.contains(&sector) || !sector.is_power_of_two() {
        return Ok(None);
    }
    Ok(source
        .bytes(0, usize::from(sector))?
        .and_then(|sector| read(&sector)))
}

fn read(sector: &Bytes) -> Option<Superblock> {
    let (block_size, blocks) = (sector.be32(4), sector.be64(8));
    let version = sector.be16(100) & 0xf;
    let consistent = BLOCKS.contains(&block_size)
        && block_size.is_power_of_two()
        && matches!(version, 4 | 5)
        && blocks != 0
        && u32::from(sector.0[120]) == block_size.ilog2()
        && sector.be32(88) != 0;
    if !consistent || (version == 5 && !checksum_fits(sector)) {
        return None;
    }
    Some(Superblock {
        name: "xfs",
        label: text(&sector.array::<12>(108)),
        uuid: uuid(sector.array(32)),
        size_bytes: Some(blocks.saturating_mul(u64::from(block_size))),
        block_size: Some(block_size),
    })
}

fn checksum_fits(sector: &Bytes) -> bool {
    let crc = Crc::<u32>::new(&CRC_32_ISCSI);
    let mut digest = crc.digest();
    digest.update(&sector.0[..CHECKSUM]);
    digest.update(&[0; 4]);
    digest.update(&sector.0[CHECKSUM + 4..]);
    // Little-endian, unlike everything else in it.
    digest.finalize() == sector.le32(CHECKSUM)
}
