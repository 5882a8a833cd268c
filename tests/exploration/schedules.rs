//! Random schedules: a handful of callers over a few disks that collide, with delays, faults and
//! cancellation, on a clock that stands still while anybody has work to do.
//!
//! `BLOCKMOUNT_SCHEDULES=n` sets how many there are; `BLOCKMOUNT_SEED=n` replays one of them.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::harness::{
    Held, KINDS, builder_of, calls, clean, disk, poll_and_give_up, request, soon,
};
use blockmount::testing::{FakeVm, Gate, Seed, random_delays, random_faults};
use blockmount::{Disk, ErrorKind, Linger, Manager, MountRequest, ReleaseError, StackRequest};
use tokio::task::LocalSet;

const SCHEDULES: u64 = 15_000;

/// A replay runs its schedule so often: the order in which a drain visits what it finds is that of a
/// hash table, which differs from run to run.
const REPLAYS: u64 = 200;

const OPTIONS: [&[&str]; 4] = [&["ro"], &["ro", "noatime"], &["ro", "data=x"], &["rw"]];
const TARGETS: [&str; 4] = ["/a", "/a/b", "/c", "/run/m/m0"];
const TREES: [&str; 3] = ["/tree", "/a/b", "/c"];

#[test]
fn schedules() {
    let variable = |name| {
        std::env::var(name)
            .ok()
            .map(|text: String| text.parse().unwrap())
    };
    if let Some(seed) = variable("BLOCKMOUNT_SEED") {
        for _ in 0..REPLAYS {
            run(seed);
        }
        return;
    }
    let schedules = variable("BLOCKMOUNT_SCHEDULES").unwrap_or(SCHEDULES);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let next = AtomicU64::new(0);
    let sums = std::thread::scope(|scope| {
        let worker = || scope.spawn(|| work(&next, schedules));
        let workers: Vec<_> = (0..threads).map(|_| worker()).collect();
        let sums = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        sums.fold(Sums::default(), Sums::plus)
    });
    println!("{sums:?}");
    sums.assert_telling(schedules);
}

/// Runs schedules until there are no more, and says which one failed.
fn work(next: &AtomicU64, schedules: u64) -> Sums {
    let mut sums = Sums::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= schedules {
            return sums;
        }
        match catch_unwind(AssertUnwindSafe(|| run(seed))) {
            Ok(of_this) => sums = sums.plus(of_this),
            Err(panic) => {
                eprintln!("schedule {seed} failed; replay it with BLOCKMOUNT_SEED={seed}");
                next.store(schedules, Ordering::Relaxed);
                resume_unwind(panic);
            }
        }
    }
}

/// What happened, to show that the schedules try what they are there for.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    schedules: u64,
    got: u64,
    failed: u64,
    conflicts: u64,
    given_up: u64,
    failed_releases: u64,
    kills: u64,
    calls: u64,
    more_than_one_drain: u64,
}

impl Sums {
    fn plus(self, other: Sums) -> Sums {
        Sums {
            schedules: self.schedules + other.schedules,
            got: self.got + other.got,
            failed: self.failed + other.failed,
            conflicts: self.conflicts + other.conflicts,
            given_up: self.given_up + other.given_up,
            failed_releases: self.failed_releases + other.failed_releases,
            kills: self.kills + other.kills,
            calls: self.calls + other.calls,
            more_than_one_drain: self.more_than_one_drain + other.more_than_one_drain,
        }
    }

    /// Schedules in which nothing happens prove nothing.
    fn assert_telling(&self, schedules: u64) {
        assert_eq!(self.schedules, schedules);
        if schedules >= 1_000 {
            let each = |sum: u64| sum >= schedules / 2;
            assert!(
                each(self.got) && each(self.failed) && each(self.given_up),
                "{self:?}"
            );
            assert!(self.failed_releases >= schedules / 10, "{self:?}");
            assert!(
                self.conflicts >= schedules / 10 && self.kills >= schedules / 50,
                "{self:?}"
            );
        }
    }
}

/// One schedule: the callers and what they share.
struct Schedule {
    vm: FakeVm,
    manager: Manager,
    /// Whether callers, and drains, wait for less time than the VM may take.
    hasty: bool,
    killed: Cell<bool>,
    kept: RefCell<Vec<Held>>,
    errors: RefCell<Vec<ReleaseError>>,
    sums: Cell<Sums>,
}

fn run(seed: u64) -> Sums {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    let schedule = Schedule::prepare(seed);
    let callers = LocalSet::new();
    callers.block_on(&runtime.unwrap(), schedule)
}

