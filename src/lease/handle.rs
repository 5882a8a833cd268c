//! What callers hold of the table: a share of what is up, or a pending tear-down.

use std::sync::Arc;

use tracing::error;

use super::begin::{Begun, Work, begin, go_on};
use super::entry::{EntryRef, State, Turn};
use super::{Driver, Table, interrupted};
use crate::release::{PendingRelease, ReleaseError, Releasing, nothing_to_release};
use crate::sync::{Handle, lock, oneshot, timeout};

/// One caller's share of a resource that is up; its `Drop` releases it.
pub(crate) struct Lease<D: Driver>(
    /// None once it is released.
    Option<EntryRef<D>>,
);

/// Tells one resource that is up from all others, also from a later one under its key. It keeps nothing up.
pub(crate) struct Which<D: Driver>(pub(super) EntryRef<D>);

impl<D: Driver> Which<D> {
    /// What is up of it, or was.
    pub(crate) fn resource(&self) -> Option<&D::Resource> {
        self.0.resource.get()
    }

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
    pub(super) fn new(entry: EntryRef<D>) -> Self {
        Lease(Some(entry))
    }

    fn entry(&self) -> &EntryRef<D> {
        self.0.as_ref().expect("held until it is released")
    }

    pub(crate) fn resource(&self) -> &D::Resource {
        let resource = self.entry().resource.get();
        resource.expect("set before the first lease was born")
    }

    pub(crate) fn key(&self) -> &D::Key {
        &self.entry().key
    }

    pub(crate) fn which(&self) -> Which<D> {
        Which(EntryRef::clone(self.entry()))
    }

    /// One more share of what this one keeps up.
    pub(crate) fn share(&self) -> Self {
        let entry = self.entry();
        match &mut lock(&entry.held).state {
            State::Up(shares) => shares.count += 1,
            _ => unreachable!("a lease keeps its entry up"),
        }
        Lease::new(EntryRef::clone(entry))
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
        let entry = self.0.take();
        let last = entry.and_then(|entry| give_back(entry, may_linger));
        last.map_or_else(nothing_to_release, LastShare::start)
    }

    /// Gives the lease up without releasing it: what it keeps up stays in use for as long as its table lives.
    pub(crate) fn abandon(mut self) {
        if let Some(entry) = self.0.take() {
            let table = match &mut lock(&entry.held).state {
                State::Up(shares) => shares.table.take(),
                _ => None,
            };
            // Only now, without the lock.
            drop(table);
        }
    }
}

impl<D: Driver> Drop for Lease<D> {
    fn drop(&mut self) {
        let entry = self.0.take();
        let last = entry.and_then(|entry| give_back(entry, true));
        if let Some(last) = last.filter(|last| !last.table.driver.is_frozen()) {
            // Without a caller that waits, its error is logged. No backend is called in a `Drop`.
            drop(last.start_in_task());
        }
    }
}

/// Counts a share of an entry back; returns the tear-down to run if it was the last and the resource does not linger.
fn give_back<D: Driver>(entry: EntryRef<D>, may_linger: bool) -> Option<LastShare<D>> {
    let mut held = lock(&entry.held);
    let State::Up(shares) = &mut held.state else {
        debug_assert!(false, "a lease keeps its entry up");
        return None;
    };
    shares.count -= 1;
    if shares.count > 0 {
        return None;
    }
    // There is one: a lease that was abandoned stays counted.
    let table = shares.table.take()?;
    let number = match may_linger && table.lets_linger(&entry) {
        true => table.lingering.add(|| Table::lingerer(&table, &entry)),
        false => None,
    };
    if let Some(number) = number {
        held.state = State::Lingering(number);
        drop(held);
        table.lingering.enforce(|| table.runtime());
        return None;
    }
    held.state = State::released();
    let turn = held.free_turn(&entry);
    drop(held);
    Some(LastShare { table, entry, turn })
}

/// What is left of the last share of an entry: a tear-down that nobody has attempted yet.
struct LastShare<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    /// None if somebody is at work on the entry.
    turn: Option<Turn<D>>,
}

impl<D: Driver> LastShare<D> {
    fn start(self) -> Releasing {
        let LastShare { table, entry, turn } = self;
        start(table, entry, Some(0), turn)
    }

    /// The task asks for the turn when it runs, which it may never do.
    fn start_in_task(self) -> Releasing {
        let LastShare { table, entry, turn } = self;
        drop(turn);
        start_in_task(table, entry, Some(0))
    }
}

/// The pending tear-down of one entry.
pub(super) struct PendingTeardown<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    /// The attempts made so far, to share the outcome of those under way; `None` to make an attempt in any case.
    queued_at: Option<usize>,
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
    pub(super) fn start(self) -> Releasing {
        start(self.table, self.entry, self.queued_at, None)
    }

    /// Runs it in a task from the beginning.
    pub(super) fn start_in_task(self) -> Releasing {
        start_in_task(self.table, self.entry, self.queued_at)
    }
}

fn start<D: Driver>(
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    queued_at: Option<usize>,
    turn: Option<Turn<D>>,
) -> Releasing {
    if Handle::try_current().is_err() {
        drop(turn);
        return start_in_task(table, entry, queued_at);
    }
    let (of, in_table) = (EntryRef::clone(&entry), Arc::clone(&table));
    match begin(Box::pin(table.retry(entry, queued_at, turn))) {
        Begun::Over(releasing) => releasing,
        Begun::Waits(work) => go_on_in_task(in_table, of, work),
    }
}

fn start_in_task<D: Driver>(
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    queued_at: Option<usize>,
) -> Releasing {
    let (of, in_table) = (EntryRef::clone(&entry), Arc::clone(&table));
    go_on_in_task(in_table, of, Box::pin(table.retry(entry, queued_at, None)))
}

fn go_on_in_task<D: Driver>(
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
    work: Work<Releasing>,
) -> Releasing {
    let outcome = table.runtime().map(|runtime| {
        let (answer, outcome) = oneshot::channel();
        go_on(&runtime, async move { drop(answer.send(work.await)) });
        outcome
    });
    if outcome.is_none() {
        error!("no runtime to release in; it is pending until the next drain");
    }
    Releasing::waits(async move {
        let cause = match outcome {
            None => interrupted(),
            Some(outcome) => match timeout(table.timeout, outcome).await {
                Ok(Ok(releasing)) => return releasing.await,
                Ok(Err(_)) => interrupted(),
                Err(_) => table.timed_out(),
            },
        };
        let error = table.driver.error(&entry.key, entry.resource.get(), cause);
        let pending = PendingTeardown::new(&table, &entry).boxed();
        Err(ReleaseError::new(error, pending))
    })
}

impl<D: Driver> PendingRelease for PendingTeardown<D> {
    fn retry(self: Box<Self>) -> Releasing {
        PendingTeardown::new(&self.table, &self.entry).start()
    }
}
