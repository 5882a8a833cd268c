//! Devices by their place in sysfs: by identity, and never by the name that they happen to have.
//!
//! Resolvers look here for what a hypervisor has told them: a PCI address, a VMBus channel. All of it is
//! read as it is now; who waits for something reads again at each event of the kernel
//! ([`uevent::wait_for`](crate::discover::uevent::wait_for)).

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use blockmount::{BackendError, DeviceLocator, blocking};
use rustix::buffer::spare_capacity;
use rustix::fs::OFlags;
use rustix::io::{Errno, retry_on_intr};

use crate::errno::{errno_error, is_absent};

mod disk;
mod id;

pub use disk::Disk;
pub use id::VmbusId;

/// One page is the longest that an attribute of text can be, in bytes. (Source: Linux,
/// Documentation/filesystems/sysfs.rst)
const LONGEST_ATTRIBUTE: usize = 4096;

/// The names in a directory, sorted; none if it is not there. Names that are no text are left out:
/// the kernel gives none to the devices that are looked for. Blocks.
///
/// # Errors
///
/// The system's.
pub fn names(directory: &Path) -> Result<Vec<String>, BackendError> {
    let trouble = |error| errno_error(format!("cannot list {}", directory.display()), error);
    let entries = match fs::read_dir(directory) {
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        entries => entries.map_err(trouble)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => names.extend(entry.file_name().into_string()),
            Err(error) if is_absent(&error) => break,
            Err(error) => return Err(trouble(error)),
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The entries of a directory with names such as `host3`: a prefix, and a decimal number as the kernel
/// writes it. Sorted by name. Blocks.
///
/// # Errors
///
/// The system's.
pub fn numbered(directory: &Path, prefix: &str) -> Result<Vec<(PathBuf, u32)>, BackendError> {
    let numbered = |name: String| {
        let number = DeviceLocator::number(name.strip_prefix(prefix)?)?;
        Some((directory.join(&name), number.try_into().ok()?))
    };
    Ok(names(directory)?.into_iter().filter_map(numbered).collect())
}

/// The bytes of an attribute of a device; nothing if the device or the attribute is not there. Blocks.
///
/// # Errors
///
/// The system's.
pub fn bytes(directory: &Path, name: &str) -> Result<Option<Vec<u8>>, BackendError> {
    let path = directory.join(name);
    match read(&path) {
        Ok(content) => Ok(Some(content)),
        // Some attributes are there for all devices, and not to be read for those that lack it.
        Err(error) if is_absent(&error) || Errno::from_io_error(&error) == Some(Errno::INVAL) => {
            Ok(None)
        }
        Err(error) => Err(errno_error(
            format!("cannot read {}", path.display()),
            error,
        )),
    }
}

/// The kernel makes the text of an attribute once, and one read gets all of it.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let mut content = Vec::with_capacity(LONGEST_ATTRIBUTE);
    retry_on_intr(|| rustix::io::read(&file, spare_capacity(&mut content)))?;
    Ok(content)
}

/// An attribute that is text, without the blanks around it; nothing if the device or the attribute is
/// not there, or is no text. Blocks.
///
/// # Errors
///
/// The system's.
pub fn text(directory: &Path, name: &str) -> Result<Option<String>, BackendError> {
    let content = bytes(directory, name)?;
    let text = content.and_then(|content| String::from_utf8(content).ok());
    Ok(text.map(|text| text.trim().to_owned()))
}

/// Reads a number as attributes have it: decimal, or hexadecimal after `0x`.
pub fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_plain
        .then(|| u64::from_str_radix(digits, radix).ok())
        .flatten()
}

/// An attribute that is a number; nothing if the device or the attribute is not there, or is no number. Blocks.
pub(crate) fn attribute(directory: &Path, name: &str) -> Result<Option<u64>, BackendError> {
    Ok(text(directory, name)?.and_then(|text| number(&text)))
}

/// Writes to an attribute, which is a command to the kernel. False if the device or the attribute is
/// not there; it is never made. Blocks for as long as the command takes.
///
/// # Errors
///
/// The system's.
pub fn command(directory: &Path, name: &str, value: &str) -> Result<bool, BackendError> {
    let path = directory.join(name);
    let file = fs::OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::CLOEXEC.bits() as i32)
        .open(&path);
    // One write: the kernel takes each for a command of its own.
    let written = file.and_then(|file| Ok(rustix::io::write(&file, value.as_bytes())?));
    match written {
        Ok(length) if length == value.len() => Ok(true),
        Ok(_) => Err(BackendError::other(format!(
            "{} took only a part of {value:?}",
            path.display()
        ))),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(errno_error(
            format!("cannot write {value:?} to {}", path.display()),
            error,
        )),
    }
}

/// The same where it may block, and with an end: what the kernel has not done by the deadline may be
/// done later. `held` is dropped when it is done.
///
/// # Errors
///
/// As for [`command`]; `Uncertain` at the deadline.
pub async fn command_by<H: Send + 'static>(
    deadline: Instant,
    directory: &Path,
    name: &'static str,
    value: String,
    held: H,
) -> Result<bool, BackendError> {
    let late = BackendError::uncertain(format!(
        "the kernel has not answered in time to {value:?} in {}",
        directory.join(name).display()
    ));
    let directory = directory.to_owned();
    let work = blocking(move || {
        let done = command(&directory, name, &value);
        drop(held);
        done
    });
    match tokio::time::timeout_at(deadline.into(), work).await {
        Ok(done) => done,
        Err(_elapsed) => Err(late),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_numbers_as_the_kernel_writes_them_count() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "host0", "host12", "host", "host01", "host-1", "hostx", "ghost3",
        ] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let found = numbered(dir.path(), "host").unwrap();
        let found: Vec<u32> = found.into_iter().map(|(_, number)| number).collect();
        assert_eq!(found, [0, 12]);
        assert_eq!(numbered(&dir.path().join("gone"), "host").unwrap(), []);
    }

    #[test]
    fn attributes_are_trimmed_bounded_and_may_be_absent() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state"), "running\n").unwrap();
        fs::write(dir.path().join("bytes"), [0xff, b'\n']).unwrap();
        fs::write(dir.path().join("long"), vec![b'x'; 10_000]).unwrap();
        assert_eq!(text(dir.path(), "state").unwrap().unwrap(), "running");
        assert_eq!(text(dir.path(), "bytes").unwrap(), None);
        assert_eq!(text(dir.path(), "long").unwrap().unwrap().len(), 4096);
        assert_eq!(bytes(dir.path(), "gone").unwrap(), None);
        assert_eq!(bytes(&dir.path().join("state"), "x").unwrap(), None);
    }

    #[test]
    fn a_command_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!command(dir.path(), "delete", "1").unwrap());
        assert!(!dir.path().join("delete").exists());
        fs::write(dir.path().join("delete"), "").unwrap();
        assert!(command(dir.path(), "delete", "1").unwrap());
        assert_eq!(fs::read(dir.path().join("delete")).unwrap(), b"1");
    }

    proptest! {
        #[test]
        fn numbers_round_trip_and_nothing_panics(value: u64, text in ".{0,40}") {
            prop_assert_eq!(number(&format!("{value:#x}")), Some(value));
            prop_assert_eq!(number(&value.to_string()), Some(value));
            let _ = number(&text);
        }
    }
}
