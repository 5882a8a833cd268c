//! FAT12, FAT16 and FAT32, all of which the kernel mounts as `vfat`, and exFAT.

use std::io::{self, Read, Seek};

use super::source::{Bytes, Source};
use super::{Superblock, text, utf16};

type Found = io::Result<Option<Superblock>>;

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
    Ok(Some(Superblock {
        label: text(&boot.array::<11>(label)).filter(|label| label != "NO NAME"),
        uuid: serial_number(boot.le32(serial)),
        size_bytes: Some(u64::from(sectors).saturating_mul(sector.into())),
        block_size: Some(u32::from(sector)),
        ..Superblock::named("vfat")
    }))
}

fn serial_number(serial: u32) -> Option<String> {
    (serial != 0).then(|| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff))
}

/// Layout: "exFAT file system specification", section 3.1.
pub(super) fn exfat<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    let Some(boot) = source.bytes(0, 512)? else {
        return Ok(None);
    };
    let (sector_bits, cluster_bits) = (boot.0[108], boot.0[109]);
    let consistent = boot.has(3, b"EXFAT   ")
        && boot.has(510, b"\x55\xaa")
        && boot.0[11..64].iter().all(|byte| *byte == 0)
        && (9..=12).contains(&sector_bits)
        && cluster_bits <= 25u8.saturating_sub(sector_bits)
        && matches!(boot.0[110], 1 | 2);
    if !consistent {
        return Ok(None);
    }
    let sector = 1u32 << sector_bits;
    Ok(Some(Superblock {
        label: exfat_label(source, &boot)?,
        uuid: serial_number(boot.le32(100)),
        size_bytes: Some(boot.le64(72).saturating_mul(sector.into())),
        block_size: Some(sector),
        ..Superblock::named("exfat")
    }))
}

/// The label is an entry of the root directory, most often the first.
fn exfat_label<R: Read + Seek>(
    source: &mut Source<'_, R>,
    boot: &Bytes,
) -> io::Result<Option<String>> {
    const ENTRY: usize = 32;
    const LABEL: u8 = 0x83;
    let cluster = u64::from(boot.le32(96)).saturating_sub(2) << boot.0[109].min(25);
    let sector = cluster.saturating_add(boot.le32(88).into());
    let Some(at) = sector.checked_mul(1 << boot.0[108].min(12)) else {
        return Ok(None);
    };
    let Some(directory) = source.bytes(at, 512)? else {
        return Ok(None);
    };
    let mut entries = directory.0.chunks(ENTRY);
    let label = entries.find(|entry| entry[0] == LABEL);
    Ok(label.and_then(|entry| {
        let length = usize::from(entry[1].min(11)).saturating_mul(2);
        utf16(entry.get(2..)?.get(..length)?)
    }))
}
