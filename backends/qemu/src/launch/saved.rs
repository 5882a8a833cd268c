//! Saved states: a guest boots once, and later VMs go on from there in a fraction of a second.
//!
//! A state is a file `<key>.state` in a directory, where the key is a digest of all that it depends on: QEMU, the
//! hardware, the kernel and the first file system. It holds the guest's memory, so only its owner may read it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::VmError;

/// How long a state that nobody has used is kept.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// The lock of those who make states, in the directory of the states.
const LOCK: &str = "lock";

/// The state that a process has begun to save in a directory of [`VmBuilder::saved_states`](super::VmBuilder::saved_states)
/// before it was killed: a file as large as the guest's memory in use. The next process that saves a state there writes over it;
/// with `remove` it is removed now. Blocks.
///
/// # Errors
///
/// The system's.
pub fn abandoned_state(directory: &Path, remove: bool) -> io::Result<Option<PathBuf>> {
    States::in_directory(directory).abandoned(remove)
}

/// A directory of saved states.
#[derive(Debug, Clone)]
pub(super) struct States(PathBuf);

/// The right to make states in a directory, which one process has at a time: the others wait for the state instead
/// of booting the same guest beside it.
#[derive(Debug)]
pub(super) struct Making {
    _lock: File,
}

impl States {
    pub(super) fn in_directory(directory: &Path) -> Self {
        States(directory.to_owned())
    }

    fn trouble(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
        let at = self.0.display();
        VmError::new(format!("cannot use the saved states in {at}")).because(error)
    }

    /// Makes the directory, and refuses one that others may write to: whoever can replace a state decides
    /// what runs in a guest. Blocks.
    fn prepare(&self) -> Result<(), VmError> {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(|error| self.trouble(error))?;
        let metadata = fs::symlink_metadata(&self.0).map_err(|error| self.trouble(error))?;
        let ours = metadata.uid() == rustix::process::geteuid().as_raw();
        match ours && metadata.is_dir() && metadata.mode() & 0o022 == 0 {
            true => Ok(()),
            false => Err(self.trouble("others than its owner may write to it")),
        }
    }

    /// Where the state of a key is, or will be.
    pub(super) fn path(&self, key: &str) -> PathBuf {
        self.0.join(format!("{key}.state"))
    }

    /// Opens the state of a key, if there is one. Blocks.
    pub(super) fn open(&self, key: &str) -> Result<Option<File>, VmError> {
        self.prepare()?;
        match File::open(self.path(key)) {
            Ok(file) => {
                // Its time says when it was used last; that it cannot be set is no reason not to use it.
                let _ = file.set_modified(SystemTime::now());
                Ok(Some(file))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.trouble(error)),
        }
    }

