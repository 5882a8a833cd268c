//! Names for handles that are found again after a restart.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::journal::{HolderRecord, Record, RecordKey, Recorder};
use crate::{BackendError, Error, HolderName};

/// The names that are taken in one manager, and its way to the journal.
#[derive(Clone, Default)]
pub(crate) struct Holders(Arc<Inner>);

#[derive(Default)]
struct Inner {
    records: Recorder,
    frozen: AtomicBool,
    /// How many callers are at work that a freeze waits for.
    running: AtomicUsize,
    idle: Notify,
    /// The names whose handles were dropped while the manager was frozen.
    dropped: Mutex<Vec<HolderName>>,
    /// Held for a look-up, never while the journal is written.
    names: Mutex<HashMap<HolderName, Option<RecordKey>>>,
}

/// A name that is taken. Dropping it gives the name back, and removes its record first.
pub(crate) struct Holder {
    holders: Holders,
    name: HolderName,
    /// Its name and its record outlive it.
    kept: AtomicBool,
}

impl Holders {
    pub(crate) fn new(records: Recorder) -> Self {
        let inner = Inner {
            records,
            ..Inner::default()
        };
        Holders(Arc::new(inner))
    }

    /// Whether the manager stands still.
    pub(crate) fn is_frozen(&self) -> bool {
        self.0.frozen.load(SeqCst)
    }

    /// Begins work that a freeze waits for; an error if the manager is frozen.
    pub(crate) fn enter(&self) -> Result<Running<'_>, BackendError> {
        self.0.running.fetch_add(1, SeqCst);
        let running = Running(self);
        // Counted first: a freeze sees either this caller, or this caller sees the freeze.
        match self.is_frozen() {
            true => Err(BackendError::busy(
                "the manager is frozen; ask again when it is thawed",
            )),
            false => Ok(running),
        }
    }

    fn leave(&self) {
        let was_last = self.0.running.fetch_sub(1, SeqCst) == 1;
        // Only a freeze waits, and it says so before it counts who is at work.
        if was_last && self.is_frozen() {
            self.0.idle.notify_waiters();
        }
    }

    /// Freezes, unless it is so already. What is returned thaws again when it is dropped.
    pub(crate) fn freeze(&self) -> Option<Thaw> {
        let was_frozen = self.0.frozen.swap(true, SeqCst);
        (!was_frozen).then(|| Thaw(self.clone()))
    }

    /// Waits for everybody at work, once the manager is frozen.
    pub(crate) async fn until_idle(&self) {
        loop {
            let idle = self.0.idle.notified();
            if self.0.running.load(SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }

    pub(crate) fn thaw(&self) {
        self.0.frozen.store(false, SeqCst);
        for name in self.0.dropped.lock().drain(..) {
            self.give_back(&name);
        }
    }

    /// The records of all names that hold something.
    pub(crate) fn named(&self) -> Vec<Record> {
        let names = self.0.names.lock();
        let holders = names.iter().filter_map(|(name, of)| {
            let (name, of) = (name.clone(), of.clone()?);
            Some(Record::Holder(HolderRecord { name, of }))
        });
        holders.collect()
    }

    fn give_back(&self, name: &HolderName) {
        let inner = &self.0;
        let held = inner.names.lock().get(name).is_some_and(Option::is_some);
        if held {
            inner.records.remove(|| RecordKey::Holder(name.clone()));
        }
        inner.names.lock().remove(name);
    }

    pub(crate) fn records(&self) -> &Recorder {
        &self.0.records
    }

    /// Takes a name, before anything is set up for it.
    pub(crate) fn reserve(&self, name: &HolderName) -> Result<Holder, BackendError> {
        match self.0.names.lock().entry(name.clone()) {
            Entry::Occupied(_) => Err(BackendError::conflict(format!(
                "holder {name} has a handle already; release that first, or use another name"
            ))),
            Entry::Vacant(free) => {
                free.insert(None);
                Ok(self.holder(name.clone()))
            }
        }
    }

    /// Takes a name that the journal has, before any caller has the manager.
    pub(crate) fn restore(&self, name: HolderName, of: RecordKey) -> Holder {
        self.0.names.lock().insert(name.clone(), Some(of));
        self.holder(name)
    }

    pub(crate) fn is_taken(&self, name: &HolderName) -> bool {
        self.0.names.lock().contains_key(name)
    }

    fn holder(&self, name: HolderName) -> Holder {
        Holder {
            holders: self.clone(),
            name,
            kept: AtomicBool::new(false),
        }
    }
}

impl Holder {
    /// Writes down what the name holds, once that is up and before its caller has the handle.
    pub(crate) fn hold(&self, of: RecordKey) -> Result<(), Error> {
        let inner = &self.holders.0;
        let record = || {
            let (name, of) = (self.name.clone(), of.clone());
            Record::Holder(HolderRecord { name, of })
        };
        inner.records.put(record)?;
        inner.names.lock().insert(self.name.clone(), Some(of));
        Ok(())
    }

    /// Leaves the name to what it holds, which stays for the next process.
    pub(crate) fn keep(&self) {
        self.kept.store(true, SeqCst);
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if *self.kept.get_mut() {
            return;
        }
        match self.holders.is_frozen() {
            true => self.holders.0.dropped.lock().push(self.name.clone()),
            false => self.holders.give_back(&self.name),
        }
    }
}

/// A caller at work.
pub(crate) struct Running<'a>(&'a Holders);

/// A caller whose work may outlive it.
pub(crate) struct RunningInTask(Holders);

impl Running<'_> {
    pub(crate) fn in_task(self) -> RunningInTask {
        let holders = self.0.clone();
        // Still counted.
        std::mem::forget(self);
        RunningInTask(holders)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for RunningInTask {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Thaws a manager whose freeze has not come to its end.
pub(crate) struct Thaw(Holders);

impl Thaw {
    pub(crate) fn keep_frozen(self) {
        std::mem::forget(self);
    }
}

impl Drop for Thaw {
    fn drop(&mut self) {
        self.0.thaw();
    }
}
