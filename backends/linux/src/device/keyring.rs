//! The calls of the kernel's keyring.
#![allow(
    unsafe_code,
    reason = "the calls of the kernel's keyring, and one of its random numbers, have no safe wrapper"
)]

use std::ffi::{CString, c_long};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::SystemTime;

/// A key that no program can read, not even the one that has added it.
pub(super) const LOGON: &str = "logon";
/// A key that programs of its owner can read.
pub(super) const USER_READABLE: &str = "user";
/// What is asked of keyctl(2), by the numbers of `linux/keyctl.h`: the last one is of Linux 3.5.
const SET_PERMISSIONS: c_long = 5;
const LINK: c_long = 8;
const UNLINK: c_long = 9;
const SEARCH: c_long = 10;
const READ: c_long = 11;
const INVALIDATE: c_long = 21;
/// `KEY_POS_ALL | KEY_USR_ALL`: also for a process of root that the keyring is not linked to. No program can read the key.
const EVERYTHING: c_long = 0x3f3f_0000;
/// `_IO('R', 7)`: have the random numbers begin anew, with what the processor gives.
const RESEED: libc::Ioctl = 0x5207;

/// A key or a keyring, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(c_long);

/// The keyring of the thread, where the kernel looks first, and others do not look at all.
const THREAD: Id = Id(-1);
/// The keyring of the user, root, which lives as long as the kernel.
pub(super) const USER: Id = Id(-4);

impl Id {
    /// As `/proc/keys` has it.
    pub(super) fn hexadecimal(self) -> String {
        format!("{:08x}", self.0)
    }

    /// Lets every process of this user find and link the key.
    pub(super) fn permit_user(self) -> io::Result<()> {
        keyctl([SET_PERMISSIONS, self.0, EVERYTHING])
    }

    /// Has the keyring of root keep the key.
    pub(super) fn keep(self) -> io::Result<()> {
        keyctl([LINK, self.0, USER.0])
    }

    /// Has the kernel find the key for this thread, or what is in the keyring.
    pub(super) fn link_to_thread(self) -> io::Result<()> {
        keyctl([LINK, self.0, THREAD.0])
    }

    pub(super) fn unlink_from_thread(self) -> io::Result<()> {
        keyctl([UNLINK, self.0, THREAD.0])
    }

    /// Reads a key into a buffer, and answers how long it is, which may be more.
    pub(super) fn read(self, buffer: &mut [u8]) -> io::Result<usize> {
        let (at, room) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the kernel writes at most as many bytes as there are in the buffer, which outlives the call.
        let answer = unsafe { libc::syscall(libc::SYS_keyctl, READ, self.0, at, room) };
        answered(answer).map(|Id(length)| usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// Has the kernel forget the key.
    pub(super) fn invalidate(self) -> io::Result<()> {
        keyctl([INVALIDATE, self.0, 0])
    }
}

fn keyctl([what, key, argument]: [c_long; 3]) -> io::Result<()> {
    // SAFETY: these calls take numbers only.
    answered(unsafe { libc::syscall(libc::SYS_keyctl, what, key, argument) }).map(drop)
}

fn answered(answer: c_long) -> io::Result<Id> {
    match answer {
        -1 => Err(io::Error::last_os_error()),
        id => Ok(Id(id)),
    }
}

/// Looks for a key of the type `logon` in the keyring of root.
pub(super) fn search(description: &str) -> io::Result<Id> {
    let (kind, description) = (CString::new(LOGON)?, CString::new(description)?);
    let (kind, description) = (kind.as_ptr(), description.as_ptr());
    // SAFETY: the strings end with a NUL and outlive the call, which keeps none of them.
    answered(unsafe { libc::syscall(libc::SYS_keyctl, SEARCH, USER.0, kind, description, 0) })
}

/// Looks for a key of a type as the kernel does for this thread.
pub(super) fn request(kind: &str, description: &str) -> io::Result<Id> {
    let (kind, description) = (CString::new(kind)?, CString::new(description)?);
    let (kind, description) = (kind.as_ptr(), description.as_ptr());
    let no_program = ptr::null::<libc::c_char>();
    // SAFETY: the strings end with a NUL and outlive the call, which keeps none of them; without the third, no program is
    // started to make the key.
    answered(unsafe { libc::syscall(libc::SYS_request_key, kind, description, no_program, 0) })
}

/// Adds a key of the type `logon` to the keyring of this thread.
pub(super) fn add_to_thread(description: &str, key: &[u8]) -> io::Result<Id> {
    let description = CString::new(description)?;
    let kind = CString::new(LOGON)?;
    // SAFETY: the strings end with a NUL, the key has as many bytes as are given, and all outlive the call, which keeps
    // none of them.
    answered(unsafe {
        libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            description.as_ptr(),
            key.as_ptr(),
            key.len(),
            THREAD.0,
        )
    })
}

/// Has the kernel's random numbers begin anew: guests that were restored from one saved state would all have the same
/// ones, and so the same keys, until the kernel does so by itself. Without the right to do it they are as good as they are.
pub(super) fn renew_randomness() {
    let Ok(mut random) = File::options().write(true).open("/dev/urandom") else {
        return;
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mixed = random.write_all(&now.unwrap_or_default().as_nanos().to_ne_bytes());
    // SAFETY: the request has no argument, and the descriptor is open.
    let renewed = unsafe { libc::ioctl(random.as_raw_fd(), RESEED) };
    if mixed.is_err() || renewed != 0 {
        tracing::debug!("the kernel's random numbers go on as they were");
    }
}
