//! What is up and held by nobody: kept for the next caller for a while, and torn down the least recently used first.
//!
//! All tables of a manager share one queue, which is ordered by when the last lease was released. A state is changed under
//! the lock of its entry, and the queue inside of that; whoever takes something out of the queue first looks, then locks the
//! entry, and goes by what that says.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::linger::Linger;
use crate::release::{ReleaseError, Releasing};
use crate::sync::{Handle, Instant, Mutex, MutexGuard, lock, sleep_until};
use crate::{DiskId, Error};

use super::begin::go_on;
use super::entry::{Entry, EntryRef, State};
use super::handle::PendingTeardown;
use super::{Driver, Table};

/// What lingers in the tables of one manager. The default lets nothing linger.
#[derive(Clone, Default)]
pub(crate) struct Lingering(Option<Arc<Shared>>);

struct Shared {
    linger: Linger,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// By number, the least recently used first.
    waiting: BTreeMap<u64, Waiting>,
    /// Whether a task waits for the time of the first to be over.
    is_watched: bool,
}

#[derive(Clone)]
struct Waiting {
    until: Instant,
    what: Arc<dyn Lingerer>,
}

/// One entry of a table that lingers, or did so a moment ago.
pub(super) trait Lingerer: Send + Sync {
    fn is_on(&self, disk: &DiskId) -> bool;

    /// Tears it down in a task, if it lingers under this number; the future waits for that.
    fn evict(&self, number: u64) -> Option<Releasing>;
}

struct Idle<D: Driver> {
    table: Arc<Table<D>>,
    entry: EntryRef<D>,
}

impl<D: Driver> Lingerer for Idle<D> {
    fn is_on(&self, disk: &DiskId) -> bool {
        let driver = &self.table.driver;
        let up = self.entry.resource.get();
        up.is_some_and(|up| driver.is_on(&self.entry.key, up, disk))
    }

    fn evict(&self, number: u64) -> Option<Releasing> {
        let Idle { table, entry } = self;
        {
            let state = &mut lock(&entry.held).state;
            if !matches!(state, State::Lingering(now) if *now == number) {
                return None;
            }
            table.lingering.remove(number);
            *state = State::released();
        }
        Some(PendingTeardown::new(table, entry).start_in_task())
    }
}

impl<D: Driver> Table<D> {
    pub(super) fn lingerer(self: &Arc<Self>, entry: &EntryRef<D>) -> Arc<dyn Lingerer> {
        let (table, entry) = (Arc::clone(self), EntryRef::clone(entry));
        Arc::new(Idle { table, entry })
    }

    pub(super) fn lets_linger(&self, entry: &Entry<D>) -> bool {
        let up = entry.resource.get();
        self.lingering.is_on()
            && !self.driver.is_frozen()
            && up.is_some_and(|up| self.driver.may_linger(&entry.key, up))
    }
}

impl Lingering {
    pub(crate) fn new(linger: Linger) -> Self {
        if linger.how_many == 0 || linger.at_most.is_zero() {
            return Lingering(None);
        }
        let queue = Mutex::new(Queue::default());
        Lingering(Some(Arc::new(Shared { linger, queue })))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Puts one at the end of the queue; none if nothing lingers. The caller holds the state of its entry.
    pub(super) fn add(&self, what: impl FnOnce() -> Arc<dyn Lingerer>) -> Option<u64> {
        let shared = self.0.as_ref()?;
        let until = shared.until();
        let what = what();
        let mut queue = shared.queue();
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, Waiting { until, what });
        Some(number)
    }

    /// Takes one out of the queue whose state, which the caller holds, is about to be another.
    pub(super) fn remove(&self, number: u64) {
        if let Some(shared) = &self.0 {
            let removed = shared.queue().waiting.remove(&number);
            // Only now, without the lock.
            drop(removed);
        }
    }

    /// Tears down what is too many, and sees to it that the others end in time.
    pub(super) fn enforce(&self, runtime: impl FnOnce() -> Option<Handle>) {
        let Some(shared) = &self.0 else { return };
        while let Some(first) =
            shared.first_of(|queue| queue.waiting.len() > shared.linger.how_many)
        {
            drop(evict(first));
        }
        if !std::mem::replace(&mut shared.queue().is_watched, true) {
            // Without a runtime it says at once that nobody watches.
            let watch = Watch::new(shared);
            if let Some(runtime) = runtime() {
                go_on(&runtime, watch.run());
            }
        }
    }

