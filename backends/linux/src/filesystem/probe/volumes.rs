//! Volumes that hold no filesystem directly: they are named, and never taken for blank.

use std::io::{self, Read, Seek};

use super::source::Source;
use super::{Superblock, text, uuid};

type Found = io::Result<Option<Superblock>>;

/// What holds no filesystem directly.
pub(super) fn volumes<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Vec<Superblock>> {
    let mut found = Vec::new();
    found.extend(luks(source)?);
    found.extend(swap(source)?);
    found.extend(lvm(source)?);
    found.extend(raid(source)?);
    found.extend(verity(source)?);
    found.extend(bcache(source)?);
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
        let Some(label) = source.bytes(at, 512)? else {
            continue;
        };
        if label.has(0, b"LABELONE") && label.has(24, b"LVM2 001") {
            let header = label.le32(20) as usize;
            return Ok(Some(Superblock {
                uuid: lvm_uuid(&label.array(header)),
                ..Superblock::named("lvm2")
            }));
        }
    }
    Ok(None)
}

/// The identifier in the groups in which its tools print it.
fn lvm_uuid(characters: &[u8; 32]) -> Option<String> {
    let mut rest = std::str::from_utf8(characters).ok()?;
    if !rest.chars().all(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    let mut groups = Vec::new();
    for length in [6, 4, 4, 4, 4, 4, 6] {
        let (group, after) = rest.split_at_checked(length)?;
        groups.push(group);
        rest = after;
    }
    Some(groups.join("-"))
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
        let Some(block) = source.bytes(place, 64)? else {
            continue;
        };
        match (block.le32(0), block.le32(4)) {
            (MAGIC, 1) => {
                return Ok(Some(Superblock {
                    label: text(&block.array::<32>(32)),
                    uuid: uuid(block.array(16)),
                    ..Superblock::named("raid-member")
                }));
            }
            (MAGIC, 0) => return Ok(Some(Superblock::named("raid-member"))),
            _ => {}
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

/// A device of bcache, whether it caches or is cached.
fn bcache<R: Read + Seek>(source: &mut Source<'_, R>) -> Found {
    const MAGIC: &[u8] = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
    const OFFSET: u64 = 4096;
    let block = source.bytes(OFFSET, 208)?;
    let block = block.filter(|block| block.has(24, MAGIC) && block.le64(8) == OFFSET / 512);
    Ok(block.map(|block| Superblock {
        label: text(&block.array::<32>(72)),
        uuid: uuid(block.array(40)),
        ..Superblock::named("bcache")
    }))
}
