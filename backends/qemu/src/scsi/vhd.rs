//! Whether an image is a VHD or VHDX, and whether it is the difference to another (Microsoft's specifications of the two).

use std::fs::File;
use std::io;

use super::fields::{big_endian, little_endian, read_up_to};

/// What an image is, as far as it matters who may open what for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// All of the disk is in it.
    Whole,
    /// It is the difference to an image that it names.
    Difference,
    /// It is of another format, or damaged.
    Other,
}

/// The length of the footer of a VHD, which is its last sector, in bytes.
const FOOTER: usize = 512;
const VHD_COOKIE: &[u8] = b"conectix";
/// Where the footer has the type of the disk.
const VHD_TYPE: usize = 60;

/// Looks at a VHD: one that grows begins with a copy of its footer. Blocks.
pub(super) fn vhd(file: &File) -> io::Result<Kind> {
    let length = file.metadata()?.len();
    let Some(at) = length.checked_sub(FOOTER as u64) else {
        return Ok(Kind::Other);
    };
    let start = read_up_to(file, 0, FOOTER)?;
    let end = read_up_to(file, at, FOOTER)?;
    Ok(vhd_kind(&start, &end))
}

fn vhd_kind(start: &[u8], end: &[u8]) -> Kind {
    // QEMU takes the first for what the image is, wherever there is one.
    let (footer, whole) = match start.starts_with(VHD_COOKIE) {
        true => (start, 3),
        false => (end, 2),
    };
    match big_endian(footer, VHD_TYPE, 4) {
        _ if !footer.starts_with(VHD_COOKIE) => Kind::Other,
        Some(4) => Kind::Difference,
        Some(kind) if kind == whole => Kind::Whole,
        _ => Kind::Other,
    }
}

/// How much of a VHDX is looked at by structure, in bytes: no table is longer.
const TABLE: usize = 64 << 10;
/// Where the first table of regions is, in bytes; QEMU reads no other.
const REGIONS: u64 = 192 << 10;
/// `8B7CA206-4790-4B9A-B8FE-575F050F886E` and `CAA16737-FA36-4D43-B3B6-33F0AA44E76B`, as they are stored.
const METADATA: &[u8] = b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const FILE_PARAMETERS: &[u8] = b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
/// A flag of the file parameters.
const HAS_PARENT: u64 = 1 << 1;

/// Looks at a VHDX. Blocks.
pub(super) fn vhdx(file: &File) -> io::Result<Kind> {
    if read_up_to(file, 0, 8)? != b"vhdxfile" {
        return Ok(Kind::Other);
    }
    let regions = read_up_to(file, REGIONS, TABLE)?;
    let Some(at) = metadata_at(&regions) else {
        return Ok(Kind::Other);
    };
    let table = read_up_to(file, at, TABLE)?;
    let parameters = parameters_at(&table).and_then(|offset| at.checked_add(offset));
    let Some(parameters) = parameters else {
        return Ok(Kind::Other);
    };
    Ok(
        match little_endian(&read_up_to(file, parameters, 8)?, 4, 4) {
            None => Kind::Other,
            Some(flags) if flags & HAS_PARENT != 0 => Kind::Difference,
            Some(_) => Kind::Whole,
        },
    )
}

/// Where the metadata is, from the table of regions: a header of 16 bytes, then entries of 32.
fn metadata_at(table: &[u8]) -> Option<u64> {
    let count = little_endian(table, 8, 4).filter(|_| table.starts_with(b"regi"))?;
    let entry = entry(table, 16, count, METADATA)?;
    little_endian(entry, 16, 8)
}

/// Where in the metadata the file parameters are, from its table: a header of 32 bytes, then entries of 32.
fn parameters_at(table: &[u8]) -> Option<u64> {
    let count = little_endian(table, 10, 2).filter(|_| table.starts_with(b"metadata"))?;
    let entry = entry(table, 32, count, FILE_PARAMETERS)?;
    little_endian(entry, 16, 4)
}

/// Reads bytes as each structure.
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) {
    let (start, end) = bytes.split_at(bytes.len() / 2);
    let _ = vhd_kind(start, end);
    let _ = (metadata_at(bytes), parameters_at(bytes));
}

/// The entry of a table that begins with an id.
fn entry<'a>(table: &'a [u8], from: usize, count: u64, id: &[u8]) -> Option<&'a [u8]> {
    let count = usize::try_from(count).ok()?;
    let mut entries = table.get(from..)?.chunks_exact(32).take(count);
    entries.find(|entry| entry.starts_with(id))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn footer(kind: u8) -> Vec<u8> {
        let mut bytes = vec![0; FOOTER];
        bytes[..8].copy_from_slice(VHD_COOKIE);
        bytes[VHD_TYPE + 3] = kind;
        bytes
    }

    #[test]
    fn a_vhd_says_what_it_is_at_its_start_or_at_its_end() {
        let data = vec![0; FOOTER];
        assert_eq!(vhd_kind(&data, &footer(2)), Kind::Whole);
        assert_eq!(vhd_kind(&footer(3), &footer(3)), Kind::Whole);
        assert_eq!(vhd_kind(&footer(4), &footer(4)), Kind::Difference);
        // What is at the start counts, also against an end that looks harmless.
        assert_eq!(vhd_kind(&footer(4), &footer(2)), Kind::Difference);
        assert_eq!(vhd_kind(&data, &footer(3)), Kind::Other);
        assert_eq!(vhd_kind(&footer(2), &footer(2)), Kind::Other);
        assert_eq!(vhd_kind(&data, &data), Kind::Other);
    }

    /// The structures of a VHDX that matter here.
    fn vhdx_with(flags: u8) -> File {
        let mut bytes = vec![0; 2 << 20];
        bytes[..8].copy_from_slice(b"vhdxfile");
        let at = REGIONS as usize;
        bytes[at..at + 4].copy_from_slice(b"regi");
        bytes[at + 8] = 2;
        bytes[at + 48..at + 64].copy_from_slice(METADATA);
        bytes[at + 66] = 0x10; // 1 MiB
        let at = 1 << 20;
        bytes[at..at + 8].copy_from_slice(b"metadata");
        bytes[at + 10] = 1;
        bytes[at + 32..at + 48].copy_from_slice(FILE_PARAMETERS);
        bytes[at + 50] = 1; // 64 KiB
        bytes[at + (64 << 10) + 4] = flags;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_vhdx_says_whether_it_has_a_parent() {
        assert_eq!(vhdx(&vhdx_with(0)).unwrap(), Kind::Whole);
        assert_eq!(vhdx(&vhdx_with(1)).unwrap(), Kind::Whole);
        assert_eq!(vhdx(&vhdx_with(2)).unwrap(), Kind::Difference);
        let cut = vhdx_with(0);
        cut.set_len(1 << 20).unwrap();
        assert_eq!(vhdx(&cut).unwrap(), Kind::Other);
        assert_eq!(vhdx(&tempfile::tempfile().unwrap()).unwrap(), Kind::Other);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in any::<u64>()) {
            let tables = [&b"regi"[..], b"metadata"].map(|start| [start, &bytes].concat());
            for table in &tables {
                metadata_at(table);
                parameters_at(table);
            }
            vhd_kind(&bytes, &tables[0]);
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            read_up_to(&file, at, 16).unwrap();
        }
    }
}
