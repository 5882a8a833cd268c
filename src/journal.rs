//! What survives a restart: a record of each attachment, mount, view and stack, written before it is touched.
//!
//! A manager that was built with a [`Journal`] writes each transition down before it calls a backend, and what came of
//! it before any caller is told. So whatever is in the VM and was put there by this manager is in the journal,
//! at least as [`Progress::Begun`]; what is in the journal may or may not be in the VM.
//! [`ManagerBuilder::recover`](crate::ManagerBuilder::recover) reads it after a restart and asks the backends what is really
//! there.
//!
//! # States of a record
//!
//! | written | when |
//! |---|---|
//! | `Begun` | before the set-up. If this cannot be written, nothing is set up |
//! | `Up` | after the set-up, before a caller has a handle. If this cannot be written, the set-up is torn down again |
//! | `Ending` | before the tear-down, and again once the guest has unplugged a device |
//! | removed | after the tear-down, or after a set-up that left nothing |
//! | a holder | once what it holds is up, before its caller has the handle; removed before its handle's tear-down begins |
//!
//! A tear-down does not wait for a journal that cannot be written, such as one on a full disk. What it could not write is
//! kept in memory, and written before anything new is set up; until then set-ups fail, and
//! [`Manager::drain`](crate::Manager::drain) says why. A process that ends before that leaves records of what is not there
//! any more, which the next recovery finds out.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;

use crate::{BackendError, Error, ErrorKind, Step};

mod record;
mod recorded;

pub use record::{
    AttachmentRecord, HolderRecord, MountKey, MountRecord, Progress, Record, RecordKey,
    StackRecord, ViewRecord,
};

pub(crate) use record::MountKeyParts;
pub(crate) use recorded::Recorded;

/// Keeps the records of one manager. The crate `blockmount-journal` has one in a file.
///
/// A manager calls it on the executor, also for several keys at once from several threads. The implementor must not wait
/// for anything slow (a network, a disk that may hang), must make each call whole or without effect, also if the
/// process is killed in it, and never panic. It must not be shared by two managers.
pub trait Journal: Send + Sync + 'static {
    /// All records, in no order.
    ///
    /// # Errors
    ///
    /// If what is kept cannot be read or is damaged. Nothing is then recovered, and nothing must be changed.
    fn load(&self) -> Result<Vec<Record>, BackendError>;

    /// Keeps a record in place of the one with the same [key](Record::key).
    ///
    /// # Errors
    ///
    /// If it cannot be written; the one before is kept.
    fn put(&self, record: &Record) -> Result<(), BackendError>;

    /// Removes a record. Removing what is not there succeeds.
    ///
    /// # Errors
    ///
    /// If it cannot be written; the record is kept. The manager goes on, and calls again before the next set-up.
    fn remove(&self, key: &RecordKey) -> Result<(), BackendError>;
}

/// One journal can be looked at by its owner while a manager writes it.
impl<J: Journal + ?Sized> Journal for Arc<J> {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        (**self).load()
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        (**self).put(record)
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        (**self).remove(key)
    }
}

/// Writes to the journal, if there is one. Without one nothing is even put together.
///
/// A set-up waits for its record; a tear-down does not, since a journal that cannot be written (its disk is full) must not
/// keep anything up. What a tear-down could not write is kept here, and is written before the record of any set-up: nothing
/// new is recorded in a place that the journal has still taken.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Option<Arc<Inner>>);

struct Inner {
    journal: Arc<dyn Journal>,
    /// The record, or its removal, that is not written yet. Held for each write, which waits for nothing slow.
    behind: Mutex<Behind>,
}

type Behind = HashMap<RecordKey, Option<Record>>;

impl Inner {
    fn write(&self, key: &RecordKey, record: Option<&Record>) -> Result<(), BackendError> {
        match record {
            Some(record) => self.journal.put(record),
            None => self.journal.remove(key),
        }
    }

    /// Writes what could not be written before.
    fn catch_up(&self, behind: &mut Behind) -> Result<(), BackendError> {
        let mut first = None;
        behind.retain(|key, record| {
            let written = self.write(key, record.as_ref());
            written.map_err(|error| first.get_or_insert(error)).is_err()
        });
        first.map_or(Ok(()), Err)
    }

    /// Keeps what could not be written, unless it can be written now.
    fn keep(&self, behind: &mut Behind, key: RecordKey, record: Option<Record>) {
        behind.insert(key, record);
        if let Err(error) = self.catch_up(behind) {
            let records = behind.len();
            warn!(%error, records, "the journal cannot be told what is torn down; it is once it can be written");
        }
    }
}

impl Recorder {
    pub(crate) fn new(journal: Arc<dyn Journal>) -> Self {
        let behind = Mutex::default();
        Recorder(Some(Arc::new(Inner { journal, behind })))
    }

    /// Writes down what is about to be set up, or is.
    pub(crate) fn put(&self, record: impl FnOnce() -> Record) -> Result<(), Error> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        let mut behind = inner.behind.lock();
        let written = inner.catch_up(&mut behind);
        let written = written.and_then(|()| inner.journal.put(&record()));
        written.map_err(|cause| Error::new(Step::Record, cause))
    }

    /// Writes down what is about to be torn down, now or later.
    pub(crate) fn ending(&self, record: impl FnOnce() -> Record) {
        let Some(inner) = &self.0 else { return };
        let (record, mut behind) = (record(), inner.behind.lock());
        if !behind.is_empty() || inner.journal.put(&record).is_err() {
            inner.keep(&mut behind, record.key(), Some(record));
        }
    }

    /// Removes the record of what is torn down, now or later.
    pub(crate) fn remove(&self, key: impl FnOnce() -> RecordKey) {
        let Some(inner) = &self.0 else { return };
        let (key, mut behind) = (key(), inner.behind.lock());
        if !behind.is_empty() || inner.journal.remove(&key).is_err() {
            inner.keep(&mut behind, key, None);
        }
    }

    /// Writes what could not be written before.
    pub(crate) fn catch_up(&self) -> Result<(), Error> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        let written = inner.catch_up(&mut inner.behind.lock());
        written.map_err(|cause| Error::new(Step::Record, cause))
    }

    /// Writes down what came of a set-up. One that cannot be written down is `Uncertain`, so that it is torn down.
    pub(crate) fn after_setup<T>(
        &self,
        outcome: Result<T, Error>,
        up: impl FnOnce() -> Record,
        key: impl FnOnce() -> RecordKey,
    ) -> Result<T, Error> {
        match &outcome {
            Ok(_) => self.put(up).map_err(|unwritten| {
                let what = "the journal cannot be written, so it is torn down again";
                let cause = BackendError::uncertain(what).with_source(unwritten.cause().clone());
                Error::new(Step::Record, cause)
            })?,
            Err(error) if error.kind() == ErrorKind::Uncertain => {}
            Err(_) => self.remove(key),
        }
        outcome
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recorder").field(&self.0.is_some()).finish()
    }
}
