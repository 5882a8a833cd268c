//! Keys that the kernel has, for devices that encrypt others. No program can read them.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use blockmount::{BackendError, KeySource};

use crate::device::keyring::{self, Id, LOGON, USER, USER_READABLE};
use crate::device::secret::{self, Secret};
use crate::errno::errno_error;

/// A key. As long as this is there, the kernel finds it for this thread.
#[derive(Debug)]
pub(super) struct Key {
    description: String,
    /// In bytes.
    length: usize,
    /// What is linked to the keyring of the thread: the key itself, or a keyring that has it.
    linked: Id,
}

impl Key {
    /// A random key of so many bytes. The keyring of root keeps it as long as its device is there, which needs it again to
    /// grow: [`find`](Self::find).
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this kernel keeps no keys.
    pub(super) fn random(name: &str, length: usize) -> Result<Self, BackendError> {
        keyring::renew_randomness();
        Self::of(name, &Secret::random(length)?)
    }

    /// A key that the guest's owner has placed in a file of the directory of keys, or in a keyring. That of a file is kept
    /// as a random one is; that of a keyring is and stays the owner's.
    ///
    /// # Errors
    ///
    /// `NotFound` if it is not there; `Invalid` if it has not so many bytes, or cannot be used any more; `Unsuitable` if this
    /// guest has no such directory, or this kernel keeps no keys.
    pub(super) fn of_owner(
        name: &str,
        source: &KeySource,
        directory: Option<&Path>,
        length: usize,
    ) -> Result<Self, BackendError> {
        match source {
            KeySource::Keyring(description) => Self::in_keyring(description, length),
            other => Self::of(name, &in_directory(other, directory, length..=length)?),
        }
    }

    /// A key with these bytes, which is kept as a random one is.
    pub(super) fn of(name: &str, secret: &Secret) -> Result<Self, BackendError> {
        let description = describe(name);
        let linked = keyring::add_to_thread(&description, secret.bytes())
            .map_err(|error| explained("cannot make a key for an encrypted device", error))?;
        if let Err(error) = linked.permit_user().and_then(|()| linked.keep()) {
            tracing::debug!(%error, "the key cannot be kept: its device cannot grow");
        }
        Ok(Key {
            description,
            length: secret.bytes().len(),
            linked,
        })
    }

    /// A key of the owner in a keyring.
    pub(super) fn in_keyring(description: &str, length: usize) -> Result<Self, BackendError> {
        let what = format!("cannot use key {description}");
        // A process with a session of its own does not search the keyring of root by itself.
        USER.link_to_thread()
            .map_err(|error| explained(&what, error))?;
        let key = Key {
            description: description.to_owned(),
            length,
            linked: USER,
        };
        let checked = keyring::request(LOGON, description)
            .map_err(|error| explained(&what, error))
            .and_then(|id| match length_of(id) {
                Some(found) if found != length => Err(BackendError::invalid(format!(
                    "{what}: it has {found} bytes, and a key has {length}"
                ))),
                // The kernel checks the length of one that cannot be seen.
                _ => Ok(()),
            });
        match checked {
            Ok(()) => Ok(key),
            Err(error) => {
                key.leave();
                Err(error)
            }
        }
    }

    /// The key of so many bytes that was kept under a name.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if it was not kept.
    pub(super) fn find(name: &str, length: usize) -> Result<Self, BackendError> {
        let description = describe(name);
        let found = keyring::search(&description).and_then(|id| id.link_to_thread().map(|()| id));
        match found {
            Ok(linked) => Ok(Key {
                description,
                length,
                linked,
            }),
            Err(error) => {
                let message =
                    format!("the kernel has not kept the key of {name} for anybody but its device");
                Err(BackendError::unsuitable(message).with_source(error))
            }
        }
    }

    /// The thread does not have it any more.
    pub(super) fn leave(self) {
        if let Err(error) = self.linked.unlink_from_thread() {
            tracing::debug!(%error, "a key stays in the keyring of a thread until that ends");
        }
    }

    /// What stands for the key in a table.
    pub(super) fn reference(&self) -> String {
        format!(":{}:{LOGON}:{}", self.length, self.description)
    }
}

