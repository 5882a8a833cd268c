//! One key of the table: its state, its resource and its queue.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use super::{Driver, Table};
use crate::Error;
use crate::sync::{Mutex, is_over, lock, oneshot};

/// What the table knows of one key, from the first request to the end of the tear-down.
pub(super) struct Entry<D: Driver> {
    pub(super) key: D::Key,
    /// Set once, before the first lease is born.
    pub(super) resource: OnceLock<D::Resource>,
    pub(super) held: Mutex<Held<D>>,
}

/// An entry by reference. It has no weak ones, and a million entries need no counts of them.
pub(super) type EntryRef<D> = triomphe::Arc<Entry<D>>;

/// What changes of an entry, behind a lock that is held for a few instructions.
pub(super) struct Held<D: Driver> {
    pub(super) state: State<D>,
    job: JobSlot<D>,
}

/// The job of an entry, from before its driver is called until the resource is down.
enum JobSlot<D: Driver> {
    None,
    Some(D::Job),
    /// Whoever sets up or tears down has it, if there is one.
    Taken(Option<Box<Queue<D>>>),
}

/// Who waits for the turn, the longest first.
type Queue<D> = VecDeque<oneshot::Sender<Turn<D>>>;

/// The right to set an entry up and to tear it down, of which there is one, and its job. Dropping it passes both on to who
/// has waited for it longest.
pub(super) struct Turn<D: Driver> {
    /// None once it was passed on.
    entry: Option<EntryRef<D>>,
    pub(super) job: Option<D::Job>,
}

pub(super) enum State<D: Driver> {
    /// The driver has not been called yet.
    Idle,
    /// The resource is up, and leases keep it so.
    Up(Shares<D>),
    /// The resource is up, and no lease keeps it so. Its number among those that linger.
    Lingering(u64),
    /// The resource may or may not be up; `teardown` must succeed before anything else. The attempts so far, if one has
    /// failed.
    Draining(Option<Box<Failed>>),
    /// This entry has left the table; the error is the outcome for every task that queued on it.
    Gone(Option<Error>),
}

/// The leases of a resource that is up.
pub(super) struct Shares<D: Driver> {
    pub(super) count: usize,
    /// The table that tears it down after the last: kept here for all of them, so that each is one pointer, and counts one.
    /// None once a lease was abandoned, as then none is the last.
    pub(super) table: Option<Arc<Table<D>>>,
}

/// Attempts to tear down that have failed.
pub(super) struct Failed {
    pub(super) attempts: usize,
    /// The last error, for the tasks that waited for that attempt.
    pub(super) error: Error,
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

impl<D: Driver> State<D> {
    /// Up, with the first lease.
    pub(super) fn up(table: Arc<Table<D>>) -> Self {
        let table = Some(table);
        State::Up(Shares { count: 1, table })
    }

    /// To be torn down, and no attempt has been made.
    pub(super) fn released() -> Self {
        State::Draining(None)
    }

    /// To be torn down, after so many attempts.
    pub(super) fn failed(attempts: usize, error: Error) -> Self {
        State::Draining(Some(Box::new(Failed { attempts, error })))
    }

    fn attempts(&self) -> usize {
        match self {
            State::Draining(Some(failed)) => failed.attempts,
            _ => 0,
        }
    }
}

impl<D: Driver> Entry<D> {
    pub(super) fn new(key: D::Key, state: State<D>, job: Option<D::Job>) -> Self {
        let job = JobSlot::of(job);
        Entry {
            key,
            resource: OnceLock::new(),
            held: Mutex::new(Held { state, job }),
        }
    }

    /// The turn of who is the first to ask for the entry.
    pub(super) fn first_turn(entry: &EntryRef<D>) -> Option<Turn<D>> {
        let held = &mut *lock(&entry.held);
        match held.state {
            State::Idle => held.free_turn(entry),
            _ => None,
        }
    }

    /// Waits until no other task sets up or tears down. Tasks come in the order in which they ask.
    pub(super) async fn turn(entry: &EntryRef<D>) -> Turn<D> {
        let waiting = {
            match lock(&entry.held).job.take() {
                Ok(job) => return Turn::new(entry, job),
                Err(queue) => {
                    let (waiter, waiting) = oneshot::channel();
                    queue.get_or_insert_default().push_back(waiter);
                    waiting
                }
            }
        };
        let passed_on = waiting.await;
        passed_on.expect("a turn is passed on when it is dropped, and its entry lives for as long")
    }

    /// Reads the job, unless somebody has it.
    pub(super) fn read_job<T>(entry: &EntryRef<D>, read: impl FnOnce(&D::Job) -> T) -> Option<T> {
        let turn = lock(&entry.held).free_turn(entry)?;
        turn.job.as_ref().map(read)
    }

