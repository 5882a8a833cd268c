//! A journal in memory that fails when a test says so.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::BackendError;
use crate::journal::{Journal, Record, RecordKey};

/// A journal in memory. Clones share it, also as the journals of managers that follow each other.
///
/// A process that ends and starts again is [`restart`](Self::restart), as for [`FakeVm`](super::FakeVm::restart).
#[derive(Clone)]
pub struct MemoryJournal {
    shared: Arc<Mutex<State>>,
    /// The process that this handle belongs to.
    process: usize,
}

#[derive(Default)]
struct State {
    records: HashMap<RecordKey, Record>,
    process: usize,
    writes: usize,
    /// How many more writes succeed, if not all do.
    left: Option<usize>,
}

impl MemoryJournal {
    /// An empty journal.
    pub fn new() -> Self {
        MemoryJournal {
            shared: Arc::default(),
            process: 0,
        }
    }

    /// The journal as the next process finds it. Handles of the process before write nothing any more. Every write
    /// succeeds again.
    #[must_use = "the handles of the process before do nothing any more"]
    pub fn restart(&self) -> Self {
        let mut state = self.state();
        state.process += 1;
        state.left = None;
        let process = state.process;
        drop(state);
        MemoryJournal {
            shared: Arc::clone(&self.shared),
            process,
        }
    }

    /// Lets so many writes succeed, and all others fail without effect, until the next restart.
    pub fn fail_after(&self, writes: usize) {
        self.state().left = Some(writes);
    }

    /// Lets every write succeed again.
    pub fn mend(&self) {
        self.state().left = None;
    }

    /// How many writes there were, of all processes.
    pub fn writes(&self) -> usize {
        self.state().writes
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.state().records.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way through a change.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        change: impl FnOnce(&mut HashMap<RecordKey, Record>),
    ) -> Result<(), BackendError> {
        let mut state = self.state();
        let ended = self.process != state.process;
        if ended || state.left == Some(0) {
            return Err(BackendError::other("the journal was told to fail"));
        }
        state.left = state.left.map(|left| left - 1);
        state.writes += 1;
        change(&mut state.records);
        Ok(())
    }
}

impl Default for MemoryJournal {
    fn default() -> Self {
        Self::new()
    }
}

impl Journal for MemoryJournal {
    fn load(&self) -> Result<Vec<Record>, BackendError> {
        Ok(self.state().records.values().cloned().collect())
    }

    fn put(&self, record: &Record) -> Result<(), BackendError> {
        self.write(|records| drop(records.insert(record.key(), record.clone())))
    }

    fn remove(&self, key: &RecordKey) -> Result<(), BackendError> {
        self.write(|records| drop(records.remove(key)))
    }
}

impl fmt::Debug for MemoryJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("MemoryJournal")
            .field("records", &state.records.values())
            .finish_non_exhaustive()
    }
}