/// Reads a key from the directory of keys.
///
/// # Errors
///
/// As [`Secret::read`]; `Unsuitable` if this guest has no such directory, or does not know the source.
pub(super) fn in_directory(
    source: &KeySource,
    directory: Option<&Path>,
    lengths: RangeInclusive<usize>,
) -> Result<Secret, BackendError> {
    match (source, directory) {
        (KeySource::File(file), Some(directory)) => Secret::read(directory, file, lengths),
        (KeySource::File(file), None) => Err(BackendError::unsuitable(format!(
            "this guest has no directory of keys, where {file} could be: start its agent with --keys"
        ))),
        (other, _) => Err(BackendError::unsuitable(format!(
            "this guest does not know the source of keys {other:?}"
        ))),
    }
}

/// Reads a key of the type `user`.
///
/// # Errors
///
/// `NotFound` if it is not there; `Invalid` if it has another length, or cannot be used any more.
pub(super) fn read_user_key(
    description: &str,
    lengths: RangeInclusive<usize>,
) -> Result<Secret, BackendError> {
    let what = format!("cannot use key {description}");
    let read = || -> io::Result<(Vec<u8>, usize)> {
        USER.link_to_thread()?;
        let mut bytes = vec![0; *lengths.end()];
        let found = keyring::request(USER_READABLE, description);
        let length = found.and_then(|id| id.read(&mut bytes));
        USER.unlink_from_thread()?;
        Ok((bytes, length?))
    };
    let (mut bytes, length) = read().map_err(|error| explained(&what, error))?;
    if !lengths.contains(&length) {
        let expected = secret::spelled(&lengths);
        return Err(BackendError::invalid(format!(
            "{what}: it has {length} bytes, and a key has {expected}"
        )));
    }
    bytes.truncate(length);
    Ok(Secret::from(bytes))
}

/// Has the kernel forget the key that was kept under a name, if it has kept one: its device is gone.
pub(super) fn forget(name: &str) {
    match keyring::search(&describe(name)).and_then(Id::invalidate) {
        Err(error) if error.raw_os_error() != Some(libc::ENOKEY) => {
            tracing::debug!(%error, name, "whether the key was forgotten is not known");
        }
        _ => {}
    }
}

fn describe(name: &str) -> String {
    format!("blockmount:{name}")
}

fn explained(what: &str, error: io::Error) -> BackendError {
    let number = error.raw_os_error();
    let kind: fn(String) -> BackendError = match number {
        Some(libc::ENOSYS) => BackendError::unsuitable,
        Some(libc::ENOKEY) => BackendError::not_found,
        Some(libc::EKEYEXPIRED | libc::EKEYREVOKED | libc::EKEYREJECTED) => BackendError::invalid,
        _ => return errno_error(what, error),
    };
    let why = match number {
        Some(libc::ENOSYS) => "this kernel keeps no keys (CONFIG_KEYS)",
        Some(libc::ENOKEY) => "there is no such key in the keyring of this guest's root",
        _ => "it has expired or was revoked",
    };
    kind(format!("{what}: {why}")).with_source(error)
}

/// How long a key is that can be seen, in bytes.
fn length_of(key: Id) -> Option<usize> {
    length_in(&fs::read_to_string("/proc/keys").ok()?, &key.hexadecimal())
}

/// The end of the line of a key, `logon     volumes:data: 64`.
fn length_in(keys: &str, id: &str) -> Option<usize> {
    let mut lines = keys.lines();
    let line = lines.find(|line| line.split_ascii_whitespace().next() == Some(id))?;
    line.rsplit_once(": ")?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_name_only_and_forgotten() {
        let name = format!("test-{}", std::process::id());
        let key = match Key::random(&name, 64) {
            Ok(key) => key,
            // Containers may have no keyring.
            Err(error) => return assert!(!error.message().is_empty()),
        };
        assert_eq!(key.reference(), format!(":64:logon:blockmount:{name}"));
        assert!(!format!("{key:?}").contains("[")); // no bytes of it
        let id = key.linked;
        key.leave();
        let again = Key::find(&name, 64).unwrap();
        assert_eq!(again.linked, id);
        again.leave();
        forget(&name);
        Key::find(&name, 64).unwrap_err();
        id.invalidate().unwrap_err();
        forget(&name);
    }

    #[test]
    fn the_length_of_a_key_is_in_the_list_of_keys() {
        let keys = "\
1a2b3c4d I--Q---     4 perm 3f030000     0     0 keyring   _ses: 1
00c0ffee I--Q---     1 perm 3f010000     0     0 logon     volumes:a: b: 64
00c0ff00 I--Q---     1 perm 3f010000     0     0 logon     volumes:c
";
        assert_eq!(length_in(keys, "00c0ffee"), Some(64));
        assert_eq!(length_in(keys, "00c0ff00"), None);
        assert_eq!(length_in(keys, "00000000"), None);
    }
}