    /// Gives the job to the first who still waits for it, or keeps it for who comes next.
    fn pass_on(entry: &EntryRef<D>, mut job: Option<D::Job>) {
        loop {
            let next = {
                let slot = &mut lock(&entry.held).job;
                match slot.next() {
                    Some(next) => next,
                    None => {
                        *slot = JobSlot::of(job);
                        return;
                    }
                }
            };
            match next.send(Turn::new(entry, job)) {
                Ok(()) => return,
                // It has stopped waiting.
                Err(mut turn) => {
                    turn.entry = None;
                    job = turn.job.take();
                }
            }
        }
    }

    /// `queued_at`: the attempts that had been made when the task began to wait. A task that waited for
    /// another's attempt gets its outcome, in place of one more attempt each.
    pub(super) fn phase(&self, queued_at: Option<usize>) -> Phase {
        match &lock(&self.held).state {
            State::Idle => Phase::Idle,
            State::Up(_) => Phase::Up,
            State::Lingering(_) => Phase::Lingering,
            State::Gone(outcome) => Phase::Gone(outcome.clone()),
            State::Draining(Some(failed))
                if queued_at.is_some_and(|before| before != failed.attempts) =>
            {
                Phase::Failed(failed.error.clone())
            }
            State::Draining(_) => Phase::Draining,
        }
    }

    /// In use, and no task is at work that might hand a lease to a caller that was cancelled.
    pub(super) fn is_settled(&self) -> bool {
        let held = lock(&self.held);
        held.is_at_rest() && matches!(held.state, State::Up(_))
    }

    /// In use.
    pub(super) fn is_up(&self) -> bool {
        matches!(lock(&self.held).state, State::Up(_))
    }

    /// Up, whether in use or not.
    pub(super) fn is_whole(&self) -> bool {
        matches!(lock(&self.held).state, State::Up(_) | State::Lingering(_))
    }

    /// On its way down, or to be torn down: not a set-up that is under way.
    pub(super) fn is_pending(&self) -> bool {
        let held = lock(&self.held);
        match &held.state {
            State::Draining(failed) => {
                failed.is_some() || self.resource.get().is_some() || held.is_at_rest()
            }
            _ => false,
        }
    }

    pub(super) fn attempts(&self) -> usize {
        lock(&self.held).state.attempts()
    }

    pub(super) fn set(&self, state: State<D>) {
        let before = std::mem::replace(&mut lock(&self.held).state, state);
        // Only now, without the lock.
        drop(before);
    }
}

impl<D: Driver> Held<D> {
    /// The turn of `entry`, whose state this is, unless somebody has it.
    pub(super) fn free_turn(&mut self, entry: &EntryRef<D>) -> Option<Turn<D>> {
        let job = self.job.take().ok()?;
        Some(Turn::new(entry, job))
    }

    /// Nobody sets up or tears down.
    fn is_at_rest(&self) -> bool {
        !matches!(self.job, JobSlot::Taken(_))
    }
}

/// A job that is still here when its table goes has a tear-down pending. What it holds is below what may still be there,
/// so it is left as it is and not released.
impl<D: Driver> Drop for Held<D> {
    fn drop(&mut self) {
        if let JobSlot::Some(job) = std::mem::replace(&mut self.job, JobSlot::None) {
            D::abandon(job);
        }
    }
}

impl<D: Driver> JobSlot<D> {
    fn of(job: Option<D::Job>) -> Self {
        job.map_or(JobSlot::None, JobSlot::Some)
    }

    /// Takes what job there is, or says where to wait for it.
    fn take(&mut self) -> Result<Option<D::Job>, &mut Option<Box<Queue<D>>>> {
        if let JobSlot::Taken(queue) = self {
            return Err(queue);
        }
        match std::mem::replace(self, JobSlot::Taken(None)) {
            JobSlot::Some(job) => Ok(Some(job)),
            _ => Ok(None),
        }
    }

    /// Who has waited longest.
    fn next(&mut self) -> Option<oneshot::Sender<Turn<D>>> {
        match self {
            JobSlot::Taken(Some(queue)) => queue.pop_front(),
            _ => None,
        }
    }
}

impl<D: Driver> Turn<D> {
    fn new(entry: &EntryRef<D>, job: Option<D::Job>) -> Self {
        let entry = Some(EntryRef::clone(entry));
        Turn { entry, job }
    }

    /// The entry and its job, for the driver.
    pub(super) fn work(&mut self) -> (&EntryRef<D>, &mut D::Job) {
        let Turn { entry, job } = self;
        (
            entry.as_ref().expect(NOT_PASSED_ON),
            job.as_mut().expect(JOB_GIVEN),
        )
    }

    /// The same for the end of the entry.
    pub(super) fn take_work(&mut self) -> (&EntryRef<D>, D::Job) {
        let Turn { entry, job } = self;
        (
            entry.as_ref().expect(NOT_PASSED_ON),
            job.take().expect(JOB_GIVEN),
        )
    }
}

const NOT_PASSED_ON: &str = "a turn is passed on when it is dropped";
const JOB_GIVEN: &str = "an entry is given a job before its driver is called";

impl<D: Driver> Drop for Turn<D> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take()
            && !is_over()
        {
            Entry::pass_on(&entry, self.job.take());
        }
    }
}
