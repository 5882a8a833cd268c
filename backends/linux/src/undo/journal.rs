//! The undo lists, written down where a process that is started again finds them.
//!
//! A directory with one small file for each target. It lives in memory beside the mounts it is about
//! (`/run`), so nothing is synchronised to a medium: whatever loses the files loses the mounts as
//! well. What is read is trusted to be our own, and not to be intact.
//!
//! A mount writes its file once, and once more for each partition or range, for a target that is made for it, and twice for each
//! directory that is made on the way there; unmounting removes the file. A write takes about 20 µs in a tmpfs, a removal 10.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmount::BackendError;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat, renameat,
    unlinkat,
};
use rustix::io::Errno;

use crate::errno::errno_error;
use crate::undo::record::{self, Record};

/// More than the longest target, source and options together could take, in bytes.
const LONGEST_RECORD: u64 = 1 << 20;

/// A directory of records. While one is open, no other process can open it.
#[derive(Debug)]
pub(crate) struct Journal {
    /// Holds the lock.
    directory: OwnedFd,
    path: PathBuf,
    /// The boot and the namespace of mounts: what records are about has no meaning elsewhere.
    origin: String,
    /// What makes the first names of directories unlike those of any other process.
    nonce: String,
    next: AtomicU64,
    /// Called before and after each change of the journal, for tests that kill the process there.
    at_change: Option<fn()>,
}

/// A record that is there, or will be with the first write. It stays when this is dropped.
#[derive(Debug)]
pub(crate) struct Note {
    journal: Arc<Journal>,
    number: u64,
}

