//! One run of the program: how it marks what it makes, so that what it leaves when killed can be
//! found, and told from what is alive.
//!
//! - `/run/blockmount/<id>/` is the run's directory ([`runs`] says where those of a user are, whose runs mount nothing here), with a `lock` that is held for as long as the process
//!   lives. The kernel releases it however the process ends, and unlike a process id it
//!   is never given to somebody else.
//! - Loop devices and overlays carry the [mark](Run::mark) `blockmount:<id>` in the kernel's own tables.
//! - What neither shows is written to the `journal`, before it is made: directories of the user's that are made for a target.
//! - `/var/tmp/blockmount-<id>/` has the image files of a run that makes some. It is locked as well, because it outlives `/run`,
//!   and may be seen where that is not: in another container.
//!
//! A run with a name can be resumed ([`Remembered`]): its directory also has what it was asked for, and the journals of its
//! manager and of its guest engine.
//!
//! A start and a clean-up exclude each other by a lock on `/run/blockmount` itself, so that a run without
//! a lock is one that was killed, never one that is just being made.

mod files;
mod liveness;
mod owner;
mod paths;
mod remembered;
mod work;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::failure::{Context, Failure};
use files::open_directory;

pub(crate) use files::remove_empty;
pub(crate) use liveness::in_the_way;
pub(crate) use owner::{cache, is_root, runs, sudo};
pub(crate) use paths::{Entry, Name, RunPaths};
pub(crate) use remembered::{Kept, Remembered};
pub(crate) use work::{Orphan, orphans};

/// Where root's runs have their directories: empty after each boot, as are the tables that they describe.
pub(crate) const ROOTS_RUNS: &str = "/run/blockmount";
/// Where image files are made: on a disk, unlike `/run` and often `/tmp`.
const WORK: &str = "/var/tmp";
/// The journals of a run that can be resumed: of its manager, and of its guest engine.
const STATE: &str = "state";
const ENGINE: &str = "engine";
/// The records of the activations of a server.
const RECORDS: &str = "activations";
/// The keys of layers that are in files, while these are mounted.
const KEYS: &str = "keys";
/// The filesystem of what carries a mark as its source. Anybody can mount another one with such a source (FUSE).
pub(crate) const OVERLAY: &str = "overlay";
/// What starts the mark of every run.
const MARK: &str = "blockmount:";
const NO_WORK: &str =
    "image files of our own are below /var/tmp: it has to be writable, and have some space";
const NO_RUN: &str = "what is mounted is noted in /run, so that \"blockmount cleanup\" finds it: it has to be writable, and \
                      have some space; in a container it can be a tmpfs of its own";
/// How long a start waits for a clean-up, and one clean-up for another.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A run that is alive. [`finish`](Self::finish) removes its directories; dropping it tries to.
#[derive(Debug)]
pub(crate) struct Run {
    paths: RunPaths,
    mounts: PathBuf,
    journal: Mutex<File>,
    /// The directory for image files, locked, once there is one.
    work: Mutex<Option<File>>,
    finished: bool,
    /// Whether an earlier program has started it.
    resumed: bool,
    /// Whether it is remembered although nobody has given it a name.
    is_anonymous: bool,
    /// Held for as long as we live; the last field, so that it goes last.
    _lock: File,
}

/// What failed if a run has no directory.
fn cannot_make() -> String {
    let runs = runs().display();
    format!("cannot make a directory for this run in {runs}")
}

impl Run {
    /// Starts a run: makes its directories and takes its lock.
    pub(crate) fn start() -> Result<Run, Failure> {
        let runs = open_runs()
            .context(cannot_make)
            .map_err(|failure| failure.advise(NO_RUN))?;
        lock(&runs, FlockOperation::NonBlockingLockShared)?;
        Self::make()
    }

    fn make() -> Result<Run, Failure> {
        let paths = RunPaths::of(&random_id().context(cannot_make)?);
        // From here on a failure removes what is there: nothing but empty directories and files of ours.
        let made = make_private(&paths.dir).context(cannot_make);
        let made = made.and_then(|()| Self::fill(&paths)).inspect_err(|_| {
            let _ = paths.remove();
        });
        made.map_err(|failure| failure.advise(NO_RUN))
    }

