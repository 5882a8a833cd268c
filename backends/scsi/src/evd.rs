//! Disks as text: images, devices, and `evd://` for those that a provider serves.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use blockmount::{Disk, DiskKind};
use thiserror::Error;

/// How the text of a disk served by a provider starts.
const EVD: &str = "evd://";

/// Reads a disk from text, to be attached read-write.
///
/// | text | disk |
/// |---|---|
/// | `evd://type/path` | [`Disk::extensible`]: provider `type`, source `path`, which is all that follows the first slash |
/// | `/dev/...` but `/dev/shm/...`, or `\\.\PhysicalDrive1` in any case | [`Disk::physical_disk`] |
/// | anything else | [`Disk::virtual_disk`]: the path of an image, absolute or relative, not necessarily UTF-8 |
///
/// Only the text is looked at. The image of a disk with a name such as `x://y` has to be given
/// as `./x://y`.
///
/// ```
/// use blockmount::Disk;
/// use blockmount_scsi::parse_disk;
///
/// assert_eq!(parse_disk("/images/base.vhdx")?, Disk::virtual_disk("/images/base.vhdx"));
/// assert_eq!(parse_disk("/dev/sdb")?, Disk::physical_disk("/dev/sdb"));
/// assert_eq!(parse_disk("evd://cas/a/b")?, Disk::extensible("cas", "a/b"));
/// # Ok::<(), blockmount_scsi::InvalidDisk>(())
/// ```
///
/// # Errors
///
/// [`InvalidDisk`] if the text is empty or has a NUL in it, if it has a scheme other than `evd`, or
/// if it is an `evd` without a provider, without a path, or with backslashes for slashes.
pub fn parse_disk(text: impl AsRef<OsStr>) -> Result<Disk, InvalidDisk> {
    let text = text.as_ref();
    match reason_against(text) {
        Some(reason) => Err(invalid(text, reason)),
        None if starts_with_evd(text) => parse_evd(text),
        None if is_device(text) => Ok(Disk::physical_disk(text)),
        None => Ok(Disk::virtual_disk(text)),
    }
}

/// Writes a disk the way [`parse_disk`] reads it. The access is not part of the text.
///
/// # Errors
///
/// [`InvalidDisk`] if reading the text would not give the same disk: a provider with a slash in
/// its name, an image below `/dev`.
pub fn format_disk(disk: &Disk) -> Result<OsString, InvalidDisk> {
    let mut text = OsString::new();
    if let DiskKind::Extensible { provider } = disk.kind() {
        text.push(format!("{EVD}{provider}/"));
    }
    text.push(disk.source());
    match parse_disk(&text) {
        Ok(read) if read.kind() == disk.kind() && read.source() == disk.source() => Ok(text),
        Ok(_) => Err(invalid(&text, "it would be read as another disk")),
        Err(error) => Err(error),
    }
}

/// Why a text does not name a disk.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} does not name a disk: {reason}")]
pub struct InvalidDisk {
    text: String,
    reason: &'static str,
}

fn invalid(text: &OsStr, reason: &'static str) -> InvalidDisk {
    // Enough to recognise it; the text may be long and hostile.
    InvalidDisk {
        text: text.to_string_lossy().chars().take(128).collect(),
        reason,
    }
}

/// What is wrong with a text of whatever kind.
fn reason_against(text: &OsStr) -> Option<&'static str> {
    let bytes = text.as_encoded_bytes();
    if bytes.is_empty() {
        return Some("it is empty");
    }
    if bytes.contains(&0) {
        return Some("it has a NUL character in it");
    }
    let head = &bytes[..bytes.len().min(EVD.len())];
    if head.eq_ignore_ascii_case(br"evd:\\") {
        return Some("write evd://type/path with slashes, not backslashes");
    }
    (has_scheme(bytes) && !starts_with_evd(text)).then_some(
        "the only scheme is evd (evd://type/path); write ./ before a path with :// in it",
    )
}

/// Whether it starts with a lower-case or upper-case word and `://`.
fn has_scheme(bytes: &[u8]) -> bool {
    let is_letter = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
    let word = bytes.iter().take_while(|byte| is_letter(byte)).count();
    word > 0 && bytes[0].is_ascii_alphabetic() && bytes[word..].starts_with(b"://")
}

fn starts_with_evd(text: &OsStr) -> bool {
    text.as_encoded_bytes().starts_with(EVD.as_bytes())
}

fn parse_evd(text: &OsStr) -> Result<Disk, InvalidDisk> {
    let fail = |reason| Err(invalid(text, reason));
    let Some(rest) = text.to_str().and_then(|text| text.strip_prefix(EVD)) else {
        return fail("what a provider serves has a name in UTF-8");
    };
    let (provider, source) = rest.split_once('/').unwrap_or((rest, ""));
    if provider.contains('\\') {
        return fail("write evd://type/path with slashes, not backslashes");
    }
    if provider.is_empty() {
        return fail("it has no type; write evd://type/path");
    }
    if source.is_empty() {
        return fail("it has no path; write evd://type/path");
    }
    Ok(Disk::extensible(provider, source))
}

/// A device of the host, by the look of its name on Linux or on Windows.
fn is_device(text: &OsStr) -> bool {
    let path = Path::new(text);
    let on_linux =
        path.starts_with("/dev") && path != Path::new("/dev") && !path.starts_with("/dev/shm");
    on_linux || is_physical_drive(text.as_encoded_bytes())
}

fn is_physical_drive(bytes: &[u8]) -> bool {
    const PREFIX: &[u8] = br"\\.\physicaldrive";
    bytes
        .split_at_checked(PREFIX.len())
        .is_some_and(|(prefix, number)| {
            let is_number = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
            prefix.eq_ignore_ascii_case(PREFIX) && is_number
        })
}
