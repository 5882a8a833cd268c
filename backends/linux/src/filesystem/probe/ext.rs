//! ext2, ext3 and ext4. Layout: `Documentation/filesystems/ext4/super.rst` of Linux.

use std::io::{self, Read, Seek};

use crc::{CRC_32_ISCSI, Crc};

use super::source::{Bytes, Source};
use super::{Superblock, text, uuid};

const OFFSET: u64 = 1024;
const LENGTH: usize = 1024;
const MAGIC: u16 = 0xef53;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
/// The device of a journal that belongs to another filesystem.
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
/// What ext2 and ext3 have: file types, recovery, meta block groups; sparse superblocks, large
/// files, trees in directories.
const INCOMPAT_OF_EXT3: u32 = 0x2 | 0x4 | 0x10;
const RO_COMPAT_OF_EXT3: u32 = 0x1 | 0x2 | 0x4;

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    Ok(source.bytes(OFFSET, LENGTH)?.and_then(|block| read(&block)))
}

fn read(block: &Bytes) -> Option<Superblock> {
    if block.le16(0x38) != MAGIC {
        return None;
    }
    let log_block_size = block.le32(0x18);
    let (per_group, inodes, revision) = (block.le32(0x20), block.le32(0x28), block.le32(0x4c));
    // The largest block is 64 KiB.
    if log_block_size > 6 || per_group == 0 || inodes == 0 || revision > 1 {
        return None;
    }
    let (compat, incompat, ro_compat) = match revision {
        0 => (0, 0, 0),
        _ => (block.le32(0x5c), block.le32(0x60), block.le32(0x64)),
    };
    if ro_compat & RO_COMPAT_METADATA_CSUM != 0 && !checksum_fits(block) {
        return None;
    }
    let high = if incompat & INCOMPAT_64BIT != 0 {
        block.le32(0x150)
    } else {
        0
    };
    let blocks = u64::from(high) << 32 | u64::from(block.le32(0x04));
    if blocks == 0 {
        return None;
    }
    let block_size = 1024 << log_block_size;
    Some(Superblock {
        name: name(compat, incompat, ro_compat),
        label: text(&block.array::<16>(0x78)),
        uuid: uuid(block.array(0x68)),
        size_bytes: Some(blocks.saturating_mul(u64::from(block_size))),
        block_size: Some(block_size),
    })
}

fn checksum_fits(block: &Bytes) -> bool {
    // The kernel keeps the remainder without the final inversion.
    let crc = Crc::<u32>::new(&CRC_32_ISCSI).checksum(&block.0[..LENGTH - 4]);
    !crc == block.le32(LENGTH - 4)
}

fn name(compat: u32, incompat: u32, ro_compat: u32) -> &'static str {
    if incompat & INCOMPAT_JOURNAL_DEV != 0 {
        return "jbd";
    }
    if incompat & !INCOMPAT_OF_EXT3 != 0 || ro_compat & !RO_COMPAT_OF_EXT3 != 0 {
        return "ext4";
    }
    if compat & COMPAT_HAS_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    }
}
