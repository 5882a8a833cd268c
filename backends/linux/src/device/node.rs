//! Device nodes: finding and opening them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use blockmount::BackendError;
use rustix::fs::{Advice, OFlags};

use crate::device::number::DeviceNumber;
use crate::discover::uevent;
use crate::errno::{errno_error, is_absent};

/// Opens a device for reading, or answers `None` while it is not ready: there is no node, or the
/// node has no device or medium behind it. Blocks.
///
/// # Errors
///
/// `Invalid` if the path is something else than a block device; others as they come.
pub fn open(path: &Path) -> Result<Option<File>, BackendError> {
    // Without waiting for a medium, and never as somebody's terminal.
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(file) => match file.metadata() {
            Ok(meta) if meta.file_type().is_block_device() => Ok(Some(file)),
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

/// Has the kernel read at once what a probe looks at, and a mount after it: where filesystems and partition tables have
/// their signatures, at the start of a device and at its end. One after the other, each would be a wait of its own.
pub(crate) fn read_ahead(device: &File) {
    /// The last one at the start is that of btrfs, in the page at 64 KiB.
    const START: NonZeroU64 = NonZeroU64::new(68 << 10).expect("it is not zero");
    const END: u64 = 64 << 10;
    let last = size(device).unwrap_or_default().saturating_sub(END);
    for (from, length) in [(0, Some(START)), (last, None)] {
        // It is advice: without it, reading is only slower.
        let _ = rustix::fs::fadvise(device, from, length, Advice::WillNeed);
    }
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
    let mut lines = uevent.split(|byte| *byte == b'\n');
    let name = lines.find_map(|line| line.strip_prefix(b"DEVNAME="))?;
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    let is_below = |part| matches!(part, Component::Normal(_));
    let is_name = name.components().next().is_some() && name.components().all(is_below);
    is_name.then(|| Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

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
