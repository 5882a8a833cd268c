//! What callers hold of the table: a share of what is up, or a pending tear-down.

use std::sync::Arc;

use tracing::error;

use super::begin::{Begun, Work, begin, go_on};
use super::entry::{EntryRef, State};
use super::{Driver, Table, interrupted};
use crate::release::{PendingRelease, ReleaseError, Releasing, Unheard};
use crate::sync::{Handle, lock, oneshot, timeout};

/// One caller's share of a resource that is up; its `Drop` releases it.
pub(crate) struct Lease<D: Driver>(Option<Share<D>>);

struct Share<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
}

/// Tells one resource that is up from all others, also from a later one under its key. It keeps nothing up.
pub(crate) struct Which<D: Driver>(EntryRef<D>);

impl<D: Driver> Which<D> {
    pub(crate) fn key(&self) -> &D::Key {
        &self.0.key
    }
}

impl<D: Driver> PartialEq for Which<D> {
    fn eq(&self, other: &Self) -> bool {
        EntryRef::ptr_eq(&self.0, &other.0)
    }
}

impl<D: Driver> Lease<D> {
    /// For one that has been counted.
    pub(super) fn new(table: &Arc<Table<D>>, entry: EntryRef<D>) -> Self {
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

    pub(crate) fn which(&self) -> Which<D> {
        let share = self.0.as_ref().expect("held until it is released");
        Which(EntryRef::clone(&share.entry))
    }

    /// One more share of what this one keeps up.
    pub(crate) fn share(&self) -> Self {
        let Share { table, entry } = self.0.as_ref().expect("held until it is released");
        let shared = table.join_entry(EntryRef::clone(entry));
        shared.expect("a lease keeps its entry up")
    }

    /// Releases the lease. It is counted back when this returns; the future waits for the tear-down if
    /// it was the last, and dropping it ends that wait, not the tear-down.
    pub(crate) fn release(self) -> Releasing {
        self.give_back(true)
    }

    /// The same for what must not linger: its tear-down is a part of another one.
    pub(crate) fn release_now(self) -> Releasing {
        self.give_back(false)
    }

    fn give_back(mut self, may_linger: bool) -> Releasing {
        let share = self.0.take();
        let pending = share.and_then(|share| share.give_back(may_linger));
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
        let share = self.0.take();
        let pending = share.and_then(|share| share.give_back(true));
        if let Some(pending) = pending.filter(|pending| !pending.table.driver.is_frozen()) {
            // Without a caller that waits, its error is logged. No backend is called in a `Drop`.
            drop(pending.start_in_task());
        }
    }
}

impl<D: Driver> Share<D> {
    /// Counts the share back; returns the tear-down to run if it was the last and the resource does not linger.
    fn give_back(self, may_linger: bool) -> Option<PendingTeardown<D>> {
        let Share { table, entry } = self;
        let mut held = lock(&entry.held);
        match &mut held.state {
            State::Up(leases) if *leases > 1 => {
                *leases -= 1;
                return None;
            }
            last => debug_assert!(matches!(last, State::Up(1)), "a lease keeps its entry up"),
        }
        let number = match may_linger && table.lets_linger(&entry) {
            true => table.lingering.add(|| Table::lingerer(&table, &entry)),
            false => None,
        };
        held.state = number.map_or_else(State::released, State::Lingering);
        drop(held);
        if number.is_some() {
            table.lingering.enforce(|| table.runtime());
            return None;
        }
        Some(PendingTeardown::new(&table, &entry))
    }
}

/// The pending tear-down of one entry.
pub(super) struct PendingTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    /// The attempts made so far, to share the outcome of those under way; `None` to make an attempt in any case.
    queued_at: Option<usize>,
}

/// A tear-down under way in a task of its own.
pub(super) struct RunningTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    outcome: Outcome,
}

enum Outcome {
    Over(Unheard<Releasing>),
    Waits(oneshot::Receiver<Unheard<Releasing>>),
    /// There is no runtime to begin in.
    Never,
}

impl<D: Driver> PendingTeardown<D> {
    pub(super) fn new(table: &Arc<Table<D>>, entry: &EntryRef<D>) -> Self {
        let queued_at = Some(entry.attempts());
        PendingTeardown {
            table: Arc::clone(table),
            entry: EntryRef::clone(entry),
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

    /// Begins it here, and goes on in a task of its own if it has to wait.
    pub(super) fn start(self) -> RunningTeardown<D> {
        if Handle::try_current().is_err() {
            return self.start_in_task();
        }
        match begin(self.attempt()) {
            Begun::Waits(work) => self.go_on(work),
            Begun::Over(outcome) => {
                let outcome = Outcome::Over(Unheard::new(outcome));
                self.running(outcome)
            }
        }
    }

    /// Runs it in a task from the beginning.
    pub(super) fn start_in_task(self) -> RunningTeardown<D> {
        let work = self.attempt();
        self.go_on(work)
    }

    fn attempt(&self) -> Work<Result<Releasing, ReleaseError>> {
        let (table, entry) = (Arc::clone(&self.table), EntryRef::clone(&self.entry));
        Box::pin(table.retry(entry, self.queued_at))
    }

    fn go_on(self, work: Work<Result<Releasing, ReleaseError>>) -> RunningTeardown<D> {
        let Some(runtime) = self.table.runtime() else {
            error!("no runtime to release in; it is pending until the next drain");
            return self.running(Outcome::Never);
        };
        let (answer, outcome) = oneshot::channel();
        go_on(&runtime, async move {
            drop(answer.send(Unheard::new(work.await)));
        });
        self.running(Outcome::Waits(outcome))
    }

    fn running(self, outcome: Outcome) -> RunningTeardown<D> {
        let PendingTeardown { table, entry, .. } = self;
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
        let cause = match outcome {
            Outcome::Over(outcome) => return outcome.hear()?.await,
            Outcome::Never => interrupted(),
            Outcome::Waits(outcome) => match timeout(table.timeout, outcome).await {
                Ok(Ok(outcome)) => return outcome.hear()?.await,
                Ok(Err(_)) => interrupted(),
                Err(_) => table.timed_out(),
            },
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
