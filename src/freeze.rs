//! A manager that stands still, so that what it has can be handed over.

use std::fmt;

use crate::holders::Thaw;
use crate::{BackendError, Drained, Error, Manager, Snapshot, Step};

/// A manager that stands still: it refuses new work, and tears nothing down.
///
/// A handle that is dropped meanwhile leaves what it holds in the VM, and its holder in the records. Dropped itself, it leaves
/// the manager frozen for good: the VM is somebody else's by then. A journal of that manager is of no more use; the
/// program removes it.
#[must_use = "the manager is frozen until it is thawed"]
pub struct Frozen {
    manager: Manager,
}

impl Manager {
    /// Refuses new work (`Busy`), and waits for what is under way. A tear-down that is pending stays so.
    ///
    /// # Errors
    ///
    /// `Busy` if it is frozen already.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future thaws the manager; what was released meanwhile is pending until the next [`drain`](Self::drain).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn freeze(&self) -> Result<Frozen, Error> {
        let Some(thaw) = self.holders().freeze() else {
            let cause = BackendError::busy("the manager is frozen already");
            return Err(Error::new(Step::Recover, cause));
        };
        self.holders().until_idle().await;
        // Tears nothing down by now: it waits for the tasks whose callers have given up.
        drop(self.drain().await);
        Thaw::keep_frozen(thaw);
        let manager = self.clone();
        Ok(Frozen { manager })
    }
}

impl Frozen {
    /// What the manager has, for [`ManagerBuilder::restore`](crate::ManagerBuilder::restore).
    pub fn snapshot(&self) -> Snapshot {
        let mut records = self.manager.attachments().records();
        records.extend(self.manager.mounts().records());
        records.extend(self.manager.stacks.records());
        records.extend(self.manager.views.records());
        records.extend(self.manager.holders().named());
        Snapshot::new(records)
    }

    /// Lets the manager go on, and tears down what was released or dropped meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-downs.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn thaw(self) -> Drained {
        self.manager.holders().thaw();
        self.manager.drain().await
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frozen")
            .field("manager", &self.manager)
            .finish()
    }
}
