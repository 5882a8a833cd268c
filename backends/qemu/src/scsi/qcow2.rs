//! The header of a qcow2 image, as far as it makes QEMU open other files (QEMU's `docs/interop/qcow2`).

use std::fs::File;
use std::io;

use super::fields::{big_endian, read_up_to};

/// The first four bytes.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// How much is read, in bytes: the first cluster of the usual size, in which the header is, with its extensions and the
/// name of the backing file.
const LEN: usize = 64 << 10;

/// The incompatible feature that the data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// The type of the header extension that names the format of the backing file.
const BACKING_FORMAT: u64 = 0xe279_2aca;

/// The longest name of a backing file, in bytes.
const MAX_NAME: usize = 1023;

/// The length of the header of version 2; later ones say how long they are.
const LEN_2: usize = 72;

/// What an image wants from its host besides its own file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// It is the difference to another image.
    pub(super) backing: Option<Backing>,
    /// Its data is in another file.
    pub(super) data_file: bool,
    /// It cannot be read without a key.
    pub(super) encrypted: bool,
}

/// The image that another is the difference to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: Vec<u8>,
    /// None if the header does not say.
    pub(super) format: Option<String>,
}

/// Reads the header; none if it is no qcow2 image. Blocks.
pub(super) fn read(file: &File) -> io::Result<Option<Header>> {
    Ok(parse(&read_up_to(file, 0, LEN)?))
}

pub(super) fn parse(bytes: &[u8]) -> Option<Header> {
    if !bytes.starts_with(&MAGIC) {
        return None;
    }
    let (features, length) = match big_endian(bytes, 4, 4)? {
        2 => (0, LEN_2),
        3 => (
            big_endian(bytes, 72, 8)?,
            usize::try_from(big_endian(bytes, 100, 4)?).ok()?,
        ),
        _ => return None,
    };
    let backing = match usize::try_from(big_endian(bytes, 8, 8)?).ok()? {
        0 => None,
        at => {
            let size = usize::try_from(big_endian(bytes, 16, 4)?).ok()?;
            let end = at.checked_add(size).filter(|_| size <= MAX_NAME)?;
            Some(Backing {
                name: bytes.get(at..end)?.to_vec(),
                format: backing_format(bytes, length),
            })
        }
    };
    Some(Header {
        backing,
        data_file: features & EXTERNAL_DATA != 0,
        encrypted: big_endian(bytes, 32, 4)? != 0,
    })
}

/// Looks through the extensions, which begin behind the header: each a type, a length, and so many bytes, padded to
/// eight.
fn backing_format(bytes: &[u8], mut at: usize) -> Option<String> {
    loop {
        let kind = big_endian(bytes, at, 4)?;
        let length = usize::try_from(big_endian(bytes, at.checked_add(4)?, 4)?).ok()?;
        let start = at.checked_add(8)?;
        match kind {
            0 => return None,
            BACKING_FORMAT => {
                let name = bytes.get(start..start.checked_add(length)?)?;
                return Some(String::from_utf8_lossy(name).into_owned());
            }
            _ => at = start.checked_add(length.checked_next_multiple_of(8)?)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(version: u8, set: &[usize]) -> Vec<u8> {
        let mut bytes = vec![0; 128];
        bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        bytes[103] = 104;
        for at in set {
            bytes[*at] = 4;
        }
        bytes
    }

    const PLAIN: Header = Header {
        backing: None,
        data_file: false,
        encrypted: false,
    };

    #[test]
    fn a_header_says_what_else_is_opened() {
        assert_eq!(parse(&header(2, &[])), Some(PLAIN));
        assert_eq!(parse(&header(3, &[])), Some(PLAIN));
        // A name of four bytes at offset 4, which is the version.
        let mut with_backing = header(3, &[15, 19]);
        let backing = |format: Option<&str>| {
            let format = format.map(str::to_owned);
            let name = vec![0, 0, 0, 3];
            let backing = Some(Backing { name, format });
            Some(Header { backing, ..PLAIN })
        };
        assert_eq!(parse(&with_backing), backing(None));
        with_backing[104..115].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x03raw");
        assert_eq!(parse(&with_backing), backing(Some("raw")));
        // A name that is not in the header's cluster is none that QEMU takes.
        for at in 8..14 {
            assert_eq!(parse(&header(3, &[at, 19])), None);
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
        for length in 0..104 {
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
            length in 0_usize..128,
        ) {
            parse(&bytes);
            let known = [&header(version, &[])[..8], &bytes].concat();
            parse(&known[..length.min(known.len())]);
        }
    }
}