    /// Tears down the least recently used that can be. False if there is none.
    pub(crate) async fn make_room(&self) -> bool {
        let Some(shared) = &self.0 else { return false };
        while let Some(first) = shared.first_of(|_| true) {
            if let Some(releasing) = evict(first)
                && heard(releasing.await).is_ok()
            {
                return true;
            }
        }
        false
    }

    /// Tears down all, since it cannot be told which of them is in the way. Whether one is down.
    pub(crate) async fn clear(&self) -> bool {
        self.evict_all(|_| true).await.is_ok_and(|down| down > 0)
    }

    /// Tears down what is of a disk, or stands on it.
    pub(crate) async fn clear_disk(&self, disk: &DiskId) -> Result<(), Error> {
        self.evict_all(|what| what.is_on(disk)).await.map(drop)
    }

    /// How many it has torn down, or the first error.
    async fn evict_all(&self, wanted: impl Fn(&dyn Lingerer) -> bool) -> Result<usize, Error> {
        let Some(shared) = &self.0 else { return Ok(0) };
        let all: Vec<_> = {
            let queue = shared.queue();
            let all = queue.waiting.iter();
            all.map(|(number, waiting)| (*number, waiting.clone()))
                .collect()
        };
        let wanted = all
            .into_iter()
            .filter(|(_, waiting)| wanted(&*waiting.what));
        let running: Vec<_> = wanted.filter_map(evict).collect();
        let (mut down, mut failed) = (0, None);
        for releasing in running {
            match heard(releasing.await) {
                Ok(()) => down += 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(down), Err)
    }
}

impl Shared {
    /// Held for a look-up. What is taken out of the queue is dropped after it.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    fn until(&self) -> Instant {
        let now = Instant::now();
        // A time that no clock reaches is one that is long enough.
        let far = || now + std::time::Duration::from_secs(86_400 * 365 * 30);
        now.checked_add(self.linger.at_most).unwrap_or_else(far)
    }

    fn first_of(&self, wanted: impl FnOnce(&Queue) -> bool) -> Option<(u64, Waiting)> {
        let queue = self.queue();
        let first = queue.waiting.first_key_value();
        let first = first.filter(|_| wanted(&queue));
        first.map(|(number, waiting)| (*number, waiting.clone()))
    }
}

/// The task that waits for the time of the first to be over, while there is any.
struct Watch {
    shared: Arc<Shared>,
    has_ended: bool,
}

impl Watch {
    fn new(shared: &Arc<Shared>) -> Self {
        Watch {
            shared: Arc::clone(shared),
            has_ended: false,
        }
    }

    async fn run(mut self) {
        while let Some(until) = self.next() {
            sleep_until(until).await;
            while let Some(first) = self.shared.first_of(|queue| queue.ends_by(until)) {
                // Nobody waits for it: what fails is logged.
                drop(evict(first));
            }
        }
    }

    /// The end of the first. Once there is none, the next one needs another task.
    fn next(&mut self) -> Option<Instant> {
        let mut queue = self.shared.queue();
        let first = queue.waiting.values().next().map(|first| first.until);
        queue.is_watched = first.is_some();
        self.has_ended = first.is_none();
        first
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Its runtime has ended.
        if !self.has_ended {
            self.shared.queue().is_watched = false;
        }
    }
}

impl Queue {
    fn ends_by(&self, time: Instant) -> bool {
        let first = self.waiting.values().next();
        first.is_some_and(|first| first.until <= time)
    }
}

/// Tears one down. None if it is in use again, or on its way down already.
fn evict((number, waiting): (u64, Waiting)) -> Option<Releasing> {
    waiting.what.evict(number)
}

/// Logs an error that nobody else will be told of.
fn heard(outcome: Result<(), ReleaseError>) -> Result<(), Error> {
    outcome.map_err(|error| {
        error.log();
        error.error().clone()
    })
}