impl Journal {
    /// Opens a journal, and makes its directory if there is none. Blocks, but not for the lock.
    ///
    /// # Errors
    ///
    /// `Busy` if a process has it open; `Invalid` if others could write to it.
    pub(crate) fn open(path: &Path, at_change: Option<fn()>) -> Result<Arc<Self>, BackendError> {
        let what = || format!("cannot open the journal {}", path.display());
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| {
            errno_error(format!("cannot make the journal {}", path.display()), error)
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory =
            openat(CWD, path, flags, Mode::empty()).map_err(|errno| errno_error(what(), errno))?;
        let stat = fstat(&directory).map_err(|errno| errno_error(what(), errno))?;
        let is_ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if !is_ours || stat.st_mode & 0o022 != 0 {
            return Err(BackendError::invalid(format!(
                "{}: others can write to it",
                what()
            )));
        }
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let message = format!("{}: another process is using it", what());
                return Err(BackendError::busy(message));
            }
            Err(errno) => return Err(errno_error(what(), errno)),
        }
        let origin = origin().map_err(|error| errno_error(what(), error))?;
        let nonce = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
            .map_err(|error| errno_error(what(), error))?;
        Ok(Arc::new(Journal {
            directory,
            path: path.to_owned(),
            origin,
            nonce: nonce.trim().to_owned(),
            next: AtomicU64::new(1),
            at_change,
        }))
    }

    /// The records that are there, the oldest first. What cannot be used is set aside and reported
    /// in the log. Call it before anything is noted.
    ///
    /// # Errors
    ///
    /// `Conflict` if a record is of this boot and about another namespace of mounts: what it is about may be there, and
    /// only who works in that namespace can undo it. Nothing is then changed.
    pub(crate) fn read(self: &Arc<Self>) -> Result<Vec<(Note, Record)>, BackendError> {
        let trouble = |error: io::Error| {
            errno_error(
                format!("cannot read the journal {}", self.path.display()),
                error,
            )
        };
        let mut found = Vec::new();
        let names = self.names().map_err(trouble)?;
        self.ensure_here(&names)?;
        for name in names {
            let (number, rest) = split(&name);
            if let Some(number) = number {
                self.next.fetch_max(number + 1, Ordering::Relaxed);
            }
            match (number, rest) {
                // A write that was cut off: what it was about has not been begun, or has a record.
                (Some(_), ".new") => self.unlink(&name),
                (Some(number), ".json") => found.push(Note {
                    journal: self.clone(),
                    number,
                }),
                (Some(_), ".aside") => {}
                _ => {
                    tracing::warn!(journal = %blockmount::printable(self.path.display()), ?name, "this is no record")
                }
            }
        }
        found.sort_by_key(|note| note.number);
        let read = |note: Note| match self.load(note.number) {
            Ok(record) => Some((note, record)),
            Err(why) => {
                note.set_aside(&why);
                None
            }
        };
        Ok(found.into_iter().filter_map(read).collect())
    }

    fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        Ok(names)
    }

    /// Refuses records about another namespace of mounts.
    fn ensure_here(&self, names: &[OsString]) -> Result<(), BackendError> {
        let records = names.iter().filter_map(|name| match split(name) {
            (Some(number), ".json") => Some(number),
            _ => None,
        });
        let origins = records.filter_map(|number| record::origin_of(&self.bytes(number).ok()?));
        for origin in origins {
            if let Some(((boot, theirs), (our_boot, ours))) =
                origin.split_once(' ').zip(self.origin.split_once(' '))
                && boot == our_boot
                && theirs != ours
            {
                return Err(BackendError::conflict(format!(
                    "the journal {} is about the mount namespace {theirs}, and this process is in {ours}; run it where \
                     the mounts were made (nsenter --mount)",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }

    fn load(&self, number: u64) -> Result<Record, String> {
        record::decode(&self.bytes(number)?, &self.origin)
    }

    fn bytes(&self, number: u64) -> Result<Vec<u8>, String> {
        let unreadable = |error: io::Error| format!("it cannot be read: {error}");
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.directory, name_of(number), flags, Mode::empty())
            .map_err(|errno| unreadable(errno.into()))?;
        let stat = fstat(&file).map_err(|errno| unreadable(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("it is no regular file".to_owned());
        }
        let mut bytes = Vec::new();
        File::from(file)
            .take(LONGEST_RECORD)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        Ok(bytes)
    }

    /// A record with a number of its own, on which nothing is written yet.
    pub(crate) fn blank(self: &Arc<Self>) -> Note {
        Note {
            journal: self.clone(),
            number: self.number(),
        }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A name for a directory that no other process uses, and that this one uses once.
    pub(crate) fn staged_name(&self) -> String {
        format!(".blockmount-{}-{}", self.nonce, self.number())
    }

    fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        if let Some(hook) = self.at_change {
            hook();
        }
        let done = change();
        if let Some(hook) = self.at_change {
            hook();
        }
        done
    }

    fn unlink(&self, name: &OsStr) {
        match self.change(|| unlinkat(&self.directory, name, AtFlags::empty())) {
            Ok(()) | Err(Errno::NOENT) => {}
            // One record too many is harmless: what it is about is found to be gone.
            Err(errno) => {
                tracing::warn!(journal = %blockmount::printable(self.path.display()), ?name, %errno, "cannot remove a record");
            }
        }
    }
}

impl Note {
    /// Writes or replaces the record, at once or not at all. Blocks.
    pub(crate) fn write(&self, record: &Record) -> Result<(), BackendError> {
        let (journal, directory) = (&self.journal, &self.journal.directory);
        let bytes = record::encode(record, &journal.origin);
        let new = format!("{}.new", self.number);
        let write = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
            let file = openat(directory, &new, flags, Mode::RUSR | Mode::WUSR)?;
            File::from(file).write_all(&bytes)?;
            renameat(directory, &new, directory, name_of(self.number))?;
            Ok::<(), io::Error>(())
        };
        journal.change(write).map_err(|error| {
            journal.unlink(OsStr::new(&new));
            let path = journal.path.display();
            errno_error(format!("cannot write to the journal {path}"), error)
        })
    }

    /// Removes the record: all of it is undone, or was never done.
    pub(crate) fn done(self) {
        self.journal.unlink(OsStr::new(&name_of(self.number)));
    }

    /// Renames the record, so that it is not read again, and logs that.
    pub(crate) fn set_aside(self, why: &str) {
        let (journal, name) = (&self.journal, name_of(self.number));
        let aside = format!("{}.aside", self.number);
        tracing::error!(
            journal = %blockmount::printable(journal.path.display()),
            aside,
            "a record of what there is to undo cannot be used: {why}"
        );
        if let Err(errno) = renameat(&journal.directory, &name, &journal.directory, &aside) {
            tracing::error!(name, %errno, "cannot set the record aside");
        }
    }
}

fn name_of(number: u64) -> String {
    format!("{number}.json")
}

/// The number that a name starts with, and what follows.
fn split(name: &OsStr) -> (Option<u64>, &str) {
    let name = name.to_str().unwrap_or_default();
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = name.split_at(digits);
    // One that was not written by us may be any number: the next one must exist.
    let number = number.parse().ok().filter(|number| *number < u64::MAX / 2);
    (number.filter(|n: &u64| n.to_string().len() == digits), rest)
}

fn origin() -> io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = std::fs::read_link("/proc/self/ns/mnt")?;
    Ok(format!("{} {}", boot.trim(), namespace.display()))
}
