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
/// The keyring of the user, root, which lives as long as the kernel.
const USER_KEYRING: c_long = -4;
/// What is asked of keyctl(2), by the numbers of `linux/keyctl.h`: the last one is of Linux 3.5.
const SET_PERMISSIONS: c_long = 5;
const LINK: c_long = 8;
const UNLINK: c_long = 9;
const SEARCH: c_long = 10;
const INVALIDATE: c_long = 21;
/// `KEY_POS_ALL | KEY_USR_ALL`: also for a process of root that the keyring is not linked to. No program can read the key.
const EVERYTHING: c_long = 0x3f3f_0000;
/// `_IO('R', 7)`: have the random numbers begin anew, with what the processor gives.
const RESEED: libc::Ioctl = 0x5207;

/// A random key. As long as this is there, the kernel finds it for this thread; the keyring of root has it as long as its
/// device is there, which needs it again to grow.
#[derive(Debug)]
pub(super) struct Ephemeral {
    id: c_long,
    description: String,
}

impl Ephemeral {
    /// Makes a key.
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
        let description = describe(name);
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
        let kept = keyctl([SET_PERMISSIONS, id, EVERYTHING])
            .and_then(|_| keyctl([LINK, id, USER_KEYRING]));
        if let Err(error) = kept {
            tracing::debug!(%error, "the key cannot be kept: its device cannot grow");
        }
        Ok(Ephemeral { id, description })
    }

    /// The key that was made under a name.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if it was not kept.
    pub(super) fn find(name: &str) -> Result<Self, BackendError> {
        let description = describe(name);
        let found = search(&description).and_then(|id| {
            keyctl([LINK, id, THREAD_KEYRING]).map(|_| Ephemeral { id, description })
        });
        found.map_err(|error| {
            let message =
                format!("the kernel has not kept the key of {name} for anybody but its device");
            BackendError::unsuitable(message).with_source(error)
        })
    }

    /// Only the keyring of root has it from now on.
    pub(super) fn leave(self) {
        if let Err(error) = keyctl([UNLINK, self.id, THREAD_KEYRING]) {
            tracing::debug!(%error, "a key stays in the keyring of a thread until that ends");
        }
    }

    /// What stands for the key in a table.
    pub(super) fn reference(&self) -> String {
        format!(":{LENGTH}:{KIND}:{}", self.description)
    }
}

/// Has the kernel forget the key that was made under a name, if it has kept one: its device is gone.
pub(super) fn forget(name: &str) {
    let forgotten = search(&describe(name)).and_then(|id| keyctl([INVALIDATE, id, 0]));
    match forgotten {
        Err(error) if error.raw_os_error() != Some(libc::ENOKEY) => {
            tracing::debug!(%error, name, "whether the key was forgotten is not known");
        }
        _ => {}
    }
}

fn describe(name: &str) -> String {
    format!("blockmount:{name}")
}

fn keyctl([what, key, argument]: [c_long; 3]) -> io::Result<c_long> {
    // SAFETY: these calls take numbers only.
    match unsafe { libc::syscall(libc::SYS_keyctl, what, key, argument) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// Looks for a key in the keyring of root.
fn search(description: &str) -> io::Result<c_long> {
    let (kind, description) = (CString::new(KIND)?, CString::new(description)?);
    // SAFETY: the strings end with a NUL and outlive the call, which keeps none of them.
    let id = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            SEARCH,
            USER_KEYRING,
            kind.as_ptr(),
            description.as_ptr(),
            0,
        )
    };
    match id {
        -1 => Err(io::Error::last_os_error()),
        id => Ok(id),
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
        let name = format!("test-{}", std::process::id());
        let key = match Ephemeral::new(&name) {
            Ok(key) => key,
            // Containers may have no keyring.
            Err(error) => return assert!(!error.message().is_empty()),
        };
        assert_eq!(key.reference(), format!(":64:logon:blockmount:{name}"));
        assert!(!format!("{key:?}").contains("[")); // no bytes of it
        let id = key.id;
        key.leave();
        let again = Ephemeral::find(&name).unwrap();
        assert_eq!(again.id, id);
        again.leave();
        forget(&name);
        Ephemeral::find(&name).unwrap_err();
        keyctl([INVALIDATE, id, 0]).unwrap_err();
        forget(&name);
    }
}
