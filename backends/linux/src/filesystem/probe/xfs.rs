//! XFS. Layout: "XFS Algorithms & Data Structures", section "Superblocks".

mod log;

use std::io::{self, Read, Seek};

use super::features::FeatureSet;
use super::source::{Bytes, Source};
use super::{CRC32C, Superblock, text, uuid};

/// The superblock fills one sector.
const SECTORS: std::ops::RangeInclusive<u16> = 512..=32768;
const BLOCKS: std::ops::RangeInclusive<u32> = 512..=65536;
/// Offset of the checksum, which version 5 has.
const CHECKSUM: usize = 224;
const INCOMPAT_ZONED: u32 = 0x200;

const RO_COMPAT: FeatureSet = FeatureSet {
    name: "ro_compat",
    common: 0x1 | 0x2 | 0x4,
    named: &[(0x8, "inobtcount")],
};
const INCOMPAT: FeatureSet = FeatureSet {
    name: "incompat",
    common: 0x1 | 0x2 | 0x4,
    named: &[
        (0x8, "bigtime"),
        (0x10, "needsrepair"),
        (0x20, "nrext64"),
        (0x40, "exchange"),
        (0x80, "parent"),
        (0x100, "metadir"),
        (0x200, "zoned"),
        (0x400, "zone_gaps"),
    ],
};

pub(super) fn probe<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    let Some(start) = source.bytes(0, 512)?.filter(|start| start.has(0, b"XFSB")) else {
        return Ok(None);
    };
    let sector = start.be16(102);
    if !SECTORS.contains(&sector) || !sector.is_power_of_two() {
        return Ok(None);
    }
    let found = source.checked(0, usize::from(sector), is_consistent, checksum_fits)?;
    let Some(sector) = found else { return Ok(None) };
    let mut found = read(&sector);
    if let Some(log) = log::Log::of(&sector) {
        found.needs_recovery = !log.is_clean(source)?;
    }
    Ok(Some(found))
}

fn version(sector: &Bytes) -> u16 {
    sector.be16(100) & 0xf
}

fn is_consistent(sector: &Bytes) -> bool {
    let block_size = sector.be32(4);
    BLOCKS.contains(&block_size)
        && block_size.is_power_of_two()
        && matches!(version(sector), 4 | 5)
        && sector.be64(8) != 0
        && u32::from(sector.0[120]) == block_size.ilog2()
        && sector.be32(88) != 0
}

fn read(sector: &Bytes) -> Superblock {
    let (block_size, blocks) = (sector.be32(4), sector.be64(8));
    let (ro_compat, incompat) = match version(sector) {
        5 => (sector.be32(212), sector.be32(216)),
        _ => (0, 0),
    };
    let has_external_log = sector.be64(48) == 0;
    // The realtime part of a zoned filesystem may follow on the same device.
    let has_realtime = sector.be64(16) != 0 && incompat & INCOMPAT_ZONED == 0;
    Superblock {
        label: text(&sector.array::<12>(108)),
        uuid: uuid(sector.array(32)),
        size_bytes: Some(blocks.saturating_mul(u64::from(block_size))),
        block_size: Some(block_size),
        more_devices: u32::from(has_external_log).saturating_add(u32::from(has_realtime)),
        features: INCOMPAT
            .uncommon(incompat.into())
            .chain(RO_COMPAT.uncommon(ro_compat.into()))
            .collect(),
        ..Superblock::named("xfs")
    }
}

fn checksum_fits(sector: &Bytes) -> bool {
    if version(sector) != 5 {
        return true;
    }
    let mut digest = CRC32C.digest();
    digest.update(&sector.0[..CHECKSUM]);
    digest.update(&[0; 4]);
    digest.update(&sector.0[CHECKSUM + 4..]);
    // Little-endian, unlike everything else in it.
    digest.finalize() == sector.le32(CHECKSUM)
}
