//! What has no safe wrapper yet.
#![allow(
    unsafe_code,
    reason = "two system calls without a wrapper, and one constructor that is unsafe"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use blockmount::{Propagation, PropagationMode};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// Sets how mounts spread, on the mount that `mount` is the root of.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.12.
pub(crate) fn set_propagation(mount: impl AsFd, propagation: Propagation) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: match propagation.mode {
            PropagationMode::Private => libc::MS_PRIVATE,
            PropagationMode::Shared => libc::MS_SHARED,
            PropagationMode::Slave => libc::MS_SLAVE,
            PropagationMode::Unbindable => libc::MS_UNBINDABLE,
        },
        userns_fd: 0,
    };
    let recursive = if propagation.recursive {
        libc::AT_RECURSIVE
    } else {
        0
    };
    // SAFETY: the path is a NUL-terminated string, the attributes are a `struct mount_attr` of the
    // size that is given, and both outlive the call, which keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

fn last_error() -> Errno {
    let error = io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Watches a descriptor for something to read. Must be called in a runtime that has I/O enabled.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same number as long as it lives, and is not closed before.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// `struct blkpg_partition` of `linux/blkpg.h`.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: i32,
    /// The kernel ignores the names.
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg` of `linux/blkpg.h`.
#[repr(C)]
struct BlkpgArgument {
    operation: i32,
    flags: i32,
    length: i32,
    data: *mut BlkpgPartition,
}

const BLKPG: u32 = 0x1269;
const ADD_PARTITION: i32 = 1;
const DELETE_PARTITION: i32 = 2;

/// Makes the kernel know a partition, by its start and length in bytes.
pub(crate) fn add_partition(
    disk: impl AsFd,
    number: u32,
    start: u64,
    length: u64,
) -> Result<(), Errno> {
    blkpg(disk, ADD_PARTITION, number, start, length)
}

/// Makes the kernel forget a partition; `EBUSY` while it is in use.
pub(crate) fn delete_partition(disk: impl AsFd, number: u32) -> Result<(), Errno> {
    blkpg(disk, DELETE_PARTITION, number, 0, 0)
}

fn blkpg(
    disk: impl AsFd,
    operation: i32,
    number: u32,
    start: u64,
    length: u64,
) -> Result<(), Errno> {
    let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::OVERFLOW);
    let (start, length) = (signed(start)?, signed(length)?);
    let number = i32::try_from(number).map_err(|_| Errno::OVERFLOW)?;
    let mut partition = BlkpgPartition {
        start,
        length,
        number,
        names: [0; 128],
    };
    let length = size_of::<BlkpgPartition>() as i32;
    let argument = BlkpgArgument {
        operation,
        flags: 0,
        length,
        data: &raw mut partition,
    };
    // SAFETY: the argument and what it points to have the layout of the kernel's header, are as
    // long as they say, and outlive the call, which keeps neither.
    let result = unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLKPG as _, &raw const argument) };
    if result == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}
