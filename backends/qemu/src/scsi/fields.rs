//! Reading the headers of images, whose lengths and places nobody vouches for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// As much as there is, up to a length. Blocks.
pub(super) fn read_up_to(file: &File, at: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        let Some(next) = at
            .checked_add(filled as u64)
            .filter(|next| i64::try_from(*next).is_ok())
        else {
            break;
        };
        match file.read_at(&mut bytes[filled..], next) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// A number of so many bytes, the most significant first; none if they are not all there.
pub(super) fn big_endian(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    Some(joined(bytes.get(at..at.checked_add(length)?)?.iter()))
}

/// The same with the least significant first.
pub(super) fn little_endian(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    Some(joined(bytes.get(at..at.checked_add(length)?)?.iter().rev()))
}

fn joined<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
