//! The lease table: the one place that shares, counts and serialises.
//!
//! Attaching a disk, mounting a device and combining layers are one problem: something that is shared,
//! has a key, is slow to set up, and slow and fallible to tear down. The managers are adapters of this
//! table; what differs between them is a [`Driver`].
//!
//! # States of an entry
//!
//! | state | trigger | next |
//! |---|---|---|
//! | `Idle` | setup succeeds | `Up`, 1 lease |
//! | `Idle` | setup fails | `Gone(error)`, leaves the table; all queued callers get the error, unless it is about the request |
//! | `Idle` | setup is `Uncertain` (or panics) | `Draining`, torn down at once; all queued callers get the error |
//! | `Up` | acquire | `Up`, leases + 1 |
//! | `Up` | a lease is released, others remain | `Up`, leases - 1 |
//! | `Up` | the last lease is released | `Lingering` if it may; else `Draining`, then teardown |
//! | `Lingering` | acquire | `Up`, 1 lease |
//! | `Lingering` | its time is over, its place is needed, its disk has changed, or `drain` | `Draining`, then teardown |
//! | `Draining` | teardown succeeds | `Gone`, leaves the table; the key is free again |
//! | `Draining` | teardown answers `LostWrites` | the same; the error reaches whoever waits for the tear-down |
//! | `Draining` | teardown fails | `Draining` at the step that failed; the next acquire, a retry or `drain` tears down first |
//!
//! # Invariants
//!
//! 1. **The task owns the transition, and the lease is born in it.** Set-up and tear-down begin in their caller and move to a
//!    task of their own as soon as they have to wait (`begin.rs`); callers wait for its answer on a channel. A caller that is
//!    cancelled drops the channel and with it the lease in it, whose `Drop` releases it. There is no cancellation code.
//! 2. **Counting never waits.** The state sits behind a plain mutex that is held for a few
//!    instructions; only transitions queue, for the turn of their entry. A lease that is
//!    released is counted at once, so every later reader sees it.
//! 3. **Pessimism.** Before a driver is called the state is `Draining`; only success changes that. A
//!    panic, or a runtime that shuts down in the middle, leaves the state correct.
//! 4. **Nothing goes before what is above it.** The leases that a job holds are released only once its resource is down. A
//!    table that goes with a tear-down pending leaves them as they are, for the next process.
//! 5. **An entry lives once**: `Idle`, `Up`, `Gone`. A stale handle can never touch what took its key
//!    later. A caller that queued on an entry that went `Gone` gets its error, or looks up a fresh entry.
//!
//! No lock and no map guard is held across I/O but the entry's own. Joining what is up spawns nothing, and neither does a
//! transition that never waits.

use std::hash::Hash;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tracing::Span;

use crate::call::{Answer as BackendAnswer, call};
use crate::journal::Record;
use crate::release::{ReleaseError, Releasing, nothing_to_release};
use crate::sync::{Handle, lock, oneshot, timeout};
use crate::{BackendError, DiskId, Error, ErrorKind, Step};

mod begin;
mod clearing;
mod entries;
mod entry;
mod handle;
mod inspect;
#[cfg(test)]
mod interleavings;
mod lingering;
mod request;

use begin::{Begun, begin, go_on};
pub(crate) use clearing::Tables;
use entries::Entries;
use entry::{Entry, EntryRef, Phase, State, Turn};
use handle::PendingTeardown;
pub(crate) use handle::{Lease, Which};
pub(crate) use lingering::Lingering;
use request::{CancelOnDrop, PendingRequest};

