//! Device nodes: finding and opening them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt as _, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use blockmount::BackendError;
use rustix::fs::{Advice, OFlags};

use crate::device::number::DeviceNumber;
use crate::discover::uevent;
use crate::errno::{errno_error, is_absent};

/// Where a [probe](crate::filesystem::probe) looks last at the start of a device, in bytes: at the block at 64 KiB, for a btrfs.
const START: u64 = 68 << 10;

/// From where on it looks at the end of a device: the signature that is farthest from the end is that of the first kind of
/// Linux's RAID, in the last whole 64 KiB but one.
fn end_at(size: u64) -> u64 {
    const UNIT: u64 = 64 << 10;
    (size - size % UNIT).saturating_sub(UNIT)
}

/// Opens a device for reading, or answers `None` while it is not ready: there is no node, or the
/// node has no device or medium behind it. Blocks.
///
/// # Errors
///
/// `Invalid` if the path is something else than a block device; others as they come.
pub fn open(path: &Path) -> Result<Option<File>, BackendError> {
    let opened = open_numbered(path)?;
    Ok(opened.map(|(device, _)| device))
}

/// The same, with the number of the device.
pub(crate) fn open_numbered(path: &Path) -> Result<Option<(File, DeviceNumber)>, BackendError> {
    // Without waiting for a medium, and never as somebody's terminal.
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(file) => match file.metadata() {
            Ok(meta) if meta.file_type().is_block_device() => {
                Ok(Some((file, DeviceNumber::from_rdev(meta.rdev()))))
            }
            Ok(_) => Err(BackendError::invalid(format!(
                "{} is not a block device",
                path.display()
            ))),
            Err(error) => Err(errno_error(
                format!("cannot look at device {}", path.display()),
                error,
            )),
        },
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(errno_error(
            format!("cannot open device {}", path.display()),
            error,
        )),
    }
}

/// A device that is open, with what a layer of a device stack asks of the one below it.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) open: File,
    pub(crate) number: DeviceNumber,
    /// In bytes.
    pub(crate) size: u64,
    /// The smallest unit that it reads and writes, in bytes.
    pub(crate) block_size: u32,
}

/// Opens a device that was there, and asks for its number and its sizes. Blocks.
///
/// # Errors
///
/// `NotFound` if it is not there any more; otherwise as for [`open`].
pub(crate) fn measure(path: &Path) -> Result<Measured, BackendError> {
    let vanished = || BackendError::not_found(format!("device {} has vanished", path.display()));
    let open = open(path)?.ok_or_else(vanished)?;
    let trouble = |error| {
        errno_error(
            format!("cannot ask device {} for its size", path.display()),
            error,
        )
    };
    Ok(Measured {
        number: DeviceNumber::of(&open)?,
        size: size(&open).map_err(trouble)?,
        block_size: logical_block_size(&open).map_err(trouble)?,
        open,
    })
}

/// Reads an open device by position, whatever others do with the same handle.
#[derive(Debug)]
pub(crate) struct ReadAt<'a> {
    device: &'a File,
    at: u64,
    /// Once it was asked for.
    size: Option<u64>,
}

impl<'a> ReadAt<'a> {
    pub(crate) fn new(device: &'a File) -> Self {
        ReadAt {
            device,
            at: 0,
            size: None,
        }
    }

    fn size(&mut self) -> io::Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(*self.size.insert(size(self.device)?)),
        }
    }

    /// Has the kernel read at once what a probe looks at, at the start and at the end of the device: one after the other, each
    /// would be a wait of its own.
    pub(crate) fn read_ahead(&mut self) {
        let last = end_at(self.size().unwrap_or_default());
        for (from, length) in [(0, NonZeroU64::new(START)), (last, None)] {
            // It is advice: without it, reading is only slower.
            let _ = rustix::fs::fadvise(self.device, from, length, Advice::WillNeed);
        }
    }
}

impl Read for ReadAt<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.device.read_at(buffer, self.at)?;
        self.at += length as u64;
        Ok(length)
    }
}

impl Seek for ReadAt<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let beyond = || io::Error::from(io::ErrorKind::InvalidInput);
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size()?.checked_add_signed(by),
        };
        self.at = at.ok_or_else(beyond)?;
        Ok(self.at)
    }
}

