//! ext2, ext3 and ext4. Layout: `Documentation/filesystems/ext4/super.rst` of Linux.

use std::io::{self, Read, Seek};

use super::features::FeatureSet;
use super::source::{Bytes, Source};
use super::{CRC32C, Superblock, text, uuid};

const OFFSET: u64 = 1024;
const LENGTH: usize = 1024;
const MAGIC: u16 = 0xef53;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
/// The journal has changes that were not written to their places.
const INCOMPAT_RECOVER: u32 = 0x4;
/// The device of a journal that belongs to another filesystem.
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
/// What ext2 and ext3 have: file types, recovery, meta block groups; sparse superblocks, large
/// files, trees in directories.
const INCOMPAT_OF_EXT3: u32 = 0x2 | 0x4 | 0x10;
const RO_COMPAT_OF_EXT3: u32 = 0x1 | 0x2 | 0x4;

const INCOMPAT: FeatureSet = FeatureSet {
    name: "incompat",
    common: 0x2 | 0x4 | 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200,
    named: &[
        (0x1, "compression"),
        (0x400, "ea_inode"),
        (0x1000, "dirdata"),
        (0x2000, "metadata_csum_seed"),
        (0x4000, "large_dir"),
        (0x8000, "inline_data"),
        (0x1_0000, "encrypt"),
        (0x2_0000, "casefold"),
    ],
};
const RO_COMPAT: FeatureSet = FeatureSet {
    name: "ro_compat",
    common: 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x2000,
    named: &[
        (0x80, "has_snapshot"),
        (0x800, "replica"),
        (0x1000, "read-only"),
        (0x4000, "shared_blocks"),
        (0x8000, "verity"),
        (0x1_0000, "orphan_present"),
    ],
};

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let block = source.checked(OFFSET, LENGTH, is_consistent, checksum_fits)?;
    Ok(block.map(|block| read(&block)))
}

/// Whether it is the device of a journal that belongs to another filesystem.
pub(super) fn is_journal(found: &Superblock) -> bool {
    found.name == "jbd"
}

fn is_consistent(block: &Bytes) -> bool {
    let (_, incompat, _) = features(block);
    let has_groups = block.le32(0x20) != 0 && block.le32(0x28) != 0;
    // The largest block is 64 KiB.
    block.le16(0x38) == MAGIC
        && block.le32(0x18) <= 6
        && (has_groups || incompat & INCOMPAT_JOURNAL_DEV != 0)
        && block.le32(0x4c) <= 1
        && blocks(block) != 0
}

/// Compatible, incompatible and read-only compatible features.
fn features(block: &Bytes) -> (u32, u32, u32) {
    match block.le32(0x4c) {
        0 => (0, 0, 0),
        _ => (block.le32(0x5c), block.le32(0x60), block.le32(0x64)),
    }
}

fn blocks(block: &Bytes) -> u64 {
    let (_, incompat, _) = features(block);
    let high = match incompat & INCOMPAT_64BIT {
        0 => 0,
        _ => block.le32(0x150),
    };
    u64::from(high) << 32 | u64::from(block.le32(0x04))
}

fn read(block: &Bytes) -> Superblock {
    let (compat, incompat, ro_compat) = features(block);
    let block_size = 1024u32 << block.le32(0x18).min(6);
    let has_journal = compat & COMPAT_HAS_JOURNAL != 0;
    // An inode number of its own journal, or the UUID of another device's.
    let is_external = has_journal && block.le32(0xe0) == 0 && block.array::<16>(0xd0) != [0; 16];
    Superblock {
        label: text(&block.array::<16>(0x78)),
        uuid: uuid(block.array(0x68)),
        size_bytes: Some(blocks(block).saturating_mul(u64::from(block_size))),
        block_size: Some(block_size),
        needs_recovery: incompat & INCOMPAT_RECOVER != 0,
        more_devices: u32::from(is_external),
        features: INCOMPAT
            .uncommon(incompat.into())
            .chain(RO_COMPAT.uncommon(ro_compat.into()))
            .collect(),
        ..Superblock::named(name(compat, incompat, ro_compat))
    }
}

fn checksum_fits(block: &Bytes) -> bool {
    let (_, _, ro_compat) = features(block);
    if ro_compat & RO_COMPAT_METADATA_CSUM == 0 {
        return true;
    }
    // The kernel keeps the remainder without the final inversion.
    let crc = CRC32C.checksum(&block.0[..LENGTH - 4]);
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
