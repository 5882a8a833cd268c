//! The read-only filesystems: EROFS and SquashFS.

use std::io::{self, Read, Seek};

use super::features::FeatureSet;
use super::source::{Bytes, Source};
use super::{CRC32C, Superblock, text, uuid};

const EROFS_OFFSET: u64 = 1024;
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const EROFS_HAS_CHECKSUM: u32 = 0x1;
const EROFS_INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// The size of an entry of the table of devices, in bytes.
const EROFS_DEVICE: u64 = 128;

const EROFS_INCOMPAT: FeatureSet = FeatureSet {
    name: "incompat",
    common: 0,
    named: &[
        (0x1, "lz4_0padding"),
        (0x2, "big_pcluster"),
        (0x4, "chunked_file"),
        (0x8, "device_table"),
        (0x10, "ztailpacking"),
        (0x20, "fragments"),
        (0x40, "xattr_prefixes"),
        (0x80, "48bit"),
        (0x100, "metabox"),
    ],
};

/// Layout: `fs/erofs/erofs_fs.h` of Linux, "erofs on-disk super block (currently 128 bytes)".
pub(super) fn erofs<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let is_erofs = |block: &Bytes| block.le32(0) == EROFS_MAGIC && (9..=16).contains(&block.0[12]);
    let Some(block) = source.bytes(EROFS_OFFSET, 128)?.filter(is_erofs) else {
        return Ok(None);
    };
    let block_size = 1u32 << block.0[12].min(16);
    // The checksum covers the rest of the superblock's block. A device that ends within it is truncated, and will be
    // refused for that.
    let covered = match block_size.saturating_sub(EROFS_OFFSET as u32) {
        0 => block_size,
        rest => rest,
    } as usize;
    let is_whole = source.bytes(EROFS_OFFSET, covered)?.is_some();
    let has_checksum = block.le32(8) & EROFS_HAS_CHECKSUM != 0;
    if is_whole
        && has_checksum
        && source
            .checked(EROFS_OFFSET, covered, is_erofs, erofs_checksum_fits)?
            .is_none()
    {
        return Ok(None);
    }
    let blocks = block.le32(36);
    Ok(Some(Superblock {
        label: text(&block.array::<16>(64)),
        uuid: uuid(block.array(48)),
        size_bytes: (blocks != 0).then(|| u64::from(blocks).saturating_mul(block_size.into())),
        block_size: Some(block_size),
        more_devices: erofs_devices_elsewhere(source, &block, block_size)?,
        features: EROFS_INCOMPAT.uncommon(block.le32(80).into()).collect(),
        ..Superblock::named("erofs")
    }))
}

/// The checksum is computed with itself as zero.
fn erofs_checksum_fits(covered: &Bytes) -> bool {
    let mut digest = CRC32C.digest();
    digest.update(&covered.0[..4]);
    digest.update(&[0; 4]);
    digest.update(&covered.0[8..]);
    // The kernel keeps the remainder without the final inversion.
    !digest.finalize() == covered.le32(4)
}

/// How many of the devices in its table are not on this device: the kernel takes the blocks of a device that it is not
/// given from this one, at the address that the table has for them.
fn erofs_devices_elsewhere<R: Read + Seek>(
    source: &mut Source<'_, R>,
    block: &Bytes,
    block_size: u32,
) -> io::Result<u32> {
    let (count, entries) = erofs_table(source, block)?;
    let Some(entries) = entries else {
        return Ok(count.into());
    };
    let size = source.size();
    let is_here = |entry: &Bytes| {
        let (blocks, start) = (u64::from(entry.le32(64)), u64::from(entry.le32(68)));
        let end = start
            .saturating_add(blocks)
            .saturating_mul(block_size.into());
        start != 0 && end <= size
    };
    let elsewhere = entries.iter().filter(|entry| !is_here(entry)).count();
    Ok(u32::try_from(elsewhere).unwrap_or(u32::MAX))
}

/// The table of devices: how many it is said to have, and its entries, if they are on the device.
fn erofs_table<R: Read + Seek>(
    source: &mut Source<'_, R>,
    block: &Bytes,
) -> io::Result<(u16, Option<Vec<Bytes>>)> {
    if block.le32(80) & EROFS_INCOMPAT_DEVICE_TABLE == 0 {
        return Ok((0, Some(Vec::new())));
    }
    let (count, first) = (block.le16(86), block.le16(88));
    let table = u64::from(first).saturating_mul(EROFS_DEVICE);
    let length = u64::from(count).saturating_mul(EROFS_DEVICE);
    let table = source.bytes(table, length as usize)?;
    let split = |table: Bytes| {
        let entries = table.0.chunks(EROFS_DEVICE as usize);
        entries.map(|entry| Bytes(entry.to_vec())).collect()
    };
    Ok((count, table.map(split)))
}

/// A device in the table of an erofs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ErofsDevice {
    /// The digits of the UUID that the erofs on it has, where the table says so: tools that merge images write that.
    pub(crate) uuid: Option<String>,
    /// How many bytes of it are used.
    pub(crate) bytes: u64,
}

/// The devices that an erofs has a table for, in its order.
pub(crate) fn erofs_devices<R: Read + Seek>(device: &mut R) -> io::Result<Vec<ErofsDevice>> {
    let mut source = Source::new(device)?;
    let Some(block) = source.bytes(EROFS_OFFSET, 128)? else {
        return Ok(Vec::new());
    };
    let block_size = 1u64 << block.0[12].min(16);
    let (_, entries) = erofs_table(&mut source, &block)?;
    let read = |entry: &Bytes| {
        let tag = text(&entry.array::<64>(0));
        let is_uuid = |tag: &String| tag.len() == 32 && tag.bytes().all(|c| c.is_ascii_hexdigit());
        ErofsDevice {
            uuid: tag.filter(is_uuid).map(|tag| tag.to_ascii_lowercase()),
            bytes: u64::from(entry.le32(64)).saturating_mul(block_size),
        }
    };
    Ok(entries.unwrap_or_default().iter().map(read).collect())
}

/// Layout: `fs/squashfs/squashfs_fs.h` of Linux, `struct squashfs_super_block`. Version 4 only, the
/// one that kernels still mount.
pub(super) fn squashfs<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<Superblock>> {
    let Some(block) = source.bytes(0, 96)? else {
        return Ok(None);
    };
    let (block_size, log_block_size) = (block.le32(12), block.le16(22));
    let used = block.le64(40);
    let consistent = block.has(0, b"hsqs")
        && block.le16(28) == 4
        && (12..=20).contains(&log_block_size)
        && block_size == 1 << log_block_size
        && used >= 96;
    Ok(consistent.then(|| Superblock {
        size_bytes: Some(used),
        block_size: Some(block_size),
        ..Superblock::named("squashfs")
    }))
}