/// What a table does to set a resource up and to tear it down.
///
/// The table never runs two calls for one key at once and lets every call finish.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// What resources are told apart by.
    type Key: Clone + Eq + Hash + Send + Sync + 'static;
    /// Everything needed to set one resource up and to tear it down, and how far that has got.
    type Job: Send + 'static;
    /// What the holders of leases see of a resource that is up.
    type Resource: Send + Sync + 'static;

    /// Sets the resource up. After an error other than `Uncertain` nothing of it is left.
    fn setup(
        &self,
        key: &Self::Key,
        job: &mut Self::Job,
    ) -> impl Future<Output = Result<Self::Resource, Error>> + Send;

    /// Tears the resource down, from the step at which the last attempt stopped. After `LostWrites` it is down.
    fn teardown(
        &self,
        key: &Self::Key,
        job: &mut Self::Job,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Gives back the leases that a job holds. They are counted back when this returns; the future
    /// waits for what that tears down. What they keep up may linger only if the resource `was_up`: after a failure nothing is
    /// left, and a request that is tried again must not meet what it has left itself.
    fn release_held(&self, job: Self::Job, was_up: bool) -> Releasing;

    /// Leaves the leases that a job holds as they are: what they keep up is below a resource that may still be there, and
    /// stays in use for as long as its table lives.
    fn abandon(job: Self::Job);

    /// Refuses a job that cannot share the resource that is up under its key.
    fn check(&self, up: &Self::Resource, wanted: &Self::Job) -> Result<(), Error>;

    /// Whether a resource that is up may be kept for the next caller once nobody has a lease of it.
    fn may_linger(&self, key: &Self::Key, up: &Self::Resource) -> bool;

    /// Whether a resource that is up is of this disk, or stands on it.
    fn is_on(&self, key: &Self::Key, up: &Self::Resource, disk: &DiskId) -> bool;

    /// Whether everything stands still: nothing is torn down.
    fn is_frozen(&self) -> bool;

    /// What a journal has of a resource, if its backend was called.
    fn record(&self, key: &Self::Key, job: &Self::Job, is_up: bool) -> Option<Record>;

    /// An error about a resource, which may be up, for when the driver has nothing to say.
    fn error(&self, key: &Self::Key, up: Option<&Self::Resource>, cause: BackendError) -> Error;
}

/// What a restart has left of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// All of it.
    Up,
    /// It may be there, and something above it has to be torn down first: up, but nobody else can share it.
    Doubtful,
    /// It may be there, and is to be torn down.
    Pending,
    /// What is recorded of it makes no sense: it stays as it is, and nobody can share it.
    Refused,
}

impl Left {
    /// Refuses to share what is not up in whole.
    pub(crate) fn ensure_whole(self) -> Result<(), BackendError> {
        match self {
            Left::Up => Ok(()),
            Left::Doubtful | Left::Pending => Err(BackendError::uncertain(
                "a restart has left it half done; settle the recovery or drain the manager first",
            )),
            Left::Refused => Err(BackendError::conflict(
                "what the journal has of it makes no sense, so it stays as it is; see the report of the recovery",
            )),
        }
    }
}

/// The resources of one kind, by key.
pub(crate) struct Table<D: Driver> {
    entries: Entries<D>,
    driver: D,
    /// What is up and has no lease.
    lingering: Lingering,
    /// How long a caller waits for a task.
    timeout: Duration,
    /// Where releases run that are dropped outside of any runtime.
    runtime: OnceLock<Handle>,
}

/// The answer to one caller. If the caller is gone, the lease is released by its `Drop`.
type Answer<D> = Result<Lease<D>, Error>;

type Request<D> = PendingRequest<<D as Driver>::Job, Answer<D>>;

impl<D: Driver> Table<D> {
    pub(crate) fn new(driver: D, lingering: Lingering, timeout: Duration) -> Arc<Self> {
        Arc::new(Table {
            entries: Entries::default(),
            driver,
            lingering,
            timeout,
            runtime: OnceLock::new(),
        })
    }

    pub(crate) fn driver(&self) -> &D {
        &self.driver
    }

    /// What is under a key, whatever becomes of it.
    pub(crate) fn find(&self, key: &(impl Hash + PartialEq<D::Key>)) -> Option<Which<D>> {
        self.entries.read(key, EntryRef::clone).map(Which)
    }