/// Waits until a device can be opened, and opens it for reading.
///
/// # Errors
///
/// `NotFound` if it cannot be opened before the deadline; otherwise as for [`open`].
pub async fn await_open(path: &Path, deadline: Instant) -> Result<File, BackendError> {
    let wanted = path.to_owned();
    let found = uevent::wait_until(deadline, move || open(&wanted)).await?;
    found.ok_or_else(|| {
        BackendError::not_found(format!(
            "device {} did not become ready in time",
            path.display()
        ))
    })
}

/// The size of a device in bytes. Blocks.
///
/// # Errors
///
/// The system's.
pub fn size(device: &File) -> io::Result<u64> {
    (&*device).seek(SeekFrom::End(0))
}

/// The smallest unit that a device reads and writes, in bytes. Blocks.
///
/// # Errors
///
/// The system's.
pub fn logical_block_size(device: &File) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(device)?)
}

/// The node of a disk as the kernel names it; nothing if there is no such disk. Blocks.
pub(crate) fn of(disk: DeviceNumber) -> Option<PathBuf> {
    node_named_in(&fs::read(disk.sysfs().join("uevent")).ok()?)
}

/// The node of a device by the `uevent` attribute of its directory in sysfs. A name that would
/// lead out of `/dev` is none.
pub(crate) fn node_named_in(uevent: &[u8]) -> Option<PathBuf> {
    let name = Path::new(std::ffi::OsStr::from_bytes(field(uevent, b"DEVNAME=")?));
    let is_below = |part| matches!(part, Component::Normal(_));
    let is_name = name.components().next().is_some() && name.components().all(is_below);
    is_name.then(|| Path::new("/dev").join(name))
}

/// What the `uevent` attribute of a device says after a key with its equals sign.
pub(crate) fn field<'a>(uevent: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let mut lines = uevent.split(|byte| *byte == b'\n');
    lines.find_map(|line| line.strip_prefix(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_handle_is_read_at_two_places() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"0123456789").unwrap();
        let (mut one, mut other) = (ReadAt::new(&file), ReadAt::new(&file));
        let read = |from: &mut ReadAt<'_>| {
            let mut two = [0; 2];
            from.read_exact(&mut two).unwrap();
            two
        };
        one.seek(SeekFrom::Start(4)).unwrap();
        assert_eq!((read(&mut one), read(&mut other)), (*b"45", *b"01"));
        assert_eq!(other.seek(SeekFrom::End(-3)).unwrap(), 7);
        assert_eq!(one.seek(SeekFrom::Current(1)).unwrap(), 7);
        assert_eq!((read(&mut one), read(&mut other)), (*b"78", *b"78"));
        assert!(one.seek(SeekFrom::Current(-100)).is_err());
    }

    #[test]
    fn the_end_of_a_device_has_the_signature_that_is_farthest_from_it() {
        for (size, at) in [
            (0, 0),
            (512, 0),
            (65_536, 0),
            (65_537, 0),
            (131_072, 65_536),
        ] {
            assert_eq!(end_at(size), at, "{size}");
        }
        assert_eq!(end_at(204_800), 131_072);
        assert_eq!(end_at(4 << 20), (4 << 20) - 65_536);
    }

    #[test]
    fn g15_a_device_without_a_node_has_no_path_and_no_empty_one() {
        for uevent in [
            &b""[..],
            b"MAJOR=253\n",
            b"DEVNAME=\n",
            b"DEVNAME=/\n",
            b"DEVNAME=.\n",
            b"DEVNAME=../etc/passwd\n",
            b"DEVNAME=/etc/passwd\n",
        ] {
            let text = String::from_utf8_lossy(uevent);
            assert_eq!(node_named_in(uevent), None, "{text}");
        }
        let named = node_named_in(b"MAJOR=253\nDEVNAME=mapper/x\n");
        assert_eq!(named.unwrap(), Path::new("/dev/mapper/x"));
        let no_device = DeviceNumber { major: 0, minor: 0 };
        assert_eq!(of(no_device), None);
    }
}
