//! The lease table under shuttle: many interleavings of few callers, chosen at random and by PCT (which
//! is good at bugs that need a few badly timed switches). A failure prints the schedule to replay.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::Poll;

use shuttle::future::{JoinHandle, block_on, spawn, yield_now};
use shuttle::rand::{Rng, thread_rng};

use super::*;
use crate::{Linger, Step};

/// Interleavings of each kind for each test, unless `BLOCKMOUNT_INTERLEAVINGS` says otherwise.
const INTERLEAVINGS: usize = 2_000;

/// A backend that yields in the middle of each call, and panics when the order of calls is wrong.
struct Fake {
    faulty: bool,
    /// The VM has ended: nothing can be set up, and everything counts as torn down.
    ended: AtomicBool,
    resources: StdMutex<HashMap<u8, Status>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Status {
    SettingUp,
    Up,
    /// A set-up whose outcome is unknown.
    Doubtful,
    TearingDown,
    Down,
}

struct Work {
    key: u8,
}

impl Fake {
    fn change(&self, key: u8, from: &[Status], to: Status) {
        let mut resources = self.resources.lock().unwrap();
        let status = resources.entry(key).or_insert(Status::Down);
        assert!(
            from.contains(status),
            "resource {key} goes from {status:?} to {to:?}"
        );
        *status = to;
    }

    /// One call in four goes wrong.
    fn goes_wrong(&self) -> bool {
        self.faulty && thread_rng().gen_range(0..4u8) == 0
    }

    fn left(&self) -> Vec<u8> {
        let resources = self.resources.lock().unwrap();
        let left = resources
            .iter()
            .filter(|(_, status)| **status != Status::Down);
        left.map(|(key, _)| *key).collect()
    }
}

fn failure(kind: ErrorKind) -> Error {
    Error::new(
        Step::Attach,
        BackendError::new(kind, "a fault that was planned"),
    )
}

impl Driver for Fake {
    type Key = u8;
    type Job = Work;
    type Resource = u8;

    async fn setup(&self, _: &u8, job: &mut Work) -> Result<u8, Error> {
        self.change(job.key, &[Status::Down], Status::SettingUp);
        yield_now().await;
        if self.ended.load(SeqCst) {
            self.change(job.key, &[Status::SettingUp], Status::Down);
            return Err(failure(ErrorKind::Gone));
        }
        if self.goes_wrong() {
            if thread_rng().r#gen() {
                self.change(job.key, &[Status::SettingUp], Status::Doubtful);
                return Err(failure(ErrorKind::Uncertain));
            }
            self.change(job.key, &[Status::SettingUp], Status::Down);
            return Err(failure(ErrorKind::Other));
        }
        self.change(job.key, &[Status::SettingUp], Status::Up);
        Ok(job.key)
    }

    async fn teardown(&self, _: &u8, job: &mut Work) -> Result<(), Error> {
        self.change(
            job.key,
            &[Status::Up, Status::Doubtful],
            Status::TearingDown,
        );
        yield_now().await;
        if self.goes_wrong() && !self.ended.load(SeqCst) {
            // Over a line that is lost it may have happened.
            let (left, kind) = match thread_rng().r#gen() {
                true => (Status::Up, ErrorKind::Busy),
                false => (Status::Doubtful, ErrorKind::Uncertain),
            };
            self.change(job.key, &[Status::TearingDown], left);
            return Err(failure(kind));
        }
        self.change(job.key, &[Status::TearingDown], Status::Down);
        Ok(())
    }

    fn release_held(&self, _: Work, _: bool) -> Releasing {
        nothing_to_release()
    }

    fn abandon(_: Work) {}

    fn check(&self, up: &u8, wanted: &Work) -> Result<(), Error> {
        assert_eq!(*up, wanted.key, "a lease is for the key that was requested");
        Ok(())
    }

    fn may_linger(&self, _: &u8, _: &u8) -> bool {
        true
    }

    fn is_on(&self, key: &u8, _: &u8, disk: &DiskId) -> bool {
        DiskId::name(&key.to_string()) == *disk
    }

    fn is_frozen(&self) -> bool {
        false
    }

    fn record(&self, _: &u8, _: &Work, _: bool) -> Option<crate::journal::Record> {
        None
    }

    fn error(&self, _: &u8, _: Option<&u8>, cause: BackendError) -> Error {
        Error::new(Step::Attach, cause)
    }
}

