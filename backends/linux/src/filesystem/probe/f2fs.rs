//! F2FS. Layout: `include/linux/f2fs_fs.h` of Linux, `struct f2fs_super_block` and `struct f2fs_checkpoint`.

use std::io::{self, Read, Seek};

use crc::{Algorithm, Crc};

use super::features::FeatureSet;
use super::source::{Bytes, Source};
use super::{Superblock, utf16, uuid};

/// Of the first superblock; the second one is a block further.
const OFFSET: u64 = 1024;
const LENGTH: usize = 3072;
const MAGIC: u32 = 0xf2f5_2010;
const FEATURE_CHECKSUM: u32 = 0x800;
/// The flag of a checkpoint that was written by an unmount: nothing was written after it.
const UNMOUNTED: u32 = 0x1;

/// The remainder that the kernel's `crc32_le` has when it starts from the magic number.
static CHECKSUM: Crc<u32> = Crc::<u32>::new(&Algorithm {
    width: 32,
    poly: 0x04c1_1db7,
    init: MAGIC.reverse_bits(),
    refin: true,
    refout: true,
    xorout: 0,
    check: 0,
    residue: 0,
});

const FEATURES: FeatureSet = FeatureSet {
    name: "feature",
    common: 0x1 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x800,
    named: &[
        (0x2, "blkzoned"),
        (0x400, "verity"),
        (0x1000, "casefold"),
        (0x2000, "compression"),
        (0x4000, "readonly"),
        (0x8000, "device_alias"),
    ],
};

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let Some(block) = source.checked(OFFSET, LENGTH, is_consistent, checksum_fits)? else {
        return Ok(None);
    };
    let (mut found, devices) = read(&block);
    found.more_devices = devices;
    found.needs_recovery = !was_unmounted(source, &block)?;
    Ok(Some(found))
}

fn is_consistent(block: &Bytes) -> bool {
    let sector = block.le32(8);
    block.le32(0) == MAGIC
        && (9..=16).contains(&sector)
        && (12..=16).contains(&block.le32(16))
        && sector.checked_add(block.le32(12)) == Some(block.le32(16))
        && block.le32(20) == 9
        && block.le64(36) != 0
}

fn checksum_fits(block: &Bytes) -> bool {
    if block.le32(2180) & FEATURE_CHECKSUM == 0 {
        return true;
    }
    let at = block.le32(32) as usize;
    let covered = block.0.get(..at).filter(|_| at == LENGTH - 4);
    covered.is_some_and(|covered| CHECKSUM.checksum(covered) == block.le32(at))
}

/// What the superblock says, and how many devices there are beside the first.
fn read(block: &Bytes) -> (Superblock, u32) {
    const DEVICES: usize = 2201;
    const DEVICE: usize = 68;
    let block_size = 1u32 << block.le32(16).min(16);
    let table = block.0.get(DEVICES..).unwrap_or_default();
    let devices = table
        .chunks(DEVICE)
        .take(8)
        .take_while(|device| device[0] != 0);
    let devices = u32::try_from(devices.count()).unwrap_or(0);
    // With several devices the size is that of all.
    let size = block.le64(36).saturating_mul(block_size.into());
    let found = Superblock {
        label: utf16(&block.array::<1024>(124)),
        uuid: uuid(block.array(108)),
        size_bytes: (devices <= 1).then_some(size),
        block_size: Some(block_size),
        features: FEATURES.uncommon(block.le32(2180).into()).collect(),
        ..Superblock::named("f2fs")
    };
    (found, devices.saturating_sub(1))
}

/// Whether the newest of the two checkpoints is that of an unmount.
fn was_unmounted<R: Read + Seek>(source: &mut Source<'_, R>, block: &Bytes) -> io::Result<bool> {
    let first = u64::from(block.le32(76));
    let segment = 1u64 << block.le32(20).min(31);
    let block_bits = block.le32(16).min(16);
    let mut newest = None;
    for at in [first, first.saturating_add(segment)] {
        newest = newest.max(checkpoint(source, at, block_bits)?);
    }
    Ok(newest.is_some_and(|(_, flags)| flags & UNMOUNTED != 0))
}

/// The version and the flags of a checkpoint, if it is whole: its last block repeats the first.
fn checkpoint<R: Read + Seek>(
    source: &mut Source<'_, R>,
    at: u64,
    block_bits: u32,
) -> io::Result<Option<(u64, u32)>> {
    let length = 1usize << block_bits;
    let mut read = |at: u64| {
        let place = at.checked_mul(length as u64);
        let bytes = place.map_or(Ok(None), |place| source.bytes(place, length))?;
        Ok::<_, io::Error>(bytes.filter(checkpoint_fits))
    };
    let Some(start) = read(at)? else {
        return Ok(None);
    };
    let blocks = u64::from(start.le32(136));
    let end = at.saturating_add(blocks).saturating_sub(1);
    let version = start.le64(0);
    let is_whole = read(end)?.is_some_and(|end| end.le64(0) == version);
    Ok(is_whole.then(|| (version, start.le32(132))))
}

/// The checksum covers the block but for itself.
fn checkpoint_fits(block: &Bytes) -> bool {
    const FIRST: usize = 192;
    let at = block.le32(164) as usize;
    let after = at.saturating_add(4);
    let (Some(before), Some(rest)) = (block.0.get(..at), block.0.get(after..)) else {
        return false;
    };
    let mut digest = CHECKSUM.digest();
    digest.update(before);
    digest.update(rest);
    at >= FIRST && digest.finalize() == block.le32(at)
}
