//! The read-only filesystems: EROFS and SquashFS.

use std::io::{self, Read, Seek};

use crc::{CRC_32_ISCSI, Crc};

use super::source::{Bytes, Source};
use super::{Superblock, text, uuid};

const EROFS_OFFSET: u64 = 1024;
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const EROFS_HAS_CHECKSUM: u32 = 0x1;

/// Layout: `fs/erofs/erofs_fs.h` of Linux, "erofs on-disk super block (currently 128 bytes)".
pub(super) fn erofs<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let Some(block) = source.bytes(EROFS_OFFSET, 128)? else {
        return Ok(None);
    };
    let log_block_size = block.0[12];
    if block.le32(0) != EROFS_MAGIC || !(9..=16).contains(&log_block_size) {
        return Ok(None);
    }
    let block_size = 1u32 << log_block_size;
    if block.le32(8) & EROFS_HAS_CHECKSUM != 0 && !erofs_checksum_fits(source, &block, block_size)?
    {
        return Ok(None);
    }
    let blocks = block.le32(36);
    Ok(Some(Superblock {
        name: "erofs",
        label: text(&block.array::<16>(64)),
        uuid: uuid(block.array(48)),
        size_bytes: (blocks != 0).then(|| u64::from(blocks).saturating_mul(block_size.into())),
        block_size: Some(block_size),
    }))
}

/// The checksum covers the rest of the superblock's block, with itself as zero.
fn erofs_checksum_fits<R: Read + Seek>(
    source: &mut Source<'_, R>,
    block: &Bytes,
    block_size: u32,
) -> io::Result<bool> {
    let length = match block_size.saturating_sub(EROFS_OFFSET as u32) {
        0 => block_size,
        rest => rest,
    };
    // A device that ends within it is truncated, and will be refused for that.
    let Some(covered) = source.bytes(EROFS_OFFSET, length as usize)? else {
        return Ok(true);
    };
    let crc = Crc::<u32>::new(&CRC_32_ISCSI);
    let mut digest = crc.digest();
    digest.update(&covered.0[..4]);
    digest.update(&[0; 4]);
    digest.update(&covered.0[8..]);
    // The kernel keeps the remainder without the final inversion.
    Ok(!digest.finalize() == block.le32(4))
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