type Leases = Arc<Table<Fake>>;

fn table(faulty: bool) -> Leases {
    table_that_keeps(Linger::OFF, faulty)
}

fn table_that_keeps(linger: Linger, faulty: bool) -> Leases {
    Table::new(
        Fake {
            faulty,
            ended: AtomicBool::new(false),
            resources: StdMutex::default(),
        },
        Lingering::new(linger),
        Duration::from_secs(1),
    )
}

/// Polls a future a few times and drops it.
async fn poll_then_drop<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..polls {
        let ready = poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        });
        if let Some(output) = ready.await {
            return Some(output);
        }
        yield_now().await;
    }
    None
}

/// While a lease is held its resource is up.
async fn hold(table: &Leases, lease: &Lease<Fake>) {
    yield_now().await;
    let resources = table.driver.resources.lock().unwrap();
    assert_eq!(
        resources[lease.resource()],
        Status::Up,
        "a lease keeps its resource up"
    );
}

async fn acquire(table: &Leases, key: u8) -> Answer<Fake> {
    let check = |up: &u8| {
        assert_eq!(*up, key, "a lease is for the key that was requested");
        Ok(())
    };
    table.acquire(&key, check, || Work { key }).await
}

/// One caller: acquires, holds and releases, in one of the ways in which callers do.
async fn caller(table: Leases, key: u8) {
    let polls = thread_rng().gen_range(0..8usize);
    let joined = table.find(&key).and_then(|found| table.join(found));
    let lease = match joined {
        Some(joined) => Some(Ok(joined)),
        None if polls < 4 => poll_then_drop(acquire(&table, key), polls).await,
        None => Some(acquire(&table, key).await),
    };
    let Some(Ok(lease)) = lease else { return };
    hold(&table, &lease).await;
    match thread_rng().gen_range(0..4u8) {
        0 => drop(lease),
        1 => drop(poll_then_drop(lease.release(), 1).await),
        _ => {
            if let Err(error) = lease.release().await {
                let _still_pending = error.retry().await;
            }
        }
    }
}

/// Drains until nothing is pending: each failure is one call in four, so this ends.
async fn drain(table: &Leases) {
    while !table.drain().await.is_empty() {}
    assert_eq!(
        table.driver.left(),
        Vec::<u8>::new(),
        "nothing is left after a clean drain"
    );
    // A caller that was cancelled before its task had run leaves an idle entry, until the task sees that.
    while !table.entries.is_empty() {
        yield_now().await;
    }
    assert_eq!(
        table.driver.left(),
        Vec::<u8>::new(),
        "nothing begins after a drain"
    );
}

fn explore(callers: usize, keys: u8, faulty: bool) {
    check(move || async move {
        let table = table(faulty);
        let callers = (0..callers).map(|number| spawn(caller(table.clone(), number as u8 % keys)));
        let tasks: Vec<JoinHandle<()>> = callers.collect();
        finish(&table, tasks).await;
    });
}

/// Needs the place of what lingers, or finds that the disk of a key has changed.
async fn evict(table: Leases) {
    for _ in 0..2 {
        match thread_rng().gen_range(0..4u8) {
            0 => drop(table.lingering.make_room().await),
            1 => drop(table.lingering.clear().await),
            2 => drop(table.lingering.clear_disk(&DiskId::name("0")).await),
            _ => yield_now().await,
        }
    }
}

