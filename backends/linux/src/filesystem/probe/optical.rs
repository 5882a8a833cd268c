//! The filesystems of discs: ISO 9660 and UDF.

use std::io::{self, Read, Seek};

use super::source::{Bytes, Source};
use super::{Superblock, text};

/// Where both begin to describe themselves, and the step between their descriptors, in bytes.
const DESCRIPTORS: u64 = 32 << 10;
const STEP: u64 = 2048;

/// Layout: ECMA-119, section 8.4.
pub(super) fn iso9660<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<Superblock>> {
    let Some(descriptor) = source.bytes(DESCRIPTORS, STEP as usize)? else {
        return Ok(None);
    };
    let block_size = descriptor.le16(128);
    if !descriptor.has(0, b"\x01CD001\x01") || block_size != descriptor.be16(130) {
        return Ok(None);
    }
    // When it was changed, or else when it was made, is what its tools call its UUID.
    let date = date(&descriptor.array(830)).or_else(|| date(&descriptor.array(813)));
    Ok(Some(Superblock {
        label: text(&descriptor.array::<32>(40)),
        uuid: date,
        size_bytes: Some(u64::from(descriptor.le32(80)).saturating_mul(block_size.into())),
        block_size: Some(u32::from(block_size)),
        ..Superblock::named("iso9660")
    }))
}

fn date(digits: &[u8; 16]) -> Option<String> {
    let is_date =
        digits.iter().all(u8::is_ascii_digit) && digits.iter().any(|digit| *digit != b'0');
    let text = std::str::from_utf8(digits).ok().filter(|_| is_date)?;
    let mut date = text[..4].to_owned();
    for at in (4..16usize).step_by(2) {
        date.push('-');
        date.push_str(text.get(at..at.saturating_add(2))?);
    }
    Some(date)
}

/// Layout: ECMA-167. Its anchor, which must be there as well, is in block 256.
pub(super) fn udf<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    if !has_udf_recognition(source)? {
        return Ok(None);
    }
    for block_size in [2048u32, 512, 1024, 4096] {
        let anchor = descriptor(source, 256, block_size)?;
        let Some(anchor) = anchor.filter(|anchor| anchor.le16(0) == ANCHOR) else {
            continue;
        };
        return Ok(Some(Superblock {
            label: udf_label(source, &anchor, block_size)?,
            block_size: Some(block_size),
            ..Superblock::named("udf")
        }));
    }
    Ok(None)
}

const ANCHOR: u16 = 2;
const LOGICAL_VOLUME: u16 = 6;
const END: u16 = 8;

/// Whether there is an NSR descriptor among those at the start.
fn has_udf_recognition<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<bool> {
    for step in [STEP, 4096] {
        for index in 0..8u64 {
            let at = DESCRIPTORS.saturating_add(index.saturating_mul(step));
            let Some(found) = source.bytes(at, 7)? else {
                return Ok(false);
            };
            match found.array::<5>(1) {
                [b'N', b'S', b'R', b'0', b'2' | b'3'] => return Ok(true),
                _ if found.has(1, b"BEA01") || found.has(1, b"CD001") || found.has(1, b"BOOT2") => {
                }
                _ => break,
            }
        }
    }
    Ok(false)
}

/// The descriptor in a block, if its tag says that it is in this one and the tag's checksum fits.
fn descriptor<R: Read + Seek>(
    source: &mut Source<'_, R>,
    block: u32,
    block_size: u32,
) -> io::Result<Option<Bytes>> {
    let at = u64::from(block).saturating_mul(block_size.into());
    let found = source.bytes(at, 512)?;
    Ok(found.filter(|found| {
        let tag = found.array::<16>(0);
        let sum = tag.iter().enumerate().filter(|(at, _)| *at != 4);
        let sum = sum.fold(0u8, |sum, (_, byte)| sum.wrapping_add(*byte));
        sum == tag[4] && found.le32(12) == block
    }))
}

fn udf_label<R: Read + Seek>(
    source: &mut Source<'_, R>,
    anchor: &Bytes,
    block_size: u32,
) -> io::Result<Option<String>> {
    let first = anchor.le32(20);
    for index in 0..32 {
        let Some(block) = first.checked_add(index) else {
            break;
        };
        match descriptor(source, block, block_size)? {
            Some(found) if found.le16(0) == LOGICAL_VOLUME => {
                return Ok(dstring(&found.array::<128>(84)));
            }
            Some(found) if found.le16(0) != END => {}
            _ => break,
        }
    }
    Ok(None)
}

/// A string whose last byte is its length and whose first one says how many bytes a character has.
fn dstring(field: &[u8; 128]) -> Option<String> {
    let length = usize::from(field[127]).min(127);
    let characters = field.get(1..length)?;
    let label: String = match field[0] {
        8 => characters.iter().map(|byte| char::from(*byte)).collect(),
        16 => {
            let units = characters.chunks_exact(2);
            let units: Vec<u16> = units
                .map(|unit| u16::from_be_bytes([unit[0], unit[1]]))
                .collect();
            String::from_utf16_lossy(&units)
        }
        _ => return None,
    };
    (!label.is_empty()).then_some(label)
}
