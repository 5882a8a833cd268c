//! The header of a qcow2 image, as far as it makes QEMU open other files (QEMU's `docs/interop/qcow2`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The first four bytes.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The length of what is read, in bytes: the header of version 2, and the incompatible features of version 3.
const LEN: usize = 80;

/// The incompatible feature that the data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// What an image wants from its host besides its own file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// It is the difference to another image.
    pub(super) backing_file: bool,
    /// Its data is in another file.
    pub(super) data_file: bool,
    /// It cannot be read without a key.
    pub(super) encrypted: bool,
}

/// Reads the header; none if it is no qcow2 image. Blocks.
pub(super) fn read(file: &File) -> io::Result<Option<Header>> {
    let mut header = [0; LEN];
    let mut length = 0;
    while length < LEN {
        match file.read_at(&mut header[length..], length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(parse(&header[..length]))
}

fn parse(bytes: &[u8]) -> Option<Header> {
    if !bytes.starts_with(&MAGIC) {
        return None;
    }
    let version = number(bytes, 4, 4)?;
    let features = match version {
        2 => 0,
        3 => number(bytes, 72, 8)?,
        _ => return None,
    };
    Some(Header {
        backing_file: number(bytes, 8, 8)? != 0,
        data_file: features & EXTERNAL_DATA != 0,
        encrypted: number(bytes, 32, 4)? != 0,
    })
}

/// A big-endian number, if the header is that long.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + length)?;
    Some(
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(version: u8, set: &[usize]) -> Vec<u8> {
        let mut bytes = vec![0; 104];
        bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        for at in set {
            bytes[*at] = 4;
        }
        bytes
    }

    const PLAIN: Header = Header {
        backing_file: false,
        data_file: false,
        encrypted: false,
    };

    #[test]
    fn a_header_says_what_else_is_opened() {
        assert_eq!(parse(&header(2, &[])), Some(PLAIN));
        assert_eq!(parse(&header(3, &[])), Some(PLAIN));
        for at in 8..16 {
            let backing_file = true;
            let expected = Header {
                backing_file,
                ..PLAIN
            };
            assert_eq!(parse(&header(3, &[at])), Some(expected));
        }
        let data_file = true;
        let expected = Header { data_file, ..PLAIN };
        assert_eq!(parse(&header(3, &[79])), Some(expected));
        // Version 2 has other things there.
        assert_eq!(parse(&header(2, &[79])), Some(PLAIN));
        let encrypted = true;
        let expected = Header { encrypted, ..PLAIN };
        assert_eq!(parse(&header(2, &[35])), Some(expected));
    }

    #[test]
    fn what_is_cut_short_or_of_another_version_is_no_image() {
        for length in 0..80 {
            assert_eq!(parse(&header(3, &[])[..length]), None);
        }
        for version in [0, 1, 4, 255] {
            assert_eq!(parse(&header(version, &[])), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            version in 0_u8..5,
            length in 0_usize..104,
        ) {
            parse(&bytes);
            let known = [&header(version, &[])[..8], &bytes].concat();
            parse(&known[..length.min(known.len())]);
        }
    }
}