impl Schedule {
    async fn prepare(number: u64) -> Sums {
        let mut seed = Seed::new(number);
        let slots = *seed.pick(&[2, 3, 256]);
        let vm = FakeVm::with_slots(slots);
        vm.alias("/links/0.img", "/images/0.img");
        let longest = Duration::from_millis(*seed.pick(&[0, 2, 5]));
        vm.delay_by(random_delays(seed.next(), longest));
        let percent = *seed.pick(&[20, 20, 20, 20, 5, 0]);
        vm.gate_by(faults(seed.next(), percent, seed.percent(5)));
        let hasty = seed.percent(10);
        let timeout = if hasty {
            Duration::from_millis(4)
        } else {
            Duration::from_secs(300)
        };
        let linger = random_linger(&mut seed);
        let schedule = Rc::new(Schedule {
            manager: builder_of(&vm).timeout(timeout).linger(linger).build(),
            vm,
            hasty,
            killed: Cell::new(false),
            kept: RefCell::default(),
            errors: RefCell::default(),
            sums: Cell::new(Sums {
                schedules: 1,
                ..Sums::default()
            }),
        });
        let mut callers = Vec::new();
        for _ in 0..2 + seed.below(3) {
            let caller = Rc::clone(&schedule).call(Seed::new(seed.next()));
            callers.push(tokio::task::spawn_local(caller));
        }
        let guest_only = seed.percent(50);
        if seed.percent(4) {
            let at = Duration::from_millis(seed.below(30));
            callers.push(tokio::task::spawn_local(
                Rc::clone(&schedule).kill(at, guest_only),
            ));
        }
        for caller in callers {
            soon("a caller", caller).await.unwrap();
        }
        schedule.end(&mut seed, guest_only).await
    }

    async fn kill(self: Rc<Self>, at: Duration, guest_only: bool) {
        tokio::time::sleep(at).await;
        self.killed.set(true);
        if guest_only {
            self.vm.kill_guest()
        } else {
            self.vm.kill()
        }
        self.count(|sums| sums.kills += 1);
    }

    /// One caller: some requests, one after the other.
    async fn call(self: Rc<Self>, mut seed: Seed) {
        sleep_up_to(&mut seed, 8).await;
        for _ in 0..1 + seed.below(3) {
            match seed.below(21) {
                20 => self
                    .vm
                    .change_source(disk(seed.below(3) as usize, true).source()),
                0 => drop(self.manager.drain().await),
                1 => drop(give_up_after(&mut seed, 6, self.manager.drain()).await),
                2..=4 => self.retry(&mut seed).await,
                _ => self.ask(&mut seed).await,
            }
            if seed.percent(50) {
                sleep_up_to(&mut seed, 4).await;
            }
        }
    }

    async fn ask(&self, seed: &mut Seed) {
        let wanted = Wanted::random(seed);
        let asked = wanted.get(&self.manager);
        let outcome = if seed.percent(35) {
            give_up_after(seed, 16, asked).await
        } else {
            Some(asked.await)
        };
        match outcome {
            None => self.count(|sums| sums.given_up += 1),
            Some(Err(error)) => {
                self.count(|sums| sums.failed += 1);
                if error.kind() == ErrorKind::Conflict {
                    self.count(|sums| sums.conflicts += 1);
                }
            }
            Some(Ok(held)) => {
                self.count(|sums| sums.got += 1);
                self.use_it(seed, held).await;
            }
        }
    }

    /// Holds what was got for a while, and gives it back one way or another.
    async fn use_it(&self, seed: &mut Seed, held: Held) {
        self.check(&held);
        if seed.percent(70) {
            sleep_up_to(seed, 6).await;
            self.check(&held);
        }
        match seed.below(10) {
            0..=3 => self.note(held.release().await),
            4 => self.note(
                give_up_after(seed, 5, held.release())
                    .await
                    .unwrap_or(Ok(())),
            ),
            5 => drop(held.release()),
            6 | 7 => drop(held),
            _ => self.kept.borrow_mut().push(held),
        }
    }

    /// Tries again what somebody's release left.
    async fn retry(&self, seed: &mut Seed) {
        let error = self.errors.borrow_mut().pop();
        if let Some(error) = error {
            match give_up_after(seed, 20, error.retry()).await {
                Some(outcome) => self.note(outcome),
                None => self.count(|sums| sums.given_up += 1),
            }
        }
    }

    fn note(&self, released: Result<(), ReleaseError>) {
        if let Err(error) = released {
            self.count(|sums| sums.failed_releases += 1);
            self.errors.borrow_mut().push(error);
        }
    }

    fn check(&self, held: &Held) {
        if !self.killed.get() {
            held.check(&self.vm);
        }
    }