    /// Shares a resource that was found, without waiting. None if it is not up.
    pub(crate) fn join(self: &Arc<Self>, found: Which<D>) -> Option<Lease<D>> {
        self.join_entry(found.0)
    }

    /// A share of each resource that is up and wanted.
    pub(crate) fn shares(
        self: &Arc<Self>,
        is_wanted: impl Fn(&D::Resource) -> bool,
    ) -> Vec<Lease<D>> {
        let up = self.entries.snapshot().into_iter();
        let wanted = up.filter(|entry| entry.resource.get().is_some_and(&is_wanted));
        wanted.filter_map(|entry| self.join_entry(entry)).collect()
    }

    /// Reads a resource that was up a moment ago, and may be on its way down.
    pub(crate) fn peek<T>(
        &self,
        key: &D::Key,
        read: impl FnOnce(&D::Key, &D::Resource) -> T,
    ) -> Option<T> {
        let read = |entry: &EntryRef<D>| entry.resource.get().map(|up| read(&entry.key, up));
        self.entries.read(key, read)?
    }

    /// Reads the key of an entry as its first caller had it.
    pub(crate) fn key<T>(&self, key: &D::Key, read: impl FnOnce(&D::Key) -> T) -> Option<T> {
        self.entries.read(key, |entry| read(&entry.key))
    }

    fn join_entry(self: &Arc<Self>, entry: EntryRef<D>) -> Option<Lease<D>> {
        match &mut lock(&entry.held).state {
            State::Up(shares) => shares.count += 1,
            state @ &mut State::Lingering(number) => {
                self.lingering.remove(number);
                *state = State::up(Arc::clone(self));
            }
            _ => return None,
        }
        Some(Lease::new(entry))
    }