    fn fill(paths: &RunPaths) -> Result<Run, Failure> {
        let what = || format!("cannot prepare {}", paths.dir.display());
        let lock_file = create(&paths.lock()).context(what)?;
        flock(&lock_file, FlockOperation::NonBlockingLockExclusive).context(what)?;
        let journal = create(&paths.journal()).context(what)?;
        Ok(Run::over(paths, journal, lock_file))
    }

    fn over(paths: &RunPaths, journal: File, lock: File) -> Run {
        Run {
            mounts: paths.dir.join("m"),
            paths: paths.clone(),
            journal: Mutex::new(journal),
            work: Mutex::default(),
            finished: false,
            resumed: false,
            is_anonymous: false,
            _lock: lock,
        }
    }

    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed
    }

    pub(crate) fn is_named(&self) -> bool {
        self.paths.is_named() && !self.is_anonymous
    }

    /// Where a program that asks how the run is doing connects to.
    pub(crate) fn status_socket(&self) -> PathBuf {
        self.paths.status_socket()
    }

    /// Where the manager of a run that can be resumed keeps its journal, and where the guest engine does; none if the run
    /// cannot be resumed.
    pub(crate) fn journals(&self) -> Option<[PathBuf; 2]> {
        let file = self.paths.remembered_file();
        file.exists()
            .then(|| [STATE, ENGINE].map(|name| self.paths.dir.join(name)))
    }

    /// Where a server keeps the records of its activations.
    pub(crate) fn records(&self) -> PathBuf {
        self.paths.dir.join(RECORDS)
    }

    /// What tells this run from all others.
    pub(crate) fn id(&self) -> &str {
        &self.paths.id
    }

    /// Where the guest engine of this machine looks for keys by their names: in memory, and made by whoever places one.
    pub(crate) fn keys(&self) -> PathBuf {
        self.paths.dir.join(KEYS)
    }

    /// What loop devices and overlays of this run carry, for all to see.
    pub(crate) fn mark(&self) -> String {
        self.paths.mark()
    }

    /// Below this, mounts without a path of the caller's.
    pub(crate) fn mount_root(&self) -> &Path {
        &self.mounts
    }

    /// The run's own directory, for mount points only.
    pub(crate) fn directory(&self) -> &Path {
        &self.paths.dir
    }

    /// The directory for image files, which is there once it was [made](Self::make_work_dir).
    pub(crate) fn work_dir(&self) -> &Path {
        &self.paths.work
    }

    /// Makes the directory for image files. A run that makes none needs no place for them.
    pub(crate) fn make_work_dir(&self) -> Result<&Path, Failure> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if work.is_none() {
            let path = &self.paths.work;
            let made = make_private(path).and_then(|()| work::lock(path, self.is_named()));
            let made = made.context(|| format!("cannot make {} for image files", path.display()));
            *work = Some(made.map_err(|failure| failure.advise(NO_WORK))?);
        }
        Ok(&self.paths.work)
    }

    /// Notes a directory outside of the run's own that is going to be made if it is not there, with
    /// its parents.
    pub(crate) fn journal_dir(&self, path: &Path) -> Result<(), Failure> {
        let missing = path
            .ancestors()
            .take_while(|path| path.symlink_metadata().is_err());
        let missing: Vec<&Path> = missing.collect();
        for directory in missing.into_iter().rev() {
            self.note(&Entry::Directory(Name::of(directory)))?;
        }
        Ok(())
    }

    fn note(&self, entry: &Entry) -> Result<(), Failure> {
        let what = || {
            format!(
                "cannot write the journal of this run in {}",
                self.paths.dir.display()
            )
        };
        let mut line = serde_json::to_string(entry).context(what)?;
        line.push('\n');
        // One write for a line: what is there after a kill is whole lines.
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.write_all(line.as_bytes()).context(what)
    }

    /// Leaves everything as it is for the next program that takes it over, which may be this one.
    pub(crate) fn leave(mut self) {
        self.finished = true;
    }

    /// Removes the run's directories. Nothing may be mounted there any more.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.finished = true;
        self.paths.remove()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What could not be resumed may be another time.
        if !self.finished
            && !self.resumed
            && let Err(failure) = self.paths.remove()
        {
            tracing::warn!(%failure, "a clean-up has to remove what is left of this run");
        }
    }
}

