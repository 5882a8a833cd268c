//! What has no safe wrapper yet.
#![allow(
    unsafe_code,
    reason = "system calls without a wrapper, and one constructor that is unsafe"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use blockmount::{Propagation, PropagationMode};
use rustix::io::Errno;
use rustix::ioctl;
use tokio::io::unix::AsyncFd;

/// A change of the attributes of a mount.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AttributeChange<'a> {
    /// Bits of `MOUNT_ATTR_*`.
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: Option<PropagationMode>,
    /// For `MOUNT_ATTR_IDMAP`.
    pub(crate) user_namespace: Option<BorrowedFd<'a>>,
}

/// Changes the attributes of the mount that `mount` is the root of.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.12.
pub(crate) fn set_attributes(mount: impl AsFd, change: AttributeChange<'_>) -> Result<(), Errno> {
    let fd = |namespace: BorrowedFd<'_>| namespace.as_raw_fd().unsigned_abs().into();
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation.map_or(0, kernel_propagation),
        userns_fd: change.user_namespace.map_or(0, fd),
    };
    mount_setattr(mount, &attributes, 0)
}

/// Sets how mounts spread, on the mount that `mount` is the root of.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.12.
pub(crate) fn set_propagation(mount: impl AsFd, propagation: Propagation) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: kernel_propagation(propagation.mode),
        userns_fd: 0,
    };
    let recursive = if propagation.recursive {
        libc::AT_RECURSIVE
    } else {
        0
    };
    mount_setattr(mount, &attributes, recursive)
}

fn kernel_propagation(mode: PropagationMode) -> u64 {
    match mode {
        PropagationMode::Private => libc::MS_PRIVATE,
        PropagationMode::Shared => libc::MS_SHARED,
        PropagationMode::Slave => libc::MS_SLAVE,
        PropagationMode::Unbindable => libc::MS_UNBINDABLE,
    }
}

fn mount_setattr(
    mount: impl AsFd,
    attributes: &libc::mount_attr,
    flags: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: the path is a NUL-terminated string, the attributes are a `struct mount_attr` of the
    // size that is given, and both outlive the call, which keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            attributes as *const libc::mount_attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

/// `struct mnt_id_req` of `linux/mount.h`, as of its first version.
#[repr(C)]
struct MountRequest {
    size: u32,
    spare: u32,
    mount: u64,
    wanted: u64,
}

/// `struct statmount` of `linux/mount.h`, up to what is asked for.
#[repr(C)]
#[derive(Default)]
struct MountStatus {
    size: u32,
    spare: u32,
    mask: u64,
    device: [u32; 2],
    magic: u64,
    flags: u32,
    kind: u32,
    unique: u64,
    unique_parent: u64,
    number: u32,
    parent: u32,
    /// The kernel fills the rest of its structure too, 512 bytes in all at first.
    rest: [[u64; 32]; 2],
}

/// The same on all architectures (`asm-generic/unistd.h`).
const SYS_STATMOUNT: libc::c_long = 457;
const STATMOUNT_MNT_BASIC: u64 = 2;

/// The numbers in `mountinfo` of a mount, and of the mount that it is on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MountNumbers {
    pub(crate) own: u64,
    pub(crate) parent: u64,
}

/// The numbers of a mount in this namespace, which is given by its unique id.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.8.
pub(crate) fn numbers_of_mount(unique: u64) -> Result<MountNumbers, Errno> {
    let request = MountRequest {
        size: size_of::<MountRequest>() as u32,
        spare: 0,
        mount: unique,
        wanted: STATMOUNT_MNT_BASIC,
    };
    let mut status = MountStatus::default();
    // SAFETY: the request is a `struct mnt_id_req` of the size that it says, the answer is written to a structure of the
    // size that is given, all of whose bytes may have any value, and both outlive the call, which keeps neither.
    let result = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            &raw const request,
            &raw mut status,
            size_of::<MountStatus>(),
            0,
        )
    };
    match result {
        0 if status.mask & STATMOUNT_MNT_BASIC != 0 => Ok(MountNumbers {
            own: status.number.into(),
            parent: status.parent.into(),
        }),
        0 => Err(Errno::NOSYS),
        _ => Err(last_error()),
    }
}

fn last_error() -> Errno {
    let error = io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// A process in a user namespace of its own, which does nothing and ends with this value, or with the thread that has made it.
#[derive(Debug)]
pub(crate) struct WaitingProcess(libc::pid_t);

impl WaitingProcess {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// `EPERM` if this process may not, `EINVAL`, `ENOSPC` or `ENOSYS` if there are no user namespaces.
    pub(crate) fn in_user_namespace() -> Result<Self, Errno> {
        let parent = libc::c_long::from(std::process::id());
        // It shares the table of descriptors: copies would keep in use what is closed here meanwhile. No signal at its end:
        // whoever waits for all children of this process does not take it away.
        let flags = (libc::CLONE_NEWUSER | libc::CLONE_FILES) as libc::c_ulong;
        // SAFETY: the new process has memory of its own, as after a fork. It makes system calls without memory or descriptors,
        // and runs no other code of this program: what the lock of another thread protects is not touched.
        let id = unsafe {
            let id = libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize);
            if id == 0 {
                let (on_death, signal) = (libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::syscall(libc::SYS_prctl, on_death, signal, 0usize, 0usize, 0usize);
                // Otherwise it has ended before that.
                while libc::syscall(libc::SYS_getppid) == parent {
                    libc::syscall(libc::SYS_ppoll, 0usize, 0usize, 0usize, 0usize, 0usize);
                }
                libc::syscall(libc::SYS_exit_group, 0);
                std::hint::unreachable_unchecked();
            }
            id
        };
        let id = libc::pid_t::try_from(id).map_err(|_| Errno::OVERFLOW)?;
        match id {
            -1 => Err(last_error()),
            id => Ok(WaitingProcess(id)),
        }
    }

    pub(crate) fn id(&self) -> libc::pid_t {
        self.0
    }
}

impl Drop for WaitingProcess {
    fn drop(&mut self) {
        // SAFETY: the process is a child that nobody has waited for, so the number is its own; a null status is allowed.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// Watches a descriptor for something to read. Must be called in a runtime that has I/O enabled.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same number as long as it lives, and is not closed before.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Of the kernel's disks, how many came before this one.
///
/// # Errors
///
/// `ENOTTY` or `EINVAL` before Linux 5.15.
pub(crate) fn disk_sequence(disk: impl AsFd) -> Result<u64, Errno> {
    /// `BLKGETDISKSEQ` of `linux/fs.h`: `_IOR(0x12, 128, __u64)`.
    const GET_DISK_SEQUENCE: ioctl::Opcode = ioctl::opcode::read::<u64>(0x12, 128);
    // SAFETY: this call writes one number of 64 bits.
    unsafe { ioctl::ioctl(disk, ioctl::Getter::<GET_DISK_SEQUENCE, u64>::new()) }
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
