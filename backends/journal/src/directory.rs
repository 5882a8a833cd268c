//! The directory of a journal: private, locked, and never reached through a link.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use blockmount::BackendError;
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, fsync, openat,
    renameat, unlinkat,
};
use rustix::io::Errno;

const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

/// An open directory with a journal. While one is open, no other process can open it.
#[derive(Debug)]
pub(crate) struct Directory {
    /// Holds the lock.
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self, BackendError> {
        let tried = || format!("cannot open the journal in {}", path.display());
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| failed(tried(), error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(CWD, path, flags, Mode::empty());
        let fd = fd.map_err(|errno| failed(tried(), errno))?;
        let stat = fstat(&fd).map_err(|errno| failed(tried(), errno))?;
        ensure_private(&stat, &tried())?;
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let used = format!("{}: another process has it open", tried());
                return Err(BackendError::busy(used).with_path(path));
            }
            Err(errno) => return Err(failed(tried(), errno)),
        }
        let path = path.to_owned();
        Ok(Directory { fd, path })
    }

    /// The file as it is, and its content; made if it is not there.
    pub(crate) fn read(&self) -> Result<(File, Vec<u8>), BackendError> {
        let tried = || format!("cannot read {}", self.path.join(NAME).display());
        let mut file = self.open_file(NAME, OFlags::CREATE)?;
        let stat = fstat(&file).map_err(|errno| failed(tried(), errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
            let why = format!("{}: it is no file of its own", tried());
            return Err(BackendError::invalid(why).with_path(&*self.path));
        }
        ensure_private(&stat, &tried())?;
        let mut bytes = Vec::new();
        let read = file.read_to_end(&mut bytes);
        read.map_err(|error| failed(tried(), error))?;
        Ok((file, bytes))
    }

    /// Puts a new file with this content in the place of the old one: all of it, or none.
    pub(crate) fn replace(&self, bytes: &[u8], sync: bool) -> Result<File, BackendError> {
        let tried = || format!("cannot rewrite {}", self.path.join(NAME).display());
        // A draft that a killed process left is overwritten.
        let mut file = self.open_file(NEW_NAME, OFlags::CREATE | OFlags::TRUNC)?;
        let replaced = file.write_all(bytes).and_then(|()| {
            if sync {
                file.sync_all()?;
            }
            renameat(&self.fd, NEW_NAME, &self.fd, NAME)?;
            if sync {
                fsync(&self.fd)?;
            }
            Ok(())
        });
        if let Err(error) = replaced {
            // Part of a draft would take up the space that others wait for.
            let _ = unlinkat(&self.fd, NEW_NAME, AtFlags::empty());
            return Err(failed(tried(), error));
        }
        Ok(file)
    }

    fn open_file(&self, name: &str, flags: OFlags) -> Result<File, BackendError> {
        let flags = flags | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::APPEND;
        let file = openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let tried = || format!("cannot open {}", self.path.join(name).display());
        file.map(File::from).map_err(|errno| failed(tried(), errno))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.path.join(NAME)
    }
}

fn ensure_private(stat: &Stat, tried: &str) -> Result<(), BackendError> {
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    match ours && stat.st_mode & 0o077 == 0 {
        true => Ok(()),
        false => Err(BackendError::invalid(format!(
            "{tried}: it must be this user's and nobody else's to read or write (0700, 0600)"
        ))),
    }
}

/// The error of a system call.
pub(crate) fn failed(tried: String, error: impl Into<io::Error>) -> BackendError {
    let error = error.into();
    let kind = match error.kind() {
        io::ErrorKind::NotFound => BackendError::not_found(tried),
        io::ErrorKind::StorageFull => BackendError::full(tried),
        _ => BackendError::other(tried),
    };
    kind.with_source(error)
}