    /// Waits until no other process makes states here. Blocks, for as long as another boots a guest.
    pub(super) fn lock(&self) -> Result<Making, VmError> {
        self.prepare()?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.0.join(LOCK))
            .map_err(|error| self.trouble(error))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|errno| self.trouble(errno))?;
        Ok(Making { _lock: lock })
    }

    /// Where a state is written before it is published. Its path is short, because sockets are made beside it.
    pub(super) fn draft(&self) -> PathBuf {
        self.0.join("draft")
    }

    /// Removes what was written of a draft. Blocks.
    pub(super) fn forget_draft(&self) {
        let _ = fs::remove_file(self.draft());
    }

    /// Gives the draft its name, and removes states that nobody has used for two weeks. Blocks.
    pub(super) fn publish(&self, _making: &Making, key: &str) -> Result<(), VmError> {
        let draft = self.draft();
        fs::set_permissions(&draft, Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(draft, self.path(key)))
            .map_err(|error| self.trouble(error))?;
        let entries = fs::read_dir(&self.0).map_err(|error| self.trouble(error))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let is_state = Path::new(&name)
                .extension()
                .is_some_and(|end| end == "state");
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|at| at.elapsed().ok());
            if is_state && age.is_some_and(|age| age > KEPT) {
                // Another process may have removed it.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// The draft that a killed process has left, if no other one writes it now. It is removed if `remove` says so. Blocks.
    fn abandoned(&self, remove: bool) -> io::Result<Option<PathBuf>> {
        let lock = match File::open(self.0.join(LOCK)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        let draft = self.draft();
        let looked = match remove {
            true => fs::remove_file(&draft),
            false => fs::symlink_metadata(&draft).map(drop),
        };
        match looked {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            looked => looked.map(|()| Some(draft)),
        }
    }

    /// Notes that no guest comes up on KVM, until this machine is booted again. Blocks.
    pub(super) fn note_no_kvm(&self) {
        // Without the note the next start merely takes longer.
        let _ = fs::write(self.0.join("no-kvm"), boot_id());
    }

    /// Whether it was noted since this machine was booted that no guest comes up on KVM. Blocks.
    pub(super) fn knows_no_kvm(&self) -> bool {
        fs::read_to_string(self.0.join("no-kvm")).is_ok_and(|noted| noted == boot_id())
    }

    /// Forgets a state that does not work. Blocks.
    pub(super) fn forget(&self, key: &str) {
        let _ = fs::remove_file(self.path(key));
    }
}

/// The same until this machine is booted again.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_there_when_it_is_whole_and_private() {
        let room = tempfile::tempdir().unwrap();
        let states = States::in_directory(&room.path().join("a/b"));
        assert!(states.open("k").unwrap().is_none());
        let making = states.lock().unwrap();
        fs::write(states.draft(), "state").unwrap();
        assert!(states.open("k").unwrap().is_none());
        states.publish(&making, "k").unwrap();
        assert_eq!(
            io::read_to_string(states.open("k").unwrap().unwrap()).unwrap(),
            "state"
        );
        let mode = |path: PathBuf| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(
            (mode(states.path("k")), mode(room.path().join("a/b"))),
            (0o600, 0o700)
        );
        states.forget("k");
        assert!(states.open("k").unwrap().is_none());
    }

    #[test]
    fn old_states_go_and_other_files_stay() {
        let room = tempfile::tempdir().unwrap();
        let directory = room.path().join("states");
        let states = States::in_directory(&directory);
        let making = states.lock().unwrap();
        for name in ["old.state", "young.state", "old.txt"] {
            fs::write(directory.join(name), "").unwrap();
        }
        for name in ["old.state", "old.txt"] {
            let file = File::options()
                .write(true)
                .open(directory.join(name))
                .unwrap();
            file.set_modified(SystemTime::now() - 2 * KEPT).unwrap();
        }
        fs::write(states.draft(), "").unwrap();
        states.publish(&making, "new").unwrap();
        let left = |name: &str| directory.join(name).exists();
        assert!(left("new.state") && left("young.state") && left("old.txt") && !left("old.state"));
    }

    #[test]
    fn x14_a_draft_that_nobody_writes_is_found_and_removed() {
        let room = tempfile::tempdir().unwrap();
        let directory = room.path().join("states");
        assert_eq!(abandoned_state(&directory, true).unwrap(), None);
        let states = States::in_directory(&directory);
        let making = states.lock().unwrap();
        fs::write(states.draft(), "half of a state").unwrap();
        assert_eq!(abandoned_state(&directory, true).unwrap(), None);
        drop(making);
        for remove in [false, false, true] {
            let found = abandoned_state(&directory, remove).unwrap();
            assert_eq!(found, Some(states.draft()));
        }
        assert_eq!(abandoned_state(&directory, false).unwrap(), None);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let room = tempfile::tempdir().unwrap();
        let directory = room.path().join("states");
        DirBuilder::new().mode(0o700).create(&directory).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o777)).unwrap();
        assert!(States::in_directory(&directory).open("k").is_err());
    }
}
