//! Images of disks in a format of a hypervisor: what is in them is only visible through it.

use std::io::{self, Read, Seek};

use super::source::Source;

/// The length of the footer of a VHD, of which one that is not fixed in size has a copy at the start, in bytes.
const VHD_FOOTER: u64 = 512;

/// The format of an image that begins with its header.
pub(super) fn by_header<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<&'static str>> {
    let Some(start) = source.bytes(0, 24)? else {
        return Ok(None);
    };
    let is_qcow2 = start.has(0, b"QFI\xfb") && matches!(start.be32(4), 2 | 3);
    let is_vmdk = start.has(0, b"KDMV") && matches!(start.le32(4), 1..=3)
        || start.has(0, b"# Disk DescriptorFile");
    Ok(match () {
        () if is_qcow2 => Some("qcow2"),
        () if is_vmdk => Some("vmdk"),
        () if start.has(0, b"conectix") => Some("vhd"),
        () if start.has(0, b"vhdxfile") => Some("vhdx"),
        () => None,
    })
}

/// The format of a compressed file, by its first bytes.
pub(super) fn compression<R: Read + Seek>(
    source: &mut Source<'_, R>,
) -> io::Result<Option<&'static str>> {
    // With the method of gzip (RFC 1952, the only one there is) and the block sizes of bzip2, no boot sector begins so.
    const STARTS: [(&[u8], &str); 4] = [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh", "bzip2"),
    ];
    let start = source.bytes(0, 6)?;
    let found = start.and_then(|start| STARTS.iter().find(|(magic, _)| start.has(0, magic)));
    Ok(found.map(|(_, name)| *name))
}

/// Whether it ends with the footer of a VHD of a fixed size. What is before it is the disk itself.
pub(super) fn has_vhd_footer<R: Read + Seek>(source: &mut Source<'_, R>) -> io::Result<bool> {
    let Some(at) = source.size().checked_sub(VHD_FOOTER) else {
        return Ok(false);
    };
    let footer = source.bytes(at, VHD_FOOTER as usize)?;
    Ok(footer.is_some_and(|footer| footer.has(0, b"conectix")))
}