/// Opens the directory of all runs, which is made if it is not there.
pub(crate) fn open_runs() -> io::Result<File> {
    match make_private(runs()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => {
            let opened = open_directory(runs())?;
            files::ensure_private(&opened, runs())?;
            Ok(opened)
        }
    }
}

/// Takes a lock, or says after a while that somebody has it.
pub(crate) fn lock(file: &File, operation: FlockOperation) -> Result<(), Failure> {
    let deadline = Instant::now() + DEFAULT_TIMEOUT;
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            // There is no event for this one that could be bounded.
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => {
                let advice = "wait until \"blockmount cleanup\" is done, then try again";
                return Err(
                    Failure::new(format!("{} is locked by a clean-up", runs().display()))
                        .advise(advice),
                );
            }
            Err(errno) => {
                return Err(
                    Failure::new(format!("cannot lock {}", runs().display())).because(errno)
                );
            }
        }
    }
}

/// Reads a run's id from its mark.
pub(crate) fn id_in(mark: &str) -> Option<&str> {
    mark.strip_prefix(MARK).filter(|id| is_id(id))
}

/// Whether a name is that of a run: 16 hexadecimal digits.
pub(crate) fn is_id(name: &str) -> bool {
    name.len() == 16
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn random_id() -> io::Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// Makes a directory that only this user can read.
fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_what_we_make_is_a_mark() {
        assert_eq!(
            id_in("blockmount:0123456789abcdef"),
            Some("0123456789abcdef")
        );
        for mark in [
            "blockmount:",
            "blockmount:0123456789abcde",
            "blockmount:0123456789ABCDEF",
            "x",
        ] {
            assert_eq!(id_in(mark), None);
        }
        assert!(is_id(&random_id().unwrap()));
    }

    #[test]
    fn root_a_run_is_there_and_gone() {
        let run = Run::start().unwrap();
        let (dir, work) = (run.directory().to_owned(), run.work_dir().to_owned());
        let id = dir.file_name().unwrap().to_str().unwrap();
        assert_eq!(id_in(&run.mark()), Some(id));
        assert_eq!(dir.metadata().unwrap().mode() & 0o777, 0o700);
        assert!(
            !work.exists(),
            "a run without image files needs no place for them"
        );
        assert_eq!(run.make_work_dir().unwrap(), work);
        assert_eq!(run.make_work_dir().unwrap(), work);
        assert_eq!(work.metadata().unwrap().mode() & 0o777, 0o700);
        assert_eq!(run.paths.read_journal(), []);
        let other = File::open(run.paths.lock()).unwrap();
        assert_eq!(
            flock(&other, FlockOperation::NonBlockingLockExclusive),
            Err(Errno::WOULDBLOCK)
        );
        fs::write(work.join("image"), "x").unwrap();
        fs::create_dir_all(run.mount_root().join("0")).unwrap();
        run.finish().unwrap();
        assert!(!dir.exists() && !work.exists());

        let dropped = Run::start().unwrap();
        let dir = dropped.directory().to_owned();
        drop(dropped);
        assert!(!dir.exists());
    }

    #[test]
    fn root_a_run_that_is_left_stays_without_its_locks() {
        let run = Run::start().unwrap();
        let dir = run.directory().to_owned();
        run.make_work_dir().unwrap();
        let paths = run.paths.clone();
        run.leave();
        assert!(dir.exists() && paths.work.exists());
        for file in [paths.lock(), paths.work.clone()] {
            let file = File::open(file).unwrap();
            flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        }
        paths.remove().unwrap();
    }

    #[test]
    fn root_missing_directories_are_noted_from_the_top() {
        let run = Run::start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        run.journal_dir(&dir.path().join("a/b")).unwrap();
        run.journal_dir(dir.path()).unwrap();
        let noted = run.paths.read_journal().into_iter();
        let expected = ["a", "a/b"].map(|name| Entry::Directory(Name::of(&dir.path().join(name))));
        assert!(noted.eq(expected));
        run.finish().unwrap();
    }
}