/// As [`explore`], with a table that keeps one at most, until its time is over, which here is any moment.
fn explore_lingering(callers: usize, keys: u8, faulty: bool) {
    check(move || async move {
        let (at_most, how_many) = (Duration::from_millis(1), 1);
        let table = table_that_keeps(Linger { at_most, how_many }, faulty);
        let callers = (0..callers).map(|number| spawn(twice(table.clone(), number as u8 % keys)));
        let mut tasks: Vec<JoinHandle<()>> = callers.collect();
        tasks.push(spawn(evict(table.clone())));
        finish(&table, tasks).await;
    });
}

/// Comes back for what it has released.
async fn twice(table: Leases, key: u8) {
    caller(table.clone(), key).await;
    caller(table, key).await;
}

fn check<F: Future<Output = ()> + 'static>(
    scenario: impl Fn() -> F + Copy + Send + Sync + 'static,
) {
    let wanted = std::env::var("BLOCKMOUNT_INTERLEAVINGS");
    let count = wanted.map_or(INTERLEAVINGS, |count| count.parse().unwrap());
    shuttle::check_random(move || block_on(scenario()), count);
    shuttle::check_pct(move || block_on(scenario()), count, 3);
}

/// Drains while the tasks are at work, and once more after they have ended.
async fn finish(table: &Leases, tasks: Vec<JoinHandle<()>>) {
    let draining = Arc::clone(table);
    let drains = spawn(async move { drop(draining.drain().await) });
    for task in tasks {
        task.await.unwrap();
    }
    drains.await.unwrap();
    drain(table).await;
}

/// The table as a restart has left it: key 0 is up and has its holder back, key 1 is only to be torn down. Others ask for
/// both, and the VM may end.
fn explore_restart(ends: bool) {
    check(move || async move {
        let table = table(true);
        let left = [(0, Status::Up), (1, Status::Doubtful)];
        table.driver.resources.lock().unwrap().extend(left);
        let held = table.restore(0, Work { key: 0 }, Some(0)).unwrap();
        assert!(table.restore(1, Work { key: 1 }, None).is_none());
        let mut tasks = vec![
            spawn(caller(table.clone(), 0)),
            spawn(caller(table.clone(), 1)),
        ];
        let holders = table.clone();
        tasks.push(spawn(async move {
            hold(&holders, &held).await;
            drop(held.release().await);
        }));
        if ends {
            let ending = table.clone();
            tasks.push(spawn(async move {
                yield_now().await;
                ending.driver.ended.store(true, SeqCst);
            }));
        }
        finish(&table, tasks).await;
    });
}

#[test]
fn a_lease_keeps_its_table_until_one_is_abandoned() {
    check(|| async {
        let table = table(false);
        let (lease, abandoned) = (acquire(&table, 0).await, acquire(&table, 0).await);
        let (lease, abandoned) = (lease.ok().unwrap(), abandoned.ok().unwrap());
        let is_kept = Arc::downgrade(&table);
        drop(table);
        assert!(is_kept.upgrade().is_some());
        abandoned.abandon();
        assert!(is_kept.upgrade().is_none());
        assert_eq!(*lease.resource(), 0);
        lease.release().await.ok().unwrap();
    });
}

#[test]
fn two_callers_of_one_key() {
    explore(2, 1, false);
}

#[test]
fn three_callers_of_one_key_with_faults() {
    explore(3, 1, true);
}

#[test]
fn four_callers_of_two_keys_with_faults() {
    explore(4, 2, true);
}

#[test]
fn two_callers_of_one_key_that_lingers() {
    explore_lingering(2, 1, false);
}

#[test]
fn three_callers_of_two_keys_that_linger_with_faults() {
    explore_lingering(3, 2, true);
}

#[test]
fn what_a_restart_has_left_is_claimed_and_asked_for() {
    explore_restart(false);
}

#[test]
fn a_vm_ends_after_a_restart() {
    explore_restart(true);
}
