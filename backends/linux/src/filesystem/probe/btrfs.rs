//! btrfs. Layout: `struct btrfs_super_block` of Linux.

use std::io::{self, Read, Seek};

use super::features::FeatureSet;
use super::source::{Bytes, Source};
use super::{CRC32C, Superblock, text, uuid};

const OFFSET: u64 = 64 << 10;
const LENGTH: usize = 4096;
/// The other kinds of checksum are not computed here.
const TYPE_CRC32C: u16 = 0;

const COMPAT_RO: FeatureSet = FeatureSet {
    name: "compat_ro",
    common: 0x1 | 0x2,
    named: &[(0x4, "verity"), (0x8, "block_group_tree")],
};
const INCOMPAT: FeatureSet = FeatureSet {
    name: "incompat",
    common: 0x3ff,
    named: &[
        (0x400, "metadata_uuid"),
        (0x800, "raid1c34"),
        (0x1000, "zoned"),
        (0x2000, "extent_tree_v2"),
        (0x4000, "raid_stripe_tree"),
        (0x1_0000, "simple_quota"),
    ],
};

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let block = source.checked(OFFSET, LENGTH, is_consistent, checksum_fits)?;
    Ok(block.map(|block| read(&block)))
}

fn is_consistent(block: &Bytes) -> bool {
    let sector = block.le32(0x90);
    block.has(0x40, b"_BHRfS_M")
        && block.le64(0x30) == OFFSET
        && (512..=65536).contains(&sector)
        && sector.is_power_of_two()
}

fn checksum_fits(block: &Bytes) -> bool {
    block.le16(0xc4) != TYPE_CRC32C || CRC32C.checksum(&block.0[0x20..]) == block.le32(0)
}

fn read(block: &Bytes) -> Superblock {
    let others = block.le64(0x88).saturating_sub(1);
    Superblock {
        label: text(&block.array::<256>(0x12b)),
        uuid: uuid(block.array(0x20)),
        // The bytes of this device, as the superblock's device item has them.
        size_bytes: Some(block.le64(0xc9 + 8)),
        block_size: Some(block.le32(0x90)),
        // The root of the log tree.
        needs_recovery: block.le64(0x60) != 0,
        more_devices: u32::try_from(others).unwrap_or(u32::MAX),
        features: INCOMPAT
            .uncommon(block.le64(0xbc))
            .chain(COMPAT_RO.uncommon(block.le64(0xb4)))
            .collect(),
        ..Superblock::named("btrfs")
    }
}
