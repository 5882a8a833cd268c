//! What is on a device, by its superblocks and tables. An image may be hostile: every field is checked, and nothing
//! is guessed.
// Numbers come from the image: an overflow would be a panic, or a wrong size.
#![deny(clippy::arithmetic_side_effects)]

mod blank;
mod btrfs;
mod disk_image;
mod ext;
mod f2fs;
mod fat;
mod features;
mod gpt;
mod mbr;
mod optical;
mod readonly;
mod source;
mod volumes;
mod xfs;

use std::fmt;
use std::io::{self, Read, Seek};

use crc::{CRC_32_ISCSI, Crc};

pub(crate) use blank::make_blank;
pub(crate) use readonly::{ErofsDevice, erofs_devices};
use source::Source;

/// The checksum of ext4, XFS, btrfs and erofs. Its table is made once, by the compiler.
static CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// What [`probe`] found on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeResult {
    /// The size of the device, in bytes.
    pub device_bytes: u64,
    /// What was found on it.
    pub content: Content,
}

/// What was found on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// A filesystem.
    Filesystem(Superblock),
    /// Partitions.
    PartitionTable(PartitionTable),
    /// Something else that must not be overwritten: swap space, an encrypted volume, a member of an
    /// array.
    Volume(Superblock),
    /// An image of a disk in a format of a hypervisor, by name: `qcow2`, `vhd`, `vhdx` or `vmdk`. What is in it can only
    /// be seen through that format.
    DiskImage(&'static str),
    /// A compressed file, by the name of its format: `gzip`, `zstd`, `xz` or `bzip2`. What is in it is no disk until it is
    /// unpacked.
    Compressed(&'static str),
    /// Signatures of several filesystems or volumes that exclude each other, by name.
    Ambiguous(Vec<&'static str>),
    /// Proven blank: zeros in each place where anything known keeps a signature.
    Blank,
    /// Something unknown, which must not be taken for blank.
    Unknown,
}

/// What the superblock of a filesystem or volume says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Superblock {
    /// The filesystem by its kernel name (`ext4`), or the kind of volume (`luks`, `swap`).
    pub name: &'static str,
    /// The label, if there is one. What is no UTF-8 in it is replaced.
    pub label: Option<String>,
    /// The identifier in the form that its tools print.
    pub uuid: Option<String>,
    /// How much of the device it needs, in bytes, where it says so.
    pub size_bytes: Option<u64>,
    /// The size of a block, in bytes, where it has blocks.
    pub block_size: Option<u32>,
    /// Whether its journal or log has changes that are not in their places yet. A mount without replay shows an older
    /// state, without an error. A filesystem that is mounted read-write elsewhere looks the same.
    pub needs_recovery: bool,
    /// How many more devices it needs: blobs of an erofs, an external journal or log, a realtime device, the other
    /// devices of a btrfs.
    pub more_devices: u32,
    /// Its features that not every kernel since Linux 4.19 knows, by name, or by their bits (`incompat 0x80000`).
    pub features: Vec<String>,
}

/// A partition table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionTable {
    /// Which kind.
    pub kind: TableKind,
    /// The partitions, by number.
    pub partitions: Vec<Partition>,
}

/// The kinds of partition tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// A GUID partition table.
    Gpt,
    /// A master boot record, with the logical partitions in its extended ones.
    Mbr,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it starts, in bytes from the start of the disk; this may be past the end of the disk.
    pub start: u64,
    /// Its size in bytes. `start + size` fits in 64 bits.
    pub size: u64,
    /// Its type: a GUID, or two hexadecimal digits after `0x`.
    pub type_id: String,
    /// Its name, if it has one.
    pub name: Option<String>,
}

impl Superblock {
    fn named(name: &'static str) -> Self {
        Superblock {
            name,
            label: None,
            uuid: None,
            size_bytes: None,
            block_size: None,
            needs_recovery: false,
            more_devices: 0,
            features: Vec::new(),
        }
    }
}

