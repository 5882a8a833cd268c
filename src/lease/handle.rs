//! What callers hold of the table: a share of what is up, or a pending tear-down.

use std::sync::Arc;

use tracing::{Instrument, error};

use super::entry::{Entry, State};
use super::{Driver, Table, interrupted};
use crate::release::{PendingRelease, ReleaseError, Releasing, Unheard};
use crate::sync::{Handle, lock, oneshot, timeout};

/// One caller's share of a resource that is up; its `Drop` releases it.
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

    pub(crate) fn key(&self) -> &D::Key {
        let share = self.0.as_ref().expect("held until it is released");
        &share.entry.key
    }

    /// One more share of what this one keeps up.
    pub(crate) fn share(&self) -> Self {
        let Share { table, entry } = self.0.as_ref().expect("held until it is released");
        let shared = table.join_entry(Arc::clone(entry));
        shared.expect("a lease keeps its entry up")
    }

    /// Releases the lease. It is counted back when this returns; the future waits for the tear-down if
    /// it was the last, and dropping it ends that wait, not the tear-down.
    pub(crate) fn release(mut self) -> Releasing {
        let pending = self.0.take().and_then(Share::give_back);
        let teardown = pending.map(PendingTeardown::start);
        Box::pin(async move {
            match teardown {
                Some(teardown) => teardown.wait().await,
                None => Ok(()),
            }
        })
    }

    /// Gives the lease up without releasing it: what it keeps up stays in use for as long as its table lives.
    pub(crate) fn abandon(mut self) {
        drop(self.0.take());
    }
}

impl<D: Driver> Drop for Lease<D> {
    fn drop(&mut self) {
        let pending = self.0.take().and_then(Share::give_back);
        if let Some(pending) = pending.filter(|pending| !pending.table.driver.is_frozen()) {
            // Without a caller that waits, its error is logged.
            drop(pending.start());
        }
    }
}

impl<D: Driver> Share<D> {
    /// Counts the share back; returns the tear-down to run if it was the last.
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

/// The pending tear-down of one entry.
pub(super) struct PendingTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: Arc<Entry<D>>,
    /// The attempts made so far, to share the outcome of those under way; `None` to make an attempt in any case.
    queued_at: Option<usize>,
}

/// A tear-down under way in a task of its own.
pub(super) struct RunningTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: Arc<Entry<D>>,
    outcome: oneshot::Receiver<Unheard<Releasing>>,
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

    /// The same with an attempt of its own, whatever the outcome of those under way.
    pub(super) fn forced(self) -> Self {
        PendingTeardown {
            queued_at: None,
            ..self
        }
    }

    pub(super) fn boxed(self) -> Box<dyn PendingRelease> {
        Box::new(self)
    }

    /// Starts it in a task of its own.
    pub(super) fn start(self) -> RunningTeardown<D> {
        let PendingTeardown {
            table,
            entry,
            queued_at,
        } = self;
        let (answer, outcome) = oneshot::channel();
        let teardown = Arc::clone(&table).retry(Arc::clone(&entry), queued_at);
        let task = async move { drop(answer.send(Unheard::new(teardown.await))) };
        let here = Handle::try_current().ok();
        match here.as_ref().or(table.runtime.get()) {
            Some(runtime) => drop(runtime.spawn(task.in_current_span())),
            None => error!("no runtime to release in; it is pending until the next drain"),
        }
        RunningTeardown {
            table,
            entry,
            outcome,
        }
    }
}

impl<D: Driver> RunningTeardown<D> {
    pub(super) async fn wait(self) -> Result<(), ReleaseError> {
        let RunningTeardown {
            table,
            entry,
            outcome,
        } = self;
        let cause = match timeout(table.timeout, outcome).await {
            Ok(Ok(outcome)) => return outcome.hear()?.await,
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
