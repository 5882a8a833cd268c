//! Keys that only the kernel has.
#![allow(
    unsafe_code,
    reason = "the calls of the kernel's keyring, and one of its random numbers, have no safe wrapper"
)]

use std::ffi::{CString, c_long};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::time::SystemTime;

use blockmount::BackendError;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::errno::errno_error;

/// Two keys of AES-256, in bytes.
const LENGTH: usize = 64;
/// A key that no program can read, not even the one that has added it.
const KIND: &str = "logon";
/// The keyring of the thread, where the kernel looks first, and others do not look at all.
const THREAD_KEYRING: c_long = -1;
/// `KEYCTL_INVALIDATE`: Linux 3.5.
const INVALIDATE: c_long = 21;
/// `_IO('R', 7)`: have the random numbers begin anew, with what the processor gives.
const RESEED: libc::Ioctl = 0x5207;

/// A random key in the keyring of this thread, which no other thread can find.
#[derive(Debug)]
pub(super) struct Ephemeral {
    id: c_long,
    description: String,
}

impl Ephemeral {
    /// Makes a key. It can be found by this thread only.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this kernel keeps no keys.
    pub(super) fn new(name: &str) -> Result<Self, BackendError> {
        let what = "cannot make a key for an encrypted device";
        renew_randomness();
        let mut key = [0; LENGTH];
        let mut filled = 0;
        while filled < LENGTH {
            filled += getrandom(&mut key[filled..], GetRandomFlags::empty())
                .map_err(|errno| errno_error(what, errno))?;
        }
        let description = format!("blockmount:{name}");
        let added = add(&description, &key);
        key.fill(0);
        // What nobody reads any more is written all the same.
        std::hint::black_box(&key);
        let id = added.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSYS) => {
                let message = format!("{what}: this kernel keeps no keys (CONFIG_KEYS)");
                BackendError::unsuitable(message).with_source(error)
            }
            _ => errno_error(what, error),
        })?;
        Ok(Ephemeral { id, description })
    }

    /// Has the keyring forget the key: dm-crypt has a copy of its own.
    pub(super) fn forget(self) {
        // SAFETY: the call takes numbers only.
        let forgotten = unsafe { libc::syscall(libc::SYS_keyctl, INVALIDATE, self.id) };
        if forgotten != 0 {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, "a key stays in the keyring of a thread until that ends");
        }
    }

    /// What stands for the key in a table.
    pub(super) fn reference(&self) -> String {
        format!(":{LENGTH}:{KIND}:{}", self.description)
    }
}

/// Adds a key to the keyring of this thread.
fn add(description: &str, key: &[u8]) -> io::Result<c_long> {
    let description = CString::new(description)?;
    let kind = CString::new(KIND)?;
    // SAFETY: the strings end with a NUL, the key has as many bytes as are given, and all outlive the call, which keeps
    // none of them.
    let id = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            description.as_ptr(),
            key.as_ptr(),
            key.len(),
            THREAD_KEYRING,
        )
    };
    match id {
        -1 => Err(io::Error::last_os_error()),
        id => Ok(id),
    }
}

/// Has the kernel's random numbers begin anew: guests that were restored from one saved state would all have the same
/// ones, and so the same keys, until the kernel does so by itself. Without the right to do it they are as good as they are.
fn renew_randomness() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_name_only_and_forgotten() {
        let key = match Ephemeral::new("test") {
            Ok(key) => key,
            // Containers may have no keyring.
            Err(error) => return assert!(!error.message().is_empty()),
        };
        assert_eq!(key.reference(), ":64:logon:blockmount:test");
        assert!(!format!("{key:?}").contains("[")); // no bytes of it
        let id = key.id;
        key.forget();
        // SAFETY: the call takes numbers only.
        let again = unsafe { libc::syscall(libc::SYS_keyctl, INVALIDATE, id) };
        assert_eq!(again, -1);
    }
}