    /// No more faults; everything is given back.
    async fn end(&self, seed: &mut Seed, guest_only: bool) -> Sums {
        self.vm.open_gates();
        for held in self.kept.take() {
            self.check(&held);
            if seed.percent(50) {
                drop(held.release().await);
            }
        }
        for error in self.errors.take() {
            if seed.percent(30) {
                drop(error.retry().await);
            }
        }
        if clean(&self.vm, &self.manager).await > 1 {
            assert!(self.hasty, "one drain is enough for who waits for it");
            self.count(|sums| sums.more_than_one_drain += 1);
        }
        if self.killed.get() {
            self.assert_gone(guest_only).await;
        }
        let calls: usize = calls(&self.vm).iter().sum();
        self.count(|sums| sums.calls += calls as u64);
        self.sums.get()
    }

    /// Nothing can be had from a VM that is gone, and trying leaves nothing.
    async fn assert_gone(&self, guest_only: bool) {
        self.vm.delay_by(|_| Duration::ZERO);
        for attempt in 0..2 {
            let error = self
                .manager
                .add(&disk(attempt, true), &request(&["ro"], None))
                .await;
            let kind = error.expect_err("mounted in a VM that is gone").kind();
            assert_eq!(kind, ErrorKind::Gone);
        }
        let attached = self.manager.attach(&disk(0, true)).await;
        assert_eq!(attached.is_ok(), guest_only);
        drop(attached);
        clean(&self.vm, &self.manager).await;
    }

    fn count(&self, add: impl FnOnce(&mut Sums)) {
        let mut sums = self.sums.get();
        add(&mut sums);
        self.sums.set(sums);
    }
}

/// Something to ask for.
enum Wanted {
    Attachment(Disk),
    Mount(Disk, MountRequest),
    Stack(StackRequest),
}

impl Wanted {
    fn random(seed: &mut Seed) -> Self {
        match seed.below(10) {
            0..=2 => Wanted::Attachment(random_disk(seed)),
            3..=7 => Wanted::Mount(random_disk(seed), random_request(seed)),
            _ => {
                let mut stack = StackRequest::new(*seed.pick(&TREES));
                for _ in 0..1 + seed.below(2) {
                    stack = stack.layer(disk(seed.below(3) as usize, true), random_layer(seed));
                }
                if seed.percent(50) {
                    stack = stack.scratch(disk(3, false), request(&["rw"], None));
                }
                Wanted::Stack(stack)
            }
        }
    }

    async fn get(&self, manager: &Manager) -> Result<Held, blockmount::Error> {
        match self {
            Wanted::Attachment(disk) => manager.attach(disk).await.map(Held::Attachment),
            Wanted::Mount(disk, request) => manager.add(disk, request).await.map(Held::Mount),
            Wanted::Stack(request) => manager.stack(request).await.map(Held::Stack),
        }
    }
}

fn random_disk(seed: &mut Seed) -> Disk {
    if seed.percent(10) {
        return Disk::virtual_disk("/links/0.img").read_only();
    }
    disk(seed.below(3) as usize, seed.percent(85))
}

fn random_request(seed: &mut Seed) -> MountRequest {
    let target = if seed.percent(50) {
        None
    } else {
        Some(*seed.pick(&TARGETS))
    };
    request(seed.pick::<&[&str]>(&OPTIONS), target)
}

fn random_layer(seed: &mut Seed) -> MountRequest {
    request(OPTIONS[seed.below(2) as usize], None)
}

/// One call in five fails, in any way that a backend can; with `never`, some hang until the gates are
/// opened or the VM is gone.
fn faults(
    seed: u64,
    percent: u64,
    never: bool,
) -> impl Fn(&blockmount::testing::Call<'_>) -> Gate + Send + Sync {
    use blockmount::testing::VmStep;
    let faults = random_faults(seed, percent);
    move |call| match faults(call) {
        // Who asks for an identity waits for it; nobody is told to bound that but the backend.
        Gate::Panic { happened: true }
            if never && call.nth % 2 == 0 && call.step != VmStep::Identify =>
        {
            Gate::Never
        }
        Gate::Err(ErrorKind::Other) => {
            Gate::Err(KINDS[(call.nth + call.step as usize) % KINDS.len()])
        }
        gate => gate,
    }
}

/// Every third schedule keeps a few disks for some milliseconds.
fn random_linger(seed: &mut Seed) -> Linger {
    if !seed.percent(33) {
        return Linger::OFF;
    }
    Linger {
        at_most: Duration::from_millis(1 + seed.below(20)),
        how_many: 1 + seed.below(3) as usize,
    }
}

async fn sleep_up_to(seed: &mut Seed, milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(seed.below(milliseconds + 1))).await;
}

/// Waits for a while, and drops the future: before its first poll, after some, or at its end.
async fn give_up_after<F: Future>(
    seed: &mut Seed,
    milliseconds: u64,
    future: F,
) -> Option<F::Output> {
    match seed.below(10) {
        0 => None,
        1 => poll_and_give_up(future, 1 + seed.below(6) as usize).await,
        _ => {
            let limit = Duration::from_millis(seed.below(milliseconds + 1));
            tokio::time::timeout(limit, future).await.ok()
        }
    }
}
