//! What is done with a mount while it is there: asking how full it is, trimming it, growing it.

use std::fs::File;
use std::io;
use std::time::Instant;

use blockmount::{BackendError, ErrorKind, Space, Usage};
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatfs, fstatvfs, openat};
use rustix::io::Errno;

use crate::device::number::DeviceNumber;
use crate::discover::{sysfs, uevent};
use crate::errno::{errno_error, errno_of};
use crate::filesystem::ioctl;
use crate::kernel::Kernel;
use crate::mount::mounting::path_of;
use crate::mount::unmount::{Now, now};
use crate::undo::ledger::UndoList;
use crate::undo::step::{CryptStep, Undo};

/// The numbers of filesystems in statfs(2), of `linux/magic.h`.
const EXT: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const BTRFS: u64 = 0x9123_683e;

/// The smallest size in bytes that a device of a btrfs can be given. (`btrfs_ioctl_resize`)
const SMALLEST_BTRFS: u64 = 256 << 20;

/// What is at a target of ours.
#[derive(Debug)]
enum Volume {
    /// A filesystem, by its directory, and its device; an overlay has none.
    Mounted(File, Option<DeviceNumber>),
    /// The device itself.
    Exposed(DeviceNumber),
}

/// Finds what is at the target of a list. Blocks.
fn find(list: &UndoList<'_>, kernel: Kernel) -> Result<Volume, BackendError> {
    let path = list.target().path().display();
    let last = list.steps().pop().filter(|_| list.is_in_use());
    let step = match last {
        Some(Undo::Unmount(step)) => step,
        Some(Undo::RemoveNode(node)) => return Ok(Volume::Exposed(node.device.number)),
        _ => {
            let message = format!("nothing is mounted at {path}");
            return Err(BackendError::not_found(message));
        }
    };
    let Now::Ours(_, at) = now(list.target(), &step.mount, kernel)? else {
        let message = format!("what is at {path} now was mounted by somebody else");
        return Err(BackendError::conflict(message));
    };
    let trouble = |errno| errno_error(format!("cannot open the mount at {path}"), errno);
    let mount = at.open().map_err(trouble)?;
    // The one that was opened is only a place in the tree, of which nothing can be asked.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, path_of(&mount), flags, Mode::empty()).map_err(trouble)?;
    let device = step.device.map(|used| used.number);
    Ok(Volume::Mounted(directory.into(), device))
}

/// How full the filesystem at a target is. Blocks.
///
/// # Errors
///
/// `NotFound` if nothing of ours is mounted there.
pub(crate) fn usage(list: &UndoList<'_>, kernel: Kernel) -> Result<Usage, BackendError> {
    let path = list.target().path().display();
    let directory = match find(list, kernel)? {
        Volume::Mounted(directory, _) => directory,
        Volume::Exposed(device) => {
            let total = size(device)?;
            let bytes = Space {
                total,
                used: total,
                available: 0,
            };
            return Ok(Usage::new(bytes, Space::default()));
        }
    };
    let stat = fstatvfs(&directory)
        .map_err(|errno| errno_error(format!("cannot ask how full {path} is"), errno))?;
    let space = |all: u64, free: u64, available: u64, unit: u64| Space {
        total: all.saturating_mul(unit),
        used: all.saturating_sub(free).saturating_mul(unit),
        available: available.saturating_mul(unit),
    };
    let bytes = space(stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_frsize);
    let inodes = space(stat.f_files, stat.f_ffree, stat.f_favail, 1);
    Ok(Usage::new(bytes, inodes))
}

/// Trims the filesystem at a target. Blocks.
///
/// # Errors
///
/// `NotFound` if nothing of ours is mounted there; `Unsuitable` if the filesystem or its device cannot discard; `Invalid` if
/// it is mounted read-only.
pub(crate) fn trim(list: &UndoList<'_>, kernel: Kernel) -> Result<u64, BackendError> {
    let path = list.target().path().display();
    let what = format!("cannot trim {path}");
    let Volume::Mounted(directory, _) = find(list, kernel)? else {
        let message = format!("{what}: there is a device, and no filesystem");
        return Err(BackendError::unsuitable(message));
    };
    refuse_read_only(&what, &directory)?;
    ioctl::trim(&directory).map_err(|error| {
        let error = errno_error(&*what, error);
        match errno_of(&error) {
            Some(Errno::OPNOTSUPP | Errno::NOTTY) => {
                let message =
                    format!("{what}: the filesystem or the device below it cannot discard");
                BackendError::unsuitable(message).with_source(error)
            }
            _ => error,
        }
    })
}

fn refuse_read_only(what: &str, directory: &File) -> Result<(), BackendError> {
    let stat = fstatvfs(directory).map_err(|errno| errno_error(what, errno))?;
    match stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
        true => Err(BackendError::invalid(format!(
            "{what}: it is mounted read-only"
        ))),
        false => Ok(()),
    }
}

/// What there is to grow at a target.
#[derive(Debug)]
pub(crate) struct ToGrow {
    /// The device that has the size of its disk.
    pub(crate) disk: DeviceNumber,
    /// What is between that and the filesystem.
    pub(crate) crypt: Option<CryptStep>,
}

