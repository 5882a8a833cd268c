//! The journal.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::BackendError;
use blockmount::journal::{Journal, Record, RecordKey};
use tracing::{debug, warn};

use crate::directory::{Directory, failed};
use crate::format::{self, Change, MAGIC};

/// How many bytes of outdated changes a file may have before it is rewritten: small enough that `/run` does not feel it.
const OUTDATED: usize = 256 << 10;

/// A [`Journal`] in a file of its own. While it is open, no other process can open it.
///
/// See the [crate](crate) for the format and what it survives.
#[derive(Debug)]
pub struct FileJournal {
    directory: Directory,
    sync: bool,
    /// Held while a change is written, which is one system call but for a rewrite.
    state: Mutex<State>,
}

/// Says how a [`FileJournal`] is to be kept.
#[derive(Debug, Clone)]
#[must_use]
pub struct FileJournalBuilder {
    path: PathBuf,
    sync: bool,
}

#[derive(Debug)]
struct State {
    file: File,
    /// The bytes of the file that are whole.
    length: usize,
    /// How many of them stand for live records.
    live: usize,
    records: HashMap<RecordKey, Live>,
    /// Part of a change may be at the end of the file, and could not be cut off.
    torn: bool,
    /// Kept for its memory.
    change: Vec<u8>,
}

#[derive(Debug)]
struct Live {
    record: Record,
    /// How many bytes its change has.
    length: usize,
}

impl FileJournal {
    /// Opens the journal in a directory, which is made if it is not there. Blocks, but not for the lock.
    ///
    /// # Errors
    ///
    /// `Busy` if a process has it open; `Invalid` if others could read or write it, it is damaged, or a later version has
    /// written it; what the system answers otherwise.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, BackendError> {
        Self::builder(path).open()
    }

    /// The same with settings.
    pub fn builder(path: impl Into<PathBuf>) -> FileJournalBuilder {
        let path = path.into();
        FileJournalBuilder { path, sync: false }
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.directory.path()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes one change, whole or not at all.
    fn append(
        &self,
        state: &mut State,
        change: &impl serde::Serialize,
    ) -> Result<usize, BackendError> {
        if state.torn {
            self.cut_off(state)?;
        }
        state.change.clear();
        format::write(change, &mut state.change)?;
        let written = state.file.write_all(&state.change);
        let synced = written.and_then(|()| match self.sync {
            true => state.file.sync_data(),
            false => Ok(()),
        });
        if let Err(error) = synced {
            state.torn = true;
            if let Err(left) = self.cut_off(state) {
                warn!(error = %left, "a change is left half written; it is cut off before the next one");
            }
            return Err(failed(
                format!("cannot write to {}", self.path().display()),
                error,
            ));
        }
        let length = state.change.len();
        state.length += length;
        Ok(length)
    }

    fn cut_off(&self, state: &mut State) -> Result<(), BackendError> {
        let cut = state.file.set_len(state.length as u64);
        cut.map_err(|error| failed(format!("cannot mend {}", self.path().display()), error))?;
        state.torn = false;
        Ok(())
    }

    /// Rewrites the file if most of it is outdated. One that cannot be rewritten is used as it is.
    fn compact(&self, state: &mut State) {
        let outdated = state.length - state.live - MAGIC.len();
        if outdated < OUTDATED + state.live {
            return;
        }
        match self.rewrite(state) {
            Ok(()) => {
                debug!(path = %blockmount::printable(self.path().display()), "rewrote the journal")
            }
            Err(error) => warn!(%error, "the journal grows: it cannot be rewritten"),
        }
    }

    fn rewrite(&self, state: &mut State) -> Result<(), BackendError> {
        let mut bytes = MAGIC.to_vec();
        for live in state.records.values() {
            format::write(&PutRef::Put(&live.record), &mut bytes)?;
        }
        state.file = self.directory.replace(&bytes, self.sync)?;
        state.length = bytes.len();
        state.live = bytes.len() - MAGIC.len();
        state.torn = false;
        Ok(())
    }
}

/// [`Change`], of what is only borrowed.
#[derive(serde::Serialize)]
#[serde(rename = "Change")]
enum PutRef<'r> {
    Put(&'r Record),
    Remove(&'r RecordKey),
}

impl FileJournalBuilder {
    /// Has each change reach the medium before it counts (`fdatasync`), for a directory that outlives the power. Off unless
    /// asked for: in `/run` it means nothing.
    pub fn sync(mut self, sync: bool) -> Self {
        self.sync = sync;
        self
    }

    /// Opens it.
    ///
    /// # Errors
    ///
    /// As for [`FileJournal::open`].
    pub fn open(self) -> Result<FileJournal, BackendError> {
        let directory = Directory::open(&self.path)?;
        let (file, bytes) = directory.read()?;
        let damaged = |error: BackendError| {
            let said = format!("cannot use the journal {}", directory.path().display());
            BackendError::invalid(said)
                .with_path(&*self.path)
                .with_source(error)
        };
        let read = format::read(&bytes).map_err(damaged)?;
        let mut state = State {
            file,
            length: read.whole,
            live: 0,
            records: HashMap::new(),
            torn: read.whole < bytes.len(),
            change: Vec::new(),
        };
        state.replay(read.changes)?;
        let journal = FileJournal {
            directory,
            sync: self.sync,
            state: Mutex::new(state),
        };
        journal.mend()?;
        Ok(journal)
    }
}

impl FileJournal {
    /// Cuts off what a killed process left at the end, or writes the beginning of a new file.
    fn mend(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        match state.length {
            0 => self.rewrite(&mut state),
            _ if state.torn => self.cut_off(&mut state),
            _ => Ok(()),
        }
    }
}

impl State {
    fn replay(&mut self, changes: Vec<Change>) -> Result<(), BackendError> {
        let mut bytes = Vec::new();
        for change in changes {
            match change {
                Change::Remove(key) => self.forget(&key),
                Change::Put(record) => {
                    bytes.clear();
                    format::write(&PutRef::Put(&record), &mut bytes)?;
                    self.keep(record, bytes.len());
                }
            }
        }
        Ok(())
    }

    fn keep(&mut self, record: Record, length: usize) {
        self.live += length;
        let before = self.records.insert(record.key(), Live { record, length });
        self.live -= before.map_or(0, |before| before.length);
    }

    fn forget(&mut self, key: &RecordKey) {
        let before = self.records.remove(key);
        self.live -= before.map_or(0, |before| before.length);
    }
}

impl Journal for FileJournal {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        let state = self.state();
        Ok(state
            .records
            .values()
            .map(|live| live.record.clone())
            .collect())
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        let mut state = self.state();
        let length = self.append(&mut state, &PutRef::Put(record))?;
        state.keep(record.clone(), length);
        self.compact(&mut state);
        Ok(())
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        let mut state = self.state();
        if !state.records.contains_key(key) {
            return Ok(());
        }
        if let Err(error) = self.append(&mut state, &PutRef::Remove(key)) {
            // Without its last record the file is as a new one, and cutting it off takes no space.
            let is_last = state.records.len() == 1 && !state.torn && !self.sync;
            if !is_last || state.file.set_len(MAGIC.len() as u64).is_err() {
                return Err(error);
            }
            state.length = MAGIC.len();
        }
        state.forget(key);
        self.compact(&mut state);
        Ok(())
    }
}
