//! One lock for each thing that several targets may share.

use std::collections::HashSet;
use std::ffi::OsString;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use blockmount::BackendError;

use crate::device::number::DeviceNumber;
use crate::mount::target::FileId;
use crate::undo::step::{DirectoryStep, Undo};

/// Making or removing such a thing takes milliseconds, and mounting a device whose log is replayed seconds: a call that
/// waits longer meets a dead filesystem or device.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A thing that several targets may share. Paths are those of targets, which are written in one way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// A device with a filesystem: how it is mounted depends on its other mounts.
    Device(DeviceNumber),
    /// The scratch directory of an overlay, which has one user.
    Scratch(FileId),
    Directory(OsString),
    /// A mount that may have views.
    Source(OsString),
    Partition(DeviceNumber, u32),
    /// A mapped device, by its name.
    Mapped(String),
}

impl Key {
    /// What is locked while a step is undone. A mount belongs to one target.
    pub(crate) fn of(step: &Undo) -> Option<Key> {
        match step {
            Undo::Unmount(_) | Undo::RemoveNode(_) => None,
            Undo::RemoveRange(range) => Some(Key::Mapped(range.names().name)),
            Undo::CloseCrypt(step) => Some(Key::Mapped(step.names().name)),
            Undo::CloseIntegrity(step) => Some(Key::Mapped(step.names().name)),
            Undo::CloseVerity(verity) => Some(Key::Mapped(verity.names().name)),
            Undo::DeletePartition(step) => Some(Key::Partition(step.disk, step.number)),
            Undo::RemoveDirectory(DirectoryStep { path, .. }) => {
                Some(Key::Directory(path.0.clone().into()))
            }
        }
    }
}

/// The locks that are held now.
#[derive(Debug)]
pub(crate) struct Locks {
    timeout: Duration,
    held: Mutex<Keys>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Keys {
    held: HashSet<Key>,
    /// How many calls wait: to tell nobody is a system call too.
    waiting: usize,
}

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    locks: &'a Locks,
    key: Key,
}

impl Default for Locks {
    fn default() -> Self {
        Locks {
            timeout: TIMEOUT,
            held: Mutex::default(),
            freed: Condvar::new(),
        }
    }
}

impl Locks {
    /// Waits at least as long as a filesystem may take to be made or checked: its device is locked meanwhile.
    pub(crate) fn wait_for_formats(&mut self, format: Duration) {
        self.timeout = TIMEOUT.max(format);
    }

    /// Waits for a lock, for 30 seconds at most, or as long as a format may take. Blocks.
    ///
    /// # Errors
    ///
    /// `Busy` if it was not free in time.
    pub(crate) fn hold(&self, key: Key) -> Result<Held<'_>, BackendError> {
        let mut keys = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_ours = keys.held.insert(key.clone());
        if !is_ours {
            keys.waiting += 1;
            keys = self
                .freed
                .wait_timeout_while(keys, self.timeout, |keys| keys.held.contains(&key))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            keys.waiting -= 1;
            is_ours = keys.held.insert(key.clone());
        }
        if !is_ours {
            return Err(BackendError::busy(format!(
                "another target's call has been working on the same device or directory for {} seconds",
                self.timeout.as_secs()
            )));
        }
        Ok(Held { locks: self, key })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut keys = self
            .locks
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        keys.held.remove(&self.key);
        let is_awaited = keys.waiting > 0;
        drop(keys);
        if is_awaited {
            self.locks.freed.notify_all();
        }
    }
}
