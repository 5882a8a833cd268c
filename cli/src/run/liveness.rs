//! Whether a run is alive, and what one that is not has left in somebody's way.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use blockmount_linux::mountinfo;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::files::open_file;
use super::{Kept, OVERLAY, RunPaths, id_in};

impl RunPaths {
    /// Whether somebody holds the run's lock. Without a lock, it was killed at its start or its end.
    pub(crate) fn is_alive(&self) -> io::Result<bool> {
        let file = match open_file(&self.lock(), File::options().read(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl RunPaths {
    /// The process that holds the run's lock, where the kernel says which it is: none in another pid namespace. Blocks.
    pub(crate) fn process(&self) -> Option<u32> {
        let file = self.lock().symlink_metadata().ok()?;
        holder(
            &std::fs::read_to_string("/proc/locks").ok()?,
            file.dev(),
            file.ino(),
        )
    }

    /// The same in words.
    pub(crate) fn process_in_words(&self) -> String {
        match self.process() {
            Some(process) => format!("process {process}"),
            None => "a process that cannot be seen from here".to_owned(),
        }
    }
}

/// Who holds a lock of `flock(2)` on a file, from the table in `/proc/locks`: number, kind, mode, access, process,
/// `MAJOR:MINOR:INODE` with a device in hexadecimal digits. Who waits for one has an arrow before the kind.
fn holder(table: &str, device: u64, inode: u64) -> Option<u32> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    let lines = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut held =
        lines.filter(|line| line.get(1) == Some(&"FLOCK") && line.get(5) == Some(&&*file));
    let process = held.find_map(|line| line.get(4)?.parse().ok())?;
    (process != 0).then_some(process)
}

/// What to do about a tree of another run that is at a target, if there is one. Blocks.
pub(crate) fn in_the_way(target: &Path) -> Option<String> {
    let mounts = mountinfo::read().ok()?;
    let at = mountinfo::at(&mounts, target);
    let mut trees = at.iter().filter(|mount| mount.filesystem == OVERLAY);
    let mark =
        trees.find_map(|mount| mount.source.to_str().filter(|mark| id_in(mark).is_some()))?;
    let paths = RunPaths::of(id_in(mark)?);
    if paths.is_alive().ok()? {
        let process = paths.process_in_words();
        return Some(format!(
            "another \"blockmount mount\" holds a tree there, {process}: end it, or choose another path"
        ));
    }
    if paths.dir.symlink_metadata().is_err() {
        let advice =
            "a tree of blockmount is there, perhaps of another container: choose another path";
        return Some(advice.to_owned());
    }
    Some(match paths.kept() {
        Kept::Resumable(kept) => format!(
            "a killed run has left its tree there; go on with it: {}",
            kept.resuming()
        ),
        Kept::Lost(_) => {
            "a killed run has left its tree there; remove it, with all that was written to it: \
                          sudo blockmount cleanup --resumable"
                .to_owned()
        }
        Kept::No => {
            "a killed run has left its tree there; remove it: sudo blockmount cleanup".to_owned()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_found_by_its_file() {
        let table = "1: FLOCK  ADVISORY  WRITE 12 00:1b:345 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 13 00:1b:346 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 14 00:1b:346 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 0 00:1b:347 0 EOF\n";
        let device = rustix::fs::makedev(0, 0x1b);
        assert_eq!(holder(table, device, 345), Some(12));
        // One that waits, one of another kind, one that cannot be seen, one that is not there.
        for inode in [346, 347, 348] {
            assert_eq!(holder(table, device, inode), None);
        }
    }

    #[test]
    fn the_kernel_says_who_holds_a_lock() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        flock(file.as_file(), FlockOperation::NonBlockingLockExclusive).unwrap();
        let metadata = file.path().metadata().unwrap();
        let table = std::fs::read_to_string("/proc/locks").unwrap();
        assert_eq!(
            holder(&table, metadata.dev(), metadata.ino()),
            Some(std::process::id())
        );
    }
}
