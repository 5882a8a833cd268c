//! What callers hold of the table: a share of what is up, or a tear-down that is owed.

use std::sync::Arc;

use tracing::{Instrument, error};

use super::entry::{Entry, State};
use super::{Driver, Table, interrupted};
use crate::release::{PendingRelease, ReleaseError, Releasing};
use crate::sync::{Handle, lock, oneshot, timeout};

/// One caller's share of a resource that is up; its `Drop` gives it back.
pub(crate) struct Lease<D: Driver>(Option<Share<D>>);

struct Share<D: Driver> {
    table: Arc<Table<D>>,
    entry: Arc<Entry<D>>,
}

impl<D: Driver> Lease<D> {
    /// For one that has been counted.
    pub(super) fn new(table: &Arc<Table<D>>, entry: Arc<Entry<D>>) -> Self {
        let table = Arc::clone(table);
        Lease(Some(Share { table, entry }))
    }

    pub(crate) fn resource(&self) -> &D::Resource {
        let share = self.0.as_ref().expect("held until it is released");
        let resource = share.entry.resource.get();
        resource.expect("set before the first lease was born")
    }

    /// Gives the lease back. It is counted back when this returns; the future waits for the
    /// tear-down if it was the last, and dropping it gives up that wait, not the tear-down.
    pub(crate) fn release(mut self) -> Releasing {
        let owed = self.0.take().and_then(Share::give_back);
        let payment = owed.map(PendingTeardown::start);
        Box::pin(async move {
            match payment {
                Some(payment) => payment.wait().await,
                None => Ok(()),
            }
        })
    }
}

impl<D: Driver> Drop for Lease<D> {
    fn drop(&mut self) {
        if let Some(owed) = self.0.take().and_then(Share::give_back) {
            // Nobody waits: the task logs what goes wrong.
            drop(owed.start());
        }
    }
}

impl<D: Driver> Share<D> {
    /// Counts the share back; answers with what is owed if it was the last.
    fn give_back(self) -> Option<PendingTeardown<D>> {
        match &mut *lock(&self.entry.state) {
            State::Up(leases) if *leases > 1 => {
                *leases -= 1;
                return None;
            }
            last => {
                debug_assert!(matches!(last, State::Up(1)), "a lease keeps its entry up");
                *last = State::Draining {
                    attempts: 0,
                    error: None,
                };
            }
        }
        Some(PendingTeardown::new(&self.table, &self.entry))
    }
}

/// A tear-down that one entry owes.
pub(super) struct PendingTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: Arc<Entry<D>>,
    /// The attempts made so far, to share the outcome of those under way; `None` to insist.
    queued_at: Option<usize>,
}

/// A tear-down under way in a task of its own.
pub(super) struct Payment<D: Driver> {
    table: Arc<Table<D>>,
    entry: Arc<Entry<D>>,
    outcome: oneshot::Receiver<Result<Releasing, ReleaseError>>,
}

impl<D: Driver> PendingTeardown<D> {
    pub(super) fn new(table: &Arc<Table<D>>, entry: &Arc<Entry<D>>) -> Self {
        let queued_at = Some(entry.attempts());
        PendingTeardown {
            table: Arc::clone(table),
            entry: Arc::clone(entry),
            queued_at,
        }
    }

    /// The same, to be paid by attempts of one's own, whatever comes of those under way.
    pub(super) fn forced(self) -> Self {
        PendingTeardown {
            queued_at: None,
            ..self
        }
    }

    pub(super) fn boxed(self) -> Box<dyn PendingRelease> {
        Box::new(self)
    }

    /// Begins to pay, in a task of its own.
    pub(super) fn start(self) -> Payment<D> {
        let PendingTeardown {
            table,
            entry,
            queued_at,
        } = self;
        let (answer, outcome) = oneshot::channel();
        let payment = Arc::clone(&table).retry(Arc::clone(&entry), queued_at);
        let task = async move {
            // Where nobody waits, the layer below logs its own errors.
            if let Err(Err(unheard)) = answer.send(payment.await) {
                unheard.log();
            }
        };
        let here = Handle::try_current().ok();
        match here.as_ref().or(table.runtime.get()) {
            Some(runtime) => drop(runtime.spawn(task.in_current_span())),
            None => error!("no runtime to release in; it is owed until the next drain"),
        }
        Payment {
            table,
            entry,
            outcome,
        }
    }
}

impl<D: Driver> Payment<D> {
    pub(super) async fn wait(self) -> Result<(), ReleaseError> {
        let Payment {
            table,
            entry,
            outcome,
        } = self;
        let cause = match timeout(table.timeout, outcome).await {
            Ok(Ok(outcome)) => return outcome?.await,
            Ok(Err(_)) => interrupted(),
            Err(_) => table.timed_out(),
        };
        let error = table.driver.error(&entry.key, entry.resource.get(), cause);
        Err(ReleaseError::new(
            error,
            PendingTeardown::new(&table, &entry).boxed(),
        ))
    }
}

impl<D: Driver> PendingRelease for PendingTeardown<D> {
    fn retry(self: Box<Self>) -> Releasing {
        Box::pin(async move {
            PendingTeardown::new(&self.table, &self.entry)
                .start()
                .wait()
                .await
        })
    }
}
