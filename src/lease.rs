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
//! | `Idle` | raise succeeds | `Up`, 1 lease |
//! | `Idle` | raise fails | `Gone(error)`, leaves the table; all who queued get the error, unless it is about the request |
//! | `Idle` | raise is `Uncertain` (or panics) | `Draining`, lowered at once; all who queued get the error |
//! | `Up` | acquire | `Up`, leases + 1 |
//! | `Up` | a lease comes back, others remain | `Up`, leases - 1 |
//! | `Up` | the last lease comes back | `Draining`, then lower |
//! | `Draining` | lower succeeds | `Gone`, leaves the table; the key is free again |
//! | `Draining` | lower fails | `Draining` at the step that failed; the next acquire, a retry or `drain` lowers first |
//!
//! # Why it holds
//!
//! 1. **The task owns the transition, and the lease is born in it.** Set-up and tear-down run in a
//!    task of their own; callers wait for its answer on a channel. A caller that gives up drops the
//!    channel and whatever is in it: a lease, whose `Drop` gives it back. There is no cancellation code.
//! 2. **Counting never waits.** The state sits behind a plain mutex that is held for a few
//!    instructions; only transitions queue, on an async mutex that is the entry's own. A lease that is
//!    given back is counted on the spot, so whoever looks later sees it.
//! 3. **Pessimism.** Before a driver is called the state is `Draining`; only success changes that. A
//!    panic, or a runtime that shuts down in the middle, leaves the truth.
//! 4. **An entry lives once**: `Idle`, `Up`, `Gone`. A stale handle can never touch what took its key
//!    later. Who queued on an entry that went `Gone` shares its error, or looks up a fresh one.
//!
//! No lock and no map guard is held across I/O but the entry's own. Joining what is up spawns nothing.

use std::hash::Hash;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dashmap::DashMap;
use foldhash::fast::FixedState;
use tracing::Instrument;

use crate::release::{ReleaseError, Releasing, nothing_to_release};
use crate::sync::{AsyncMutex, Handle, Mutex, lock, oneshot, timeout};
use crate::{BackendError, Error, ErrorKind};

mod entry;
mod handle;
#[cfg(test)]
mod interleavings;
mod request;

use entry::{Entry, Phase, State};
pub(crate) use handle::Lease;
use handle::PendingTeardown;
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

    /// Tears the resource down, from the step at which the last attempt stopped.
    fn teardown(
        &self,
        key: &Self::Key,
        job: &mut Self::Job,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Gives back the leases that a job holds. They are counted back when this returns; the future
    /// waits for what that tears down.
    fn release_held(&self, job: Self::Job) -> Releasing;

    /// Refuses a job that cannot share the resource that is up under its key.
    fn check(&self, up: &Self::Resource, asked: &Self::Job) -> Result<(), Error>;

    /// An error about a resource, which may be up, for when the driver has nothing to say.
    fn error(&self, key: &Self::Key, up: Option<&Self::Resource>, cause: BackendError) -> Error;
}

/// The resources of one kind, by key.
pub(crate) struct Table<D: Driver> {
    /// Hashed alike in each run, so that a seed replays a schedule; the keys are the host's own.
    entries: DashMap<D::Key, Arc<Entry<D>>, FixedState>,
    driver: D,
    /// How long a caller waits for a task.
    timeout: Duration,
    /// Where releases run that are dropped outside of any runtime.
    runtime: OnceLock<Handle>,
}

/// Where the answer to one caller goes. A lease that nobody waits for comes back by its `Drop`.
type Answer<D> = oneshot::Sender<Result<Lease<D>, Error>>;

impl<D: Driver> Table<D> {
    pub(crate) fn new(driver: D, timeout: Duration) -> Arc<Self> {
        let entries = DashMap::default();
        Arc::new(Table {
            entries,
            driver,
            timeout,
            runtime: OnceLock::new(),
        })
    }

    pub(crate) fn driver(&self) -> &D {
        &self.driver
    }

    /// Shares a resource that is up, without waiting. `None` if there is none; an error if `check`
    /// refuses.
    pub(crate) fn join(
        self: &Arc<Self>,
        key: &D::Key,
        check: impl FnOnce(&D::Resource) -> Result<(), Error>,
    ) -> Option<Result<Lease<D>, Error>> {
        let entry = Arc::clone(&*self.entries.get(key)?);
        let lease = self.join_entry(entry)?;
        Some(check(lease.resource()).map(|()| lease))
    }

    /// Looks at a resource that was up a moment ago, and may be on its way down.
    pub(crate) fn peek<T>(&self, key: &D::Key, look: impl FnOnce(&D::Resource) -> T) -> Option<T> {
        self.entries.get(key)?.resource.get().map(look)
    }

