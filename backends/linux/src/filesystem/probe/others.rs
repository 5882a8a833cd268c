//! Filesystems and volumes that are recognised so that `inspect` can name them and they are never taken for blank.

use std::io::{self, Read, Seek};

use super::source::Source;
use super::{Superblock, text, uuid};

type Found = io::Result<Option<Superblock>>;

/// Layout: `struct btrfs_super_block`.
pub(super) fn btrfs<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    const OFFSET: u64 = 64 << 10;
    let Some(block) = source.bytes(OFFSET, 4096)? else {
        return Ok(None);
    };
    let sector = block.le32(0x90);
    let consistent = block.has(0x40, b"_BHRfS_M")
        && block.le64(0x30) == OFFSET
        && (512..=65536).contains(&sector)
        && sector.is_power_of_two();
    Ok(consistent.then(|| Superblock {
        name: "btrfs",
        label: text(&block.array::<256>(0x12b)),
        uuid: uuid(block.array(0x20)),
        // The bytes of this device, as the superblock's device item has them.
        size_bytes: Some(block.le64(0xc9 + 8)),
        block_size: Some(sector),
    }))
}

/// Layout: ECMA-119, section 8.4.
pub(super) fn iso9660<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    let Some(descriptor) = source.bytes(32 << 10, 2048)? else {
        return Ok(None);
    };
    let block_size = descriptor.le16(128);
    if !descriptor.has(0, b"\x01CD001\x01") || block_size != descriptor.be16(130) {
        return Ok(None);
    }
    Ok(Some(Superblock {
        label: text(&descriptor.array::<32>(40)),
        size_bytes: Some(u64::from(descriptor.le32(80)).saturating_mul(block_size.into())),
        block_size: Some(u32::from(block_size)),
        ..Superblock::named("iso9660")
    }))
}

/// FAT12, FAT16 and FAT32, all of which the kernel mounts as `vfat`.
pub(super) fn vfat<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    let Some(boot) = source.bytes(0, 512)? else {
        return Ok(None);
    };
    let (sector, cluster) = (boot.le16(11), boot.0[13]);
    let (reserved, tables, media) = (boot.le16(14), boot.0[16], boot.0[21]);
    let sectors = match boot.le16(19) {
        0 => boot.le32(32),
        few => u32::from(few),
    };
    let is_fat32 = boot.le16(22) == 0;
    let consistent = boot.has(510, b"\x55\xaa")
        && matches!(sector, 512 | 1024 | 2048 | 4096)
        && cluster.is_power_of_two()
        && reserved != 0
        && matches!(tables, 1 | 2)
        && (media == 0xf0 || media >= 0xf8)
        && sectors != 0
        && (boot.has(54, b"FAT") || boot.has(82, b"FAT32"));
    if !consistent {
        return Ok(None);
    }
    let (serial, label) = if is_fat32 { (67, 71) } else { (39, 43) };
    let serial = boot.le32(serial);
    Ok(Some(Superblock {
        name: "vfat",
        label: text(&boot.array::<11>(label)).filter(|label| label != "NO NAME"),
        uuid: (serial != 0).then(|| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)),
        size_bytes: Some(u64::from(sectors).saturating_mul(sector.into())),
        block_size: Some(u32::from(sector)),
    }))
}

/// What holds no filesystem directly.
pub(super) fn volumes<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Vec<Superblock>> {
    let mut found = Vec::new();
    found.extend(luks(source)?);
    found.extend(swap(source)?);
    found.extend(lvm(source)?);
    found.extend(raid(source)?);
    found.extend(verity(source)?);
    Ok(found)
}

fn luks<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    let header = source
        .bytes(0, 592)?
        .filter(|header| header.has(0, b"LUKS\xba\xbe"));
    Ok(header
        .filter(|header| matches!(header.be16(6), 1 | 2))
        .map(|header| Superblock {
            label: (header.be16(6) == 2)
                .then(|| text(&header.array::<48>(24)))
                .flatten(),
            uuid: text(&header.array::<40>(168)),
            ..Superblock::named("luks")
        }))
}

/// The signature ends the first page, whatever that is on the machine that made it.
fn swap<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    const LENGTH: usize = 10;
    for page in [4096u32, 8192, 16384, 65536] {
        let at = u64::from(page).saturating_sub(LENGTH as u64);
        let Some(signature) = source.bytes(at, LENGTH)? else {
            continue;
        };
        if !signature.has(0, b"SWAPSPACE2") && !signature.has(0, b"SWAP-SPACE") {
            continue;
        }
        let Some(header) = source.bytes(1024, 44)? else {
            continue;
        };
        return Ok(Some(Superblock {
            label: text(&header.array::<16>(28)),
            uuid: uuid(header.array(12)),
            size_bytes: Some(
                u64::from(header.le32(4))
                    .saturating_add(1)
                    .saturating_mul(page.into()),
            ),
            block_size: Some(page),
            ..Superblock::named("swap")
        }));
    }
    Ok(None)
}

/// A physical volume of LVM2: a label in one of the first four sectors.
fn lvm<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    for at in [0, 512, 1024, 1536] {
        let label = source.bytes(at, 32)?;
        if label.is_some_and(|label| label.has(0, b"LABELONE") && label.has(24, b"LVM2 001")) {
            return Ok(Some(Superblock::named("lvm2")));
        }
    }
    Ok(None)
}

/// A member of a software RAID: versions 1.1 and 1.2 at the start, 1.0 and 0.90 near the end.
fn raid<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    const MAGIC: u32 = 0xa92b_4efc;
    let size = source.size();
    let from_end = |back: u64, mask: u64| size.checked_sub(back).map(|at| at & mask);
    let places = [
        Some(0),
        Some(4096),
        from_end(8192, !0xfff),
        from_end(65536, !0xffff),
    ];
    for place in places.into_iter().flatten() {
        let block = source.bytes(place, 32)?;
        if block.is_some_and(|block| block.le32(0) == MAGIC && matches!(block.le32(4), 0 | 1)) {
            return Ok(Some(Superblock::named("raid-member")));
        }
    }
    Ok(None)
}

/// A hash tree of dm-verity on a device of its own.
fn verity<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    let header = source
        .bytes(0, 512)?
        .filter(|header| header.has(0, b"verity\0\0") && header.le32(8) == 1);
    Ok(header.map(|header| Superblock {
        uuid: uuid(header.array(16)),
        ..Superblock::named("verity-hash")
    }))
}