    /// Shares the resource under `key`, and sets it up first if need be. `check` refuses to share what is up; `job` is made if
    /// it is needed.
    ///
    /// Dropping the future ends the wait, not the work: what is under way is finished, and its lease is
    /// released.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        key: &D::Key,
        check: impl FnOnce(&D::Resource) -> Result<(), Error>,
        job: impl FnOnce() -> D::Job,
    ) -> Answer<D> {
        self.runtime.get_or_init(Handle::current);
        // The entry is in the table before the work begins, so that a `drain` from now on sees it.
        let entry = self.entry(key);
        if let Some(mut turn) = Entry::first_turn(&entry) {
            turn.job = Some(job());
            return self.acquire_first(key, turn).await;
        }
        if let Some(lease) = self.join_entry(entry) {
            return check(lease.resource()).map(|()| lease);
        }
        // Boxed as all that few callers come to: the future of each one would have room for it.
        Box::pin(self.acquire_queued(key, job())).await
    }

    /// Sets up what nobody else works on.
    async fn acquire_first(self: &Arc<Self>, key: &D::Key, turn: Turn<D>) -> Answer<D> {
        let work = match begin(Box::pin(Arc::clone(self).setup(turn))) {
            Begun::Over((answer, turn)) => {
                drop(turn);
                return answer;
            }
            Begun::Waits(work) => work,
        };
        let (answer, outcome) = oneshot::channel();
        go_on(&Handle::current(), async move {
            let (outcome, turn) = work.await;
            // Sent while this work has the turn: if the caller is gone, the lease is counted back before another task
            // reads the state.
            drop(answer.send(outcome));
            drop(turn);
        });
        Box::pin(self.wait(key, outcome)).await
    }

    /// Queues for what somebody else works on, or what has to be torn down first.
    async fn acquire_queued(self: &Arc<Self>, key: &D::Key, job: D::Job) -> Answer<D> {
        let request = PendingRequest::new(job);
        let work = Arc::clone(self).run(key.clone(), request.clone());
        let work = match begin(Box::pin(work)) {
            Begun::Over(answer) => {
                return answer.expect("nobody cancels a request before its caller waits");
            }
            Begun::Waits(work) => work,
        };
        let outcome = request.receive();
        go_on(&Handle::current(), async move { drop(work.await) });
        let _on_cancellation = CancelOnDrop(request);
        self.wait(key, outcome).await
    }

    /// Waits for the answer of a task.
    async fn wait(&self, key: &D::Key, outcome: oneshot::Receiver<Answer<D>>) -> Answer<D> {
        let cause = match timeout(self.timeout, outcome).await {
            Ok(Ok(outcome)) => return outcome,
            Ok(Err(_)) => interrupted(),
            Err(_) => self.timed_out(),
        };
        Err(self.driver.error(key, None, cause))
    }

    /// Answers one caller: queues for the key, reads the state, and sets up, shares or tears down accordingly. The answer
    /// comes back if nobody waits for it elsewhere.
    async fn run(self: Arc<Self>, key: D::Key, request: Request<D>) -> Option<Answer<D>> {
        let mut entry = self.entry(&key);
        loop {
            let queued_at = Some(entry.attempts());
            let mut turn = Entry::turn(&entry).await;
            let refusal = match entry.phase(queued_at) {
                Phase::Idle => match request.take() {
                    Some(wanted) => {
                        turn.job = Some(wanted);
                        let (answer, turn) = self.setup(turn).await;
                        // As in `acquire_first`.
                        let unsent = request.answer(answer);
                        drop(turn);
                        return unsent;
                    }
                    // Cancelled before its turn: there is nothing to begin.
                    None => {
                        self.remove(&entry, None);
                        return None;
                    }
                },
                Phase::Up | Phase::Lingering => match self.join_entry(EntryRef::clone(&entry)) {
                    // The last lease was released since the state was read.
                    None => continue,
                    Some(lease) => {
                        match request.peek(|job| self.driver.check(lease.resource(), job))? {
                            Ok(()) => return self.hand_over(lease, &request).await,
                            Err(refusal) => refusal,
                        }
                    }
                },
                Phase::Draining if request.is_cancelled() => return None,
                Phase::Draining => match self.teardown(&mut turn).await {
                    Err(error) => error,
                    Ok(rest) => {
                        drop(turn);
                        log_failure(rest.await);
                        entry = self.entry(&key);
                        continue;
                    }
                },
                Phase::Failed(error) | Phase::Gone(Some(error)) => error,
                Phase::Gone(None) => {
                    drop(turn);
                    entry = self.entry(&key);
                    continue;
                }
            };
            // Released while this work holds the entry, as everywhere.
            let unused = request
                .take()
                .map(|unused| self.driver.release_held(unused, false));
            drop(turn);
            if let Some(rest) = unused {
                log_failure(rest.await);
            }
            return request.answer(Err(refusal));
        }
    }

    /// Answers with a share of what is up. The caller has the entry's turn.
    async fn hand_over(&self, lease: Lease<D>, request: &Request<D>) -> Option<Answer<D>> {
        if let Some(unused) = request.take() {
            // The resource holds leases of its own, so none of these is the last.
            log_failure(self.driver.release_held(unused, false).await);
        }
        request.answer(Ok(lease))
    }

    /// Sets up what an idle entry stands for. The answer comes with the turn that it is to be sent in, if it is a lease.
    async fn setup(self: Arc<Self>, mut turn: Turn<D>) -> (Answer<D>, Option<Turn<D>>) {
        let (entry, job) = turn.work();
        entry.set(State::released());
        match self.driver.setup(&entry.key, job).await {
            Ok(resource) => {
                let _set_once = entry.resource.set(resource);
                entry.set(State::up(self));
                let entry = EntryRef::clone(entry);
                (Ok(Lease::new(entry)), Some(turn))
            }
            Err(error) => {
                Box::pin(self.clean_up(turn, error.clone())).await;
                (Err(error), None)
            }
        }
    }

    /// Sees to it that nothing is left of a set-up that has failed, and ends the turn.
    async fn clean_up(&self, mut turn: Turn<D>, error: Error) {
        let (entry, job) = turn.work();
        // An uncertain resource has no lease whose release would tear it down.
        let uncertain = error.kind() == ErrorKind::Uncertain;
        let left = match uncertain {
            true => self.driver.teardown(&entry.key, job).await,
            false => Ok(()),
        };
        if left.is_err_and(|left| left.kind() != ErrorKind::LostWrites) {
            entry.set(State::failed(1, error));
            return;
        }
        // An error about the request concerns this caller alone: a queued caller may have requested
        // something else, and tries for itself.
        let about_request = matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Invalid);
        let rest = self.retire(&mut turn, (!about_request).then_some(error));
        drop(turn);
        log_failure(rest.await);
    }

    /// Tears an entry down. The leases that it held are counted back by then; the returned future waits for
    /// what that tears down.
    async fn teardown(&self, turn: &mut Turn<D>) -> Result<Releasing, Error> {
        let (entry, job) = turn.work();
        match self.driver.teardown(&entry.key, job).await {
            Ok(()) => Ok(self.retire(turn, None)),
            Err(lost) if lost.kind() == ErrorKind::LostWrites => {
                let lost = Err(ReleaseError::lost_writes(lost));
                Ok(self.retire(turn, None).after(lost))
            }
            Err(error) => {
                let attempts = entry.attempts() + 1;
                entry.set(State::failed(attempts, error.clone()));
                Err(error)
            }
        }
    }

    /// Takes an entry out of the table, its resource being down.
    fn retire(&self, turn: &mut Turn<D>, outcome: Option<Error>) -> Releasing {
        // Counted back before the entry leaves the table: a caller that finds no entry finds no leases of it either.
        let (entry, job) = turn.take_work();
        let was_up = entry.resource.get().is_some();
        let rest = self.driver.release_held(job, was_up);
        self.remove(entry, outcome);
        rest
    }

    fn remove(&self, entry: &EntryRef<D>, outcome: Option<Error>) {
        self.entries.remove(entry);
        entry.set(State::Gone(outcome));
    }

    /// Retries the pending tear-down of an entry, unless it is done. The leases that it held are released by
    /// then; what is returned waits for what that tears down, and has its errors.
    async fn retry(
        self: Arc<Self>,
        entry: EntryRef<D>,
        queued_at: Option<usize>,
        turn: Option<Turn<D>>,
    ) -> Releasing {
        let (mut turn, phase) = match turn {
            // The release that made it pending has had the turn since.
            Some(turn) => (turn, Phase::Draining),
            None => {
                let turn = Entry::turn(&entry).await;
                if queued_at.is_none() {
                    // The caller of the set-up that this waited for had given up, and its lease was the last.
                    self.stop_lingering(&entry);
                }
                (turn, entry.phase(queued_at))
            }
        };
        let outcome = match phase {
            Phase::Draining if self.driver.is_frozen() => {
                let frozen = BackendError::busy("the manager is frozen");
                Err(self.driver.error(&entry.key, entry.resource.get(), frozen))
            }
            Phase::Draining => self.teardown(&mut turn).await,
            Phase::Failed(error) => Err(error),
            Phase::Idle | Phase::Up | Phase::Lingering | Phase::Gone(_) => Ok(nothing_to_release()),
        };
        drop(turn);
        outcome.unwrap_or_else(|error| {
            let pending = PendingTeardown::new(&self, &entry).boxed();
            Releasing::over(Err(ReleaseError::new(error, pending)))
        })
    }

    /// Has what lingers torn down next. False if it does not linger.
    fn stop_lingering(&self, entry: &Entry<D>) -> bool {
        let state = &mut lock(&entry.held).state;
        let &mut State::Lingering(number) = state else {
            return false;
        };
        self.lingering.remove(number);
        *state = State::released();
        true
    }

    /// Puts in what a restart has left, before any caller has the table: up with one share, or only to be torn down. The
    /// key must be free.
    pub(crate) fn restore(
        self: &Arc<Self>,
        key: D::Key,
        job: D::Job,
        up: Option<D::Resource>,
    ) -> Option<Lease<D>> {
        self.runtime.get_or_init(Handle::current);
        let state = match &up {
            Some(_) => State::up(Arc::clone(self)),
            None => State::released(),
        };
        let restored = || EntryRef::new(Entry::new(key.clone(), state, Some(job)));
        let entry = self.entries.get_or_insert(&key, restored);
        let _set_once = entry.resource.set(up?);
        Some(Lease::new(entry))
    }

    /// Runs the tear-downs that are pending or under way, but waits for no set-up. Whether one of them has succeeded: a
    /// path or a slot may be free that was not.
    async fn clear_pending(self: &Arc<Self>) -> bool {
        let pending = self.entries.snapshot().into_iter();
        let pending = pending.filter(|entry| entry.is_pending());
        let running: Vec<_> = pending
            .map(|entry| PendingTeardown::new(self, &entry).start())
            .collect();
        let mut cleared = false;
        for teardown in running {
            // What still fails has been reported to whoever released it.
            cleared |= teardown.await.is_ok();
        }
        cleared
    }

    /// Runs all pending tear-downs at once, also of what lingers, and waits for those under way. Returns the errors of those
    /// that are still pending.
    pub(crate) async fn drain(self: &Arc<Self>) -> Vec<Error> {
        self.runtime.get_or_init(Handle::current);
        let pending = self.entries.snapshot().into_iter().filter(|entry| {
            self.stop_lingering(entry);
            !entry.is_settled()
        });
        // An attempt that is under way may have begun before the cause of its failure was gone.
        let pending = pending.map(|entry| PendingTeardown::new(self, &entry).forced());
        let running: Vec<_> = pending.map(PendingTeardown::start).collect();
        let mut failed = Vec::new();
        for teardown in running {
            if let Err(error) = teardown.await {
                failed.extend(error.into_errors());
            }
        }
        failed
    }

    /// The records of all entries. None is at work: the manager is frozen.
    pub(crate) fn records(&self) -> Vec<Record> {
        let entries = self.entries.snapshot().into_iter();
        let records = entries.filter_map(|entry| {
            let is_whole = entry.is_whole();
            Entry::read_job(&entry, |job| self.driver.record(&entry.key, job, is_whole))?
        });
        records.collect()
    }

    /// Reads each resource that is in use.
    pub(crate) fn up<T>(&self, mut read: impl FnMut(&D::Resource) -> T) -> Vec<T> {
        let up = self
            .entries
            .snapshot()
            .into_iter()
            .filter(|entry| entry.is_up());
        up.filter_map(|entry| entry.resource.get().map(&mut read))
            .collect()
    }

    /// The entry under a key, a fresh one if there is none.
    fn entry(&self, key: &D::Key) -> EntryRef<D> {
        let fresh = || EntryRef::new(Entry::new(key.clone(), State::Idle, None));
        self.entries.get_or_insert(key, fresh)
    }

    /// Asks a backend, within the deadline, whether something is there that the journal remembers.
    pub(crate) async fn adopt<'a, T>(
        &self,
        span: &Span,
        adopt: impl FnOnce() -> BackendAnswer<'a, T>,
    ) -> Result<T, Error> {
        let answer = timeout(self.timeout, call(Step::Adopt, span, adopt)).await;
        answer.unwrap_or_else(|_| Err(Error::new(Step::Adopt, self.timed_out())))
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The runtime to work in: this one, or that of the first caller.
    fn runtime(&self) -> Option<Handle> {
        let here = Handle::try_current().ok();
        here.or_else(|| self.runtime.get().cloned())
    }

    pub(crate) fn timed_out(&self) -> BackendError {
        let waited = self.timeout;
        BackendError::uncertain(format!(
            "no answer within {waited:?}; it goes on in the background"
        ))
    }
}

/// For when no caller waits for the error.
fn log_failure(outcome: Result<(), ReleaseError>) {
    if let Err(error) = outcome {
        error.log();
    }
}

fn interrupted() -> BackendError {
    BackendError::uncertain("it was interrupted")
}