    fn join_entry(self: &Arc<Self>, entry: Arc<Entry<D>>) -> Option<Lease<D>> {
        match &mut *lock(&entry.state) {
            State::Up(leases) => *leases += 1,
            _ => return None,
        }
        Some(Lease::new(self, entry))
    }

    /// Shares the resource under `key`, and sets it up first if need be.
    ///
    /// Dropping the future gives up the wait, not the work: what is under way is finished, and a lease
    /// that nobody waits for is given back.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        key: D::Key,
        job: D::Job,
    ) -> Result<Lease<D>, Error> {
        let runtime = Handle::current();
        self.runtime.get_or_init(|| runtime.clone());
        // The entry is in the table before the task runs, so that a `drain` from now on sees it.
        let entry = self.entry(&key);
        let asked = PendingRequest::new(job);
        let (answer, outcome) = oneshot::channel();
        let task = Arc::clone(self).run(entry, asked.clone(), answer);
        runtime.spawn(task.in_current_span());
        let _on_giving_up = CancelOnDrop(asked);
        let cause = match timeout(self.timeout, outcome).await {
            Ok(Ok(outcome)) => return outcome,
            Ok(Err(_)) => interrupted(),
            Err(_) => self.timed_out(),
        };
        Err(self.driver.error(&key, None, cause))
    }

    /// Answers one caller: queues for the key, looks, and does what it takes.
    async fn run(
        self: Arc<Self>,
        mut entry: Arc<Entry<D>>,
        asked: PendingRequest<D::Job>,
        answer: Answer<D>,
    ) {
        loop {
            let queued_at = Some(entry.attempts());
            let mut job = entry.job.lock().await;
            let refusal = match entry.look(queued_at) {
                Phase::Idle => match asked.take() {
                    Some(asked) => {
                        *job = Some(asked);
                        return self.setup(&entry, job, answer).await;
                    }
                    // Given up before its turn: there is nothing to begin.
                    None => return self.remove(&entry, None),
                },
                Phase::Up => match self.join_entry(Arc::clone(&entry)) {
                    // The last lease came back since we looked.
                    None => continue,
                    Some(lease) => match asked.look(|job| self.driver.check(lease.resource(), job))
                    {
                        Some(Ok(())) => return self.hand_over(lease, &asked, answer).await,
                        Some(Err(refusal)) => refusal,
                        None => return,
                    },
                },
                Phase::Draining if asked.is_taken_back() => return,
                Phase::Draining => match self.teardown(&entry, &mut job).await {
                    Err(error) => error,
                    Ok(rest) => {
                        drop(job);
                        log_failure(rest.await);
                        entry = self.entry(&entry.key);
                        continue;
                    }
                },
                Phase::Failed(error) | Phase::Gone(Some(error)) => error,
                Phase::Gone(None) => {
                    drop(job);
                    entry = self.entry(&entry.key);
                    continue;
                }
            };
            // Counted back while the entry is ours, as everywhere.
            let unused = asked.take().map(|asked| self.driver.release_held(asked));
            drop(job);
            if let Some(rest) = unused {
                log_failure(rest.await);
            }
            return drop(answer.send(Err(refusal)));
        }
    }

    /// Answers with a share of what is up. The caller holds the entry's job.
    async fn hand_over(&self, lease: Lease<D>, unused: &PendingRequest<D::Job>, answer: Answer<D>) {
        if let Some(unused) = unused.take() {
            // What is up holds what it needs, so nothing here is anybody's last lease.
            log_failure(self.driver.release_held(unused).await);
        }
        drop(answer.send(Ok(lease)));
    }

    /// Sets up what an idle entry stands for, and answers.
    async fn setup(
        self: &Arc<Self>,
        entry: &Arc<Entry<D>>,
        mut job: JobGuard<'_, D>,
        answer: Answer<D>,
    ) {
        entry.set(State::Draining {
            attempts: 0,
            error: None,
        });
        let error = match self.driver.setup(&entry.key, work(&mut job)).await {
            Ok(resource) => {
                let _set_once = entry.resource.set(resource);
                entry.set(State::Up(1));
                // Sent while we hold the job: a lease that nobody waits for is counted back before
                // anybody else looks.
                return drop(answer.send(Ok(Lease::new(self, Arc::clone(entry)))));
            }
            Err(error) => error,
        };
        // Nobody holds what is uncertain, so nobody else would ever lower it.
        let uncertain = error.kind() == ErrorKind::Uncertain;
        if uncertain
            && self
                .driver
                .teardown(&entry.key, work(&mut job))
                .await
                .is_err()
        {
            entry.set(State::Draining {
                attempts: 1,
                error: Some(error.clone()),
            });
            drop(job);
        } else {
            // An error about the request is its asker's own: who queued may have asked for something
            // else, and tries for itself.
            let about_request = matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Invalid);
            let rest = self.retire(entry, &mut job, (!about_request).then(|| error.clone()));
            drop(job);
            log_failure(rest.await);
        }
        drop(answer.send(Err(error)));
    }

    /// Tears down what an entry owes. What it held is counted back by then; the future that it
    /// answers with waits for what that tears down.
    async fn teardown(
        &self,
        entry: &Arc<Entry<D>>,
        job: &mut JobGuard<'_, D>,
    ) -> Result<Releasing, Error> {
        match self.driver.teardown(&entry.key, work(job)).await {
            Ok(()) => Ok(self.retire(entry, job, None)),
            Err(error) => {
                let attempts = entry.attempts() + 1;
                entry.set(State::Draining {
                    attempts,
                    error: Some(error.clone()),
                });
                Err(error)
            }
        }
    }

    /// Takes an entry out of the table, its resource being down.
    fn retire(
        &self,
        entry: &Arc<Entry<D>>,
        job: &mut JobGuard<'_, D>,
        outcome: Option<Error>,
    ) -> Releasing {
        // Counted back before the entry goes: who sees no entry here finds nothing held there either.
        let rest = self.driver.release_held(job.take().expect(JOB_GIVEN));
        self.remove(entry, outcome);
        rest
    }

    fn remove(&self, entry: &Arc<Entry<D>>, outcome: Option<Error>) {
        self.entries
            .remove_if(&entry.key, |_, listed| Arc::ptr_eq(listed, entry));
        entry.set(State::Gone(outcome));
    }

    /// Pays what an entry owes, unless that is done. What it held has its own tear-down under way by
    /// then, and its own errors: the answer is what waits for that.
    async fn retry(
        self: Arc<Self>,
        entry: Arc<Entry<D>>,
        queued_at: Option<usize>,
    ) -> Result<Releasing, ReleaseError> {
        let mut job = entry.job.lock().await;
        let outcome = match entry.look(queued_at) {
            Phase::Draining => self.teardown(&entry, &mut job).await,
            Phase::Failed(error) => Err(error),
            Phase::Idle | Phase::Up | Phase::Gone(_) => Ok(nothing_to_release()),
        };
        drop(job);
        outcome
            .map_err(|error| ReleaseError::new(error, PendingTeardown::new(&self, &entry).boxed()))
    }

    /// Tears down everything that is owed, all at once, and waits for what is under way. Answers with
    /// what is still owed.
    pub(crate) async fn drain(self: &Arc<Self>) -> Vec<Error> {
        self.runtime.get_or_init(Handle::current);
        let owing = self
            .snapshot()
            .into_iter()
            .filter(|entry| !entry.is_settled());
        // An attempt that is under way may have begun before the cause of its failure was gone.
        let owed = owing.map(|entry| PendingTeardown::new(self, &entry).forced());
        let payments: Vec<_> = owed.map(PendingTeardown::start).collect();
        let mut failed = Vec::new();
        for payment in payments {
            if let Err(error) = payment.wait().await {
                failed.extend(error.into_errors());
            }
        }
        failed
    }

    /// Looks at each resource that is up.
    pub(crate) fn up<T>(&self, mut look: impl FnMut(&D::Resource) -> T) -> Vec<T> {
        let up = self.snapshot().into_iter().filter(|entry| entry.is_up());
        up.filter_map(|entry| entry.resource.get().map(&mut look))
            .collect()
    }

    /// The entries as they are now, so that no map guard is held while they are looked at.
    fn snapshot(&self) -> Vec<Arc<Entry<D>>> {
        self.entries
            .iter()
            .map(|item| Arc::clone(item.value()))
            .collect()
    }

    /// The entry under a key, a fresh one if there is none.
    fn entry(&self, key: &D::Key) -> Arc<Entry<D>> {
        let fresh = Arc::new(Entry {
            key: key.clone(),
            resource: OnceLock::new(),
            state: Mutex::new(State::Idle),
            job: AsyncMutex::new(None),
        });
        Arc::clone(&*self.entries.entry(key.clone()).or_insert(fresh))
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn timed_out(&self) -> BackendError {
        let waited = self.timeout;
        BackendError::uncertain(format!(
            "no answer within {waited:?}; it goes on in the background"
        ))
    }
}

type JobGuard<'e, D> = crate::sync::AsyncMutexGuard<'e, Option<<D as Driver>::Job>>;

const JOB_GIVEN: &str = "an entry is given a job before its driver is called";

fn work<J>(job: &mut Option<J>) -> &mut J {
    job.as_mut().expect(JOB_GIVEN)
}

/// For when nobody is left to tell.
fn log_failure(outcome: Result<(), ReleaseError>) {
    if let Err(error) = outcome {
        error.log();
    }
}

fn interrupted() -> BackendError {
    BackendError::uncertain("it was interrupted")
}
