//! What survives a restart: a record of each attachment, mount and stack, written before it is touched.
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
//! | removed | after the tear-down, or after a set-up that left nothing. If this cannot be written, the tear-down is pending |
//! | a holder | once what it holds is up, before its caller has the handle; removed before its handle's tear-down begins |

use std::fmt;
use std::sync::Arc;

use crate::{BackendError, Error, ErrorKind, Step};

mod record;
mod recorded;

pub use record::{
    AttachmentRecord, HolderRecord, MountKey, MountRecord, Progress, Record, RecordKey, StackRecord,
};

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
    /// If it cannot be written; the record is kept.
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
#[derive(Clone, Default)]
pub(crate) struct Recorder(Option<Arc<dyn Journal>>);

impl Recorder {
    pub(crate) fn new(journal: Arc<dyn Journal>) -> Self {
        Recorder(Some(journal))
    }

    pub(crate) fn put(&self, record: impl FnOnce() -> Record) -> Result<(), Error> {
        let Some(journal) = &self.0 else {
            return Ok(());
        };
        let written = journal.put(&record());
        written.map_err(|cause| Error::new(Step::Record, cause))
    }

    pub(crate) fn remove(&self, key: impl FnOnce() -> RecordKey) -> Result<(), Error> {
        let Some(journal) = &self.0 else {
            return Ok(());
        };
        let removed = journal.remove(&key());
        removed.map_err(|cause| Error::new(Step::Record, cause))
    }

    /// Writes down what came of a set-up. One that cannot be written down is `Uncertain`, so that it is torn down.
    pub(crate) fn after_setup<T>(
        &self,
        outcome: Result<T, Error>,
        up: impl FnOnce() -> Record,
        key: impl FnOnce() -> RecordKey,
    ) -> Result<T, Error> {
        let written = match &outcome {
            Ok(_) => self.put(up),
            Err(error) if error.kind() == ErrorKind::Uncertain => Ok(()),
            Err(_) => self.remove(key),
        };
        match written {
            Ok(()) => outcome,
            Err(unwritten) => Err(Error::new(
                Step::Record,
                BackendError::uncertain("the journal cannot be written, so it is torn down again")
                    .with_source(unwritten.cause().clone()),
            )),
        }
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recorder").field(&self.0.is_some()).finish()
    }
}
