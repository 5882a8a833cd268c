//! Names for handles that are found again after a restart.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::error;

use crate::journal::{HolderRecord, Record, RecordKey, Recorder};
use crate::{BackendError, Error, HolderName};

/// The names that are taken in one manager, and its way to the journal.
#[derive(Clone, Default)]
pub(crate) struct Holders(Arc<Inner>);

#[derive(Default)]
struct Inner {
    records: Recorder,
    /// Held for a look-up, never while the journal is written.
    names: Mutex<HashMap<HolderName, Option<RecordKey>>>,
}

/// A name that is taken. Dropping it gives the name back, and removes its record first.
pub(crate) struct Holder {
    holders: Holders,
    name: HolderName,
}

impl Holders {
    pub(crate) fn new(records: Recorder) -> Self {
        let names = Mutex::default();
        Holders(Arc::new(Inner { records, names }))
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
        let holders = self.clone();
        Holder { holders, name }
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
}

impl Drop for Holder {
    fn drop(&mut self) {
        let inner = &self.holders.0;
        let name = &self.name;
        let held = inner.names.lock().get(name).is_some_and(Option::is_some);
        if held && let Err(error) = inner.records.remove(|| RecordKey::Holder(name.clone())) {
            error!(holder = %name, cause = %error.cause(), "a holder that has released stays in the journal");
        }
        inner.names.lock().remove(name);
    }
}