impl ProbeResult {
    /// How many bytes the filesystem needs, if that is more than the device has.
    pub fn truncated(&self) -> Option<u64> {
        match &self.content {
            Content::Filesystem(found) => {
                found.size_bytes.filter(|needs| *needs > self.device_bytes)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Content {
    /// In a few words: `ext4`, `a GPT partition table`, `nothing (blank)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Filesystem(found) | Content::Volume(found) => f.write_str(found.name),
            Content::PartitionTable(table) => write!(f, "a {} partition table", table.kind),
            Content::DiskImage(format) => write!(f, "a {format} disk image"),
            Content::Compressed(format) => write!(f, "a file compressed with {format}"),
            Content::Ambiguous(names) => write!(f, "signatures of {}", names.join(" and ")),
            Content::Blank => f.write_str("nothing (blank)"),
            Content::Unknown => f.write_str("unknown content"),
        }
    }
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TableKind::Gpt => "GPT",
            TableKind::Mbr => "MBR",
        })
    }
}

/// Finds out what is on a device or in an image. Reads a few megabytes at most, and blocks.
///
/// Never panics, and needs a bounded amount of memory for any content. A superblock counts only if its fields are
/// consistent and its checksum, if it has one, is right.
///
/// # Errors
///
/// Those of reading.
pub fn probe<R: Read + Seek>(device: &mut R) -> io::Result<ProbeResult> {
    let mut source = Source::new(device)?;
    let device_bytes = source.size();
    let content = content(&mut source)?;
    Ok(ProbeResult {
        device_bytes,
        content,
    })
}

fn content<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Content> {
    let mut filesystems = Vec::new();
    filesystems.extend(ext::probe(source)?);
    filesystems.extend(xfs::probe(source)?);
    filesystems.extend(readonly::erofs(source)?);
    filesystems.extend(readonly::squashfs(source)?);
    filesystems.extend(btrfs::probe(source)?);
    filesystems.extend(f2fs::probe(source)?);
    filesystems.extend(fat::exfat(source)?);
    filesystems.extend(optical(source)?);
    let mut volumes = volumes::volumes(source)?;
    volumes.extend(filesystems.extract_if(.., |found| ext::is_journal(found)));
    let image = disk_image::by_header(source)?;
    let all = filesystems.iter().chain(&volumes);
    let names: Vec<_> = all.map(|found| found.name).chain(image).collect();
    if names.len() > 1 {
        return Ok(Content::Ambiguous(names));
    }
    if let Some(format) = image {
        return Ok(Content::DiskImage(format));
    }
    let gpt = gpt::probe(source)?;
    // Hybrid images boot from discs and from USB sticks, and their partitions hold the same files.
    if let (Some(table), true) = (gpt, filesystems.iter().all(|found| found.name == "iso9660")) {
        return Ok(Content::PartitionTable(table));
    }
    if let Some(found) = filesystems.pop() {
        return Ok(Content::Filesystem(found));
    }
    if let Some(found) = volumes.pop() {
        return Ok(Content::Volume(found));
    }
    if let Some(format) = disk_image::compression(source)? {
        return Ok(Content::Compressed(format));
    }
    // A FAT boot sector ends like an MBR: the stricter one goes first.
    if let Some(found) = fat::vfat(source)? {
        return Ok(Content::Filesystem(found));
    }
    if let Some(table) = mbr::probe(source)? {
        return Ok(Content::PartitionTable(table));
    }
    if disk_image::has_vhd_footer(source)? {
        return Ok(Content::DiskImage("vhd"));
    }
    Ok(if blank::is_blank(source)? {
        Content::Blank
    } else {
        Content::Unknown
    })
}

/// A bridge disc has both filesystems over the same files; the kernel's tools take UDF.
fn optical<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<Option<Superblock>> {
    match optical::udf(source)? {
        Some(found) => Ok(Some(found)),
        None => optical::iso9660(source),
    }
}

/// The text of a field that is padded with NULs or spaces; nothing if it is empty.
fn text(field: &[u8]) -> Option<String> {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    let text = String::from_utf8_lossy(&field[..end]);
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The text of a field of 16-bit characters, little-endian, that is padded with NULs; nothing if it is empty.
fn utf16(field: &[u8]) -> Option<String> {
    let units = field.chunks_exact(2);
    let units = units.map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    let text = String::from_utf16_lossy(&units);
    (!text.is_empty()).then_some(text)
}

/// A UUID as its sixteen bytes print; nothing if all are zero.
fn uuid(bytes: [u8; 16]) -> Option<String> {
    if bytes == [0; 16] {
        return None;
    }
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.extend([byte >> 4, byte & 0xf].map(hexadecimal));
    }
    Some(text)
}

fn hexadecimal(digit: u8) -> char {
    char::from_digit(digit.into(), 16).unwrap_or_default()
}

#[cfg(test)]
mod tests;
