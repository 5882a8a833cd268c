//! One key of the table: its state, its resource and its queue.

use std::sync::OnceLock;

use super::Driver;
use crate::Error;
use crate::sync::{AsyncMutex, AsyncMutexGuard, Mutex, lock};

/// What the table knows of one key, from the first request to the end of the tear-down.
pub(super) struct Entry<D: Driver> {
    pub(super) key: D::Key,
    /// Set once, before the first lease is born.
    pub(super) resource: OnceLock<D::Resource>,
    pub(super) state: Mutex<State>,
    /// Held by the one task that sets up or tears down; waiting for it is queueing for the key.
    pub(super) job: AsyncMutex<JobSlot<D>>,
}

/// The job of an entry, from before its driver is called until the resource is down.
///
/// A job that is still here when its table goes has a tear-down pending. What it holds is below what may still be there,
/// so it is left as it is and not released.
pub(super) struct JobSlot<D: Driver>(pub(super) Option<D::Job>);

impl<D: Driver> Drop for JobSlot<D> {
    fn drop(&mut self) {
        if let Some(job) = self.0.take() {
            D::abandon(job);
        }
    }
}

pub(super) type JobGuard<'e, D> = AsyncMutexGuard<'e, JobSlot<D>>;

pub(super) enum State {
    /// The driver has not been called yet.
    Idle,
    /// The resource is up, and this many leases keep it so.
    Up(usize),
    /// The resource is up, and no lease keeps it so. Its number among those that linger.
    Lingering(u64),
    /// The resource may or may not be up; `teardown` must succeed before anything else.
    Draining {
        /// How many attempts have failed.
        attempts: usize,
        /// The last error, for the tasks that waited for that attempt.
        error: Option<Error>,
    },
    /// This entry has left the table; the error is the outcome for every task that queued on it.
    Gone(Option<Error>),
}

/// The state of an entry, as a task finds it on its turn.
pub(super) enum Phase {
    Idle,
    Up,
    Lingering,
    Draining,
    /// The attempt that the task waited for has failed.
    Failed(Error),
    Gone(Option<Error>),
}

impl State {
    /// To be torn down, and no attempt has been made.
    pub(super) fn released() -> Self {
        State::Draining {
            attempts: 0,
            error: None,
        }
    }
}

impl<D: Driver> Entry<D> {
    pub(super) fn new(key: D::Key, state: State, job: Option<D::Job>) -> Self {
        Entry {
            key,
            resource: OnceLock::new(),
            state: Mutex::new(state),
            job: AsyncMutex::new(JobSlot(job)),
        }
    }

    /// Waits until no other task sets up or tears down. Tasks come in the order in which they ask.
    pub(super) async fn turn(&self) -> JobGuard<'_, D> {
        match self.job.try_lock() {
            Ok(job) => job,
            Err(_) => self.job.lock().await,
        }
    }

    /// `queued_at`: the attempts that had been made when the task began to wait. A task that waited for
    /// another's attempt gets its outcome, in place of one more attempt each.
    pub(super) fn phase(&self, queued_at: Option<usize>) -> Phase {
        match &*lock(&self.state) {
            State::Idle => Phase::Idle,
            State::Up(_) => Phase::Up,
            State::Lingering(_) => Phase::Lingering,
            State::Gone(outcome) => Phase::Gone(outcome.clone()),
            State::Draining {
                attempts,
                error: Some(error),
            } if queued_at.is_some_and(|before| before != *attempts) => {
                Phase::Failed(error.clone())
            }
            State::Draining { .. } => Phase::Draining,
        }
    }

    /// In use, and no task is at work that might hand a lease to a caller that was cancelled.
    pub(super) fn is_settled(&self) -> bool {
        self.job.try_lock().is_ok_and(|_at_rest| self.is_up())
    }

    /// In use.
    pub(super) fn is_up(&self) -> bool {
        matches!(*lock(&self.state), State::Up(_))
    }

    /// Up, whether in use or not.
    pub(super) fn is_whole(&self) -> bool {
        matches!(*lock(&self.state), State::Up(_) | State::Lingering(_))
    }

    /// On its way down, or to be torn down: not a set-up that is under way.
    pub(super) fn is_pending(&self) -> bool {
        let torn_before = match *lock(&self.state) {
            State::Draining { attempts, .. } => attempts > 0,
            _ => return false,
        };
        torn_before || self.resource.get().is_some() || self.job.try_lock().is_ok()
    }

    pub(super) fn attempts(&self) -> usize {
        match *lock(&self.state) {
            State::Draining { attempts, .. } => attempts,
            _ => 0,
        }
    }

    pub(super) fn set(&self, state: State) {
        *lock(&self.state) = state;
    }
}
