//! The bytes of a journal.

use blockmount::BackendError;
use blockmount::journal::{Record, RecordKey};
use crc::{CRC_32_ISCSI, Crc, Table};
use serde::{Deserialize, Serialize};

const CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// How a file begins; the number is the version of the format.
pub(crate) const MAGIC: &[u8] = b"blockmount journal 1\n";

/// Length, checksum of the length, checksum of the text.
const HEADER: usize = 12;

/// One change of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Change {
    Put(Record),
    Remove(RecordKey),
}

/// What a file has.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) changes: Vec<Change>,
    /// How many bytes are whole; what follows is the beginning of a change that was cut off.
    pub(crate) whole: usize,
}

/// Appends a change to `bytes`.
pub(crate) fn write<T: Serialize>(change: &T, bytes: &mut Vec<u8>) -> Result<(), BackendError> {
    let start = bytes.len();
    bytes.resize(start + HEADER, 0);
    serde_json::to_writer(&mut *bytes, change).map_err(|error| {
        BackendError::invalid("a record cannot be written as JSON").with_source(error)
    })?;
    let text = start + HEADER;
    let length = u32::try_from(bytes.len() - text)
        .map_err(|_| BackendError::invalid("a record is longer than 4 GiB"))?;
    let length = length.to_le_bytes();
    let checksums = [CRC.checksum(&length), CRC.checksum(&bytes[text..])];
    bytes[start..start + 4].copy_from_slice(&length);
    bytes[start + 4..start + 8].copy_from_slice(&checksums[0].to_le_bytes());
    bytes[start + 8..text].copy_from_slice(&checksums[1].to_le_bytes());
    Ok(())
}

/// Reads all changes. An error if anything but the end of the last one is damaged.
pub(crate) fn read(bytes: &[u8]) -> Result<Read, BackendError> {
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        // The process was killed while it made the file.
        return match MAGIC.starts_with(bytes) || is_zero(bytes) {
            true => Ok(Read {
                changes: Vec::new(),
                whole: 0,
            }),
            false => Err(BackendError::invalid(
                "it does not begin as a journal of this version",
            )),
        };
    };
    let mut changes = Vec::new();
    while let Some(text) = next(&mut rest, bytes.len())? {
        let change = serde_json::from_slice(text).map_err(|error| {
            let at = bytes.len() - rest.len() - text.len();
            let said = format!("the record at byte {at} is none that this version knows");
            BackendError::invalid(said).with_source(error)
        })?;
        changes.push(change);
    }
    Ok(Read {
        changes,
        whole: bytes.len() - rest.len(),
    })
}

/// The text of the next change; none if the rest is not a whole one.
fn next<'b>(rest: &mut &'b [u8], total: usize) -> Result<Option<&'b [u8]>, BackendError> {
    let at = total - rest.len();
    let damaged = || BackendError::invalid(format!("it is damaged at byte {at}"));
    let Some((header, after)) = rest.split_at_checked(HEADER) else {
        return Ok(None);
    };
    let number = |from: usize| {
        let bytes = header[from..from + 4].try_into();
        u32::from_le_bytes(bytes.expect("four bytes are four bytes"))
    };
    if CRC.checksum(&header[..4]) != number(4) {
        return match is_zero(rest) {
            true => Ok(None),
            false => Err(damaged()),
        };
    }
    let length = usize::try_from(number(0)).map_err(|_| damaged())?;
    let Some((text, after)) = after.split_at_checked(length) else {
        return Ok(None);
    };
    if CRC.checksum(text) != number(8) {
        return match is_zero(text) && is_zero(after) {
            true => Ok(None),
            false => Err(damaged()),
        };
    }
    *rest = after;
    Ok(Some(text))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