/// Finds out what there is to grow at a target. Blocks.
///
/// # Errors
///
/// `NotFound` if nothing of ours is there; `Unsuitable` if there is something in between that keeps its size; `Invalid` if it
/// is mounted read-only.
pub(crate) fn to_grow(list: &UndoList<'_>, kernel: Kernel) -> Result<ToGrow, BackendError> {
    let what = format!("cannot grow {}", list.target().path().display());
    let device = match find(list, kernel)? {
        Volume::Mounted(directory, Some(device)) => {
            refuse_read_only(&what, &directory)?;
            device
        }
        Volume::Exposed(device) => device,
        Volume::Mounted(_, None) => {
            let message = format!("{what}: an overlay is as large as its scratch");
            return Err(BackendError::unsuitable(message));
        }
    };
    let (mut crypt, mut in_between) = (None, None);
    for step in list.steps() {
        match step {
            Undo::RemoveRange(_) => in_between = Some("a byte range of its disk"),
            Undo::DeletePartition(_) => in_between = Some("a partition"),
            Undo::CloseIntegrity(_) => {
                in_between = Some("encrypted with integrity, whose size is fixed")
            }
            Undo::CloseVerity(_) => in_between = Some("data whose integrity is checked"),
            Undo::CloseCrypt(step) => crypt = Some(*step),
            Undo::Unmount(_) | Undo::RemoveNode(_) | Undo::RemoveDirectory(_) => {}
        }
    }
    let disk = crypt.as_ref().map_or(device, |step| step.backing);
    let is_partition = || disk.sysfs().join("partition").exists();
    match in_between.or_else(|| is_partition().then_some("a partition")) {
        Some(other) => Err(BackendError::unsuitable(format!("{what}: it is {other}"))),
        None => Ok(ToGrow { disk, crypt }),
    }
}

fn size(device: DeviceNumber) -> Result<u64, BackendError> {
    /// What sysfs counts in, in bytes.
    const SECTOR: u64 = 512;
    let sectors: Option<u64> = sysfs::attribute(&device.sysfs(), "size")?;
    let sectors =
        sectors.ok_or_else(|| BackendError::not_found(format!("block device {device} is gone")))?;
    Ok(sectors.saturating_mul(SECTOR))
}

/// Waits until the kernel has seen that a device has grown, and answers how large it is, in bytes.
///
/// # Errors
///
/// `NotFound` if it has not by the deadline.
pub(crate) async fn await_size(
    device: DeviceNumber,
    bytes: u64,
    deadline: Instant,
) -> Result<u64, BackendError> {
    let mut is_asked = false;
    let look = move || {
        let mut now = size(device)?;
        if now < bytes && !is_asked {
            // A disk of SCSI asks its host again; others have no such attribute, and tell by an event.
            let asked = std::fs::write(device.sysfs().join("device/rescan"), "1");
            is_asked = true;
            if asked.is_ok() {
                now = size(device)?;
            }
        }
        Ok((now >= bytes).then_some(now))
    };
    uevent::wait_until(deadline, look).await?.ok_or_else(|| {
        BackendError::not_found(format!(
            "the kernel has not seen block device {device} grow to {bytes} bytes in time"
        ))
    })
}

/// Grows the filesystem at a target to the size of its device. Blocks.
///
/// # Errors
///
/// `Unsuitable` if it cannot grow while it is mounted.
pub(crate) fn grow(list: &UndoList<'_>, kernel: Kernel) -> Result<(), BackendError> {
    let what = format!("cannot grow {}", list.target().path().display());
    let Volume::Mounted(directory, Some(device)) = find(list, kernel)? else {
        return Ok(());
    };
    let bytes = size(device)?;
    let stat = fstatfs(&directory).map_err(|errno| errno_error(&*what, errno))?;
    let block = u64::try_from(stat.f_bsize).unwrap_or_default();
    let filesystem = stat.f_type as u64 & 0xffff_ffff;
    let is_btrfs = filesystem == BTRFS;
    let grown = match filesystem {
        EXT => match bytes.checked_div(block) {
            Some(blocks) => ioctl::grow_ext4(&directory, blocks),
            None => Err(io::ErrorKind::InvalidData.into()),
        },
        XFS => ioctl::grow_xfs(&directory, bytes),
        BTRFS => ioctl::grow_btrfs(&directory, bytes, block),
        _ => Err(Errno::OPNOTSUPP.into()),
    };
    grown.map_err(|error| {
        let error = errno_error(&*what, error);
        match error.kind() {
            ErrorKind::Unsuitable => BackendError::unsuitable(format!(
                "{what}: this filesystem cannot grow while it is mounted"
            ))
            .with_source(error),
            _ if is_btrfs && bytes < SMALLEST_BTRFS => BackendError::unsuitable(format!(
                "{what}: Linux gives a btrfs no size below 256 MiB; grow the disk to more than that"
            ))
            .with_source(error),
            _ if errno_of(&error) == Some(Errno::PERM) => {
                let message = format!(
                    "{what}: the kernel lets only processes with the capability CAP_SYS_RESOURCE grow an ext4"
                );
                BackendError::new(error.kind(), message).with_source(error)
            }
            _ => error,
        }
    })
}
