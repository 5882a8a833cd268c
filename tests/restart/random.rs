//! Random schedules of several processes, one after the other: callers that collide, delays, faults, lost lines, VMs that
//! end, journals that fail, and a kill at any moment.
//!
//! `BLOCKMOUNT_RESTARTS=n` sets how many there are; `BLOCKMOUNT_SEED=n` replays one of them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockmount::testing::{FakeVm, Gate, Seed, VmStep, random_delays, random_faults};
use blockmount::{Disk, ErrorKind, Held, HolderName, Manager, StackRequest};

use crate::common::{layer, ro, rw, scratch};
use crate::process::{Killing, World, run_with};

const SCHEDULES: u64 = 1_500;

/// Schedules beyond those that have found a fault.
const FOUND: [u64; 3] = [
    // A disk had been detached, and the next one recorded at its locator, before the record of the first was removed.
    6_311,
    // The locator of a disk that could not be told, and that the guest had unplugged, went to the next disk.
    12_974, // A disk in doubt had no slot any more, and was taken for what was in it.
    56_196,
];

const NAMES: u64 = 8;
const NEVER: usize = usize::MAX;

/// What happened, to show that the schedules try what they are there for.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    schedules: u64,
    restarts: u64,
    handles: u64,
    claimed: u64,
    lost: u64,
    ended_vms: u64,
}

impl Sums {
    fn plus(self, other: Sums) -> Sums {
        Sums {
            schedules: self.schedules + other.schedules,
            restarts: self.restarts + other.restarts,
            handles: self.handles + other.handles,
            claimed: self.claimed + other.claimed,
            lost: self.lost + other.lost,
            ended_vms: self.ended_vms + other.ended_vms,
        }
    }
}

#[test]
fn schedules_with_restarts() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("BLOCKMOUNT_SEED") {
        println!("{:?}", schedule(seed));
        return;
    }
    FOUND
        .into_iter()
        .for_each(|seed| assert!(schedule(seed).restarts > 0));
    let schedules = number("BLOCKMOUNT_RESTARTS").unwrap_or(SCHEDULES);
    let (next, began) = (AtomicU64::new(0), Instant::now());
    let sums = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| work(&next, schedules)))
            .collect();
        let sums = workers.into_iter().map(|worker| worker.join().unwrap());
        sums.fold(Sums::default(), Sums::plus)
    });
    println!("seeds 0 to {schedules} in {:?}: {sums:?}", began.elapsed());
    assert!(
        sums.schedules == schedules && sums.restarts >= schedules,
        "{sums:?}"
    );
    let often = |sum: u64| sum >= schedules / 20;
    assert!(often(sums.handles) && often(sums.claimed), "{sums:?}");
    assert!(sums.lost >= schedules / 100, "{sums:?}");
    assert!(sums.ended_vms >= schedules / 100, "{sums:?}");
}

fn work(next: &AtomicU64, schedules: u64) -> Sums {
    let mut sums = Sums::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= schedules {
            return sums;
        }
        match catch_unwind(AssertUnwindSafe(|| schedule(seed))) {
            Ok(of_this) => sums = sums.plus(of_this),
            Err(panic) => {
                eprintln!("schedule {seed} failed; replay it with BLOCKMOUNT_SEED={seed}");
                next.store(schedules, Ordering::Relaxed);
                resume_unwind(panic);
            }
        }
    }
}

/// What the processes of one schedule have in common, as an onlooker knows it.
#[derive(Clone, Default)]
struct Known(Arc<Mutex<Knowledge>>);

#[derive(Default)]
struct Knowledge {
    /// The names whose handles were given out and not released.
    held: BTreeMap<HolderName, ()>,
    /// Whether a holder may be lost: a backend could not tell what is there, or the VM has ended.
    may_lose: bool,
    sums: Sums,
}

impl Known {
    fn with<T>(&self, look: impl FnOnce(&mut Knowledge) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }
}

fn schedule(number: u64) -> Sums {
    let mut seed = Seed::new(number);
    let vm = FakeVm::with_slots(*seed.pick(&[3, 4, 256]));
    vm.attach_foreign(&layer(9));
    let foreign = vm.left();
    let longest = Duration::from_millis(*seed.pick(&[0, 2, 5]));
    vm.delay_by(random_delays(seed.next(), longest));
    let mut world = World::over(vm);
    let known = Known::default();
    let mut restarts = 0;
    let wanted = 1 + seed.below(3);
    while restarts < wanted {
        let percent = *seed.pick(&[0, 0, 10, 20]);
        let adopts_fail = seed.percent(20);
        let points = seed.below(if restarts == 0 { 90 } else { 60 }) as usize;
        let ends_vm = seed.percent(5);
        if seed.percent(10) {
            world.journal.fail_after(seed.below(60) as usize);
        }
        if adopts_fail && percent > 0 {
            known.with(|known| known.may_lose = true);
        }
        let faults = faults(seed.next(), percent, adopts_fail);
        let (of_process, known_too) = (Seed::new(seed.next()), known.clone());
        let outcome = run_with(&world, points, faults, |world, journal| {
            process(world, journal, of_process, known_too, ends_vm)
        });
        world = outcome.unwrap_or_else(|killed| killed);
        restarts += 1;
    }
    known.with(|known| {
        known.sums.restarts += restarts;
        known.sums.schedules += 1;
    });
    let known_too = known.clone();
    let end = run_with(
        &world,
        NEVER,
        |_| Gate::Ok,
        |world, journal| last(world, journal, known_too),
    );
    assert!(end.is_ok(), "nobody kills the last process");
    if let Err(violation) = world.vm.check() {
        panic!("{violation}");
    }
    let ended = known.with(|known| known.sums.ended_vms > 0);
    assert_eq!(world.vm.left(), if ended { Vec::new() } else { foreign });
    assert!(world.journal.is_empty(), "{:?}", world.journal);
    known.with(|known| known.sums)
}

/// Some calls fail in any way that a backend can. Adoptions do so only where that is wanted.
fn faults(
    seed: u64,
    percent: u64,
    adopts_fail: bool,
) -> impl Fn(&blockmount::testing::Call<'_>) -> Gate + Send + Sync {
    let faults = random_faults(seed, percent);
    move |call| match faults(call) {
        // In a process that is about to end an effect is often there before its answer.
        Gate::Ok if percent > 0 && call.nth % 5 == 0 => Gate::SlowAnswer(Duration::from_millis(3)),
        _ if call.step == VmStep::Adopt && !adopts_fail => Gate::Ok,
        gate => gate,
    }
}

/// One process: it recovers, some holders come back, then callers come and go until it is killed.
async fn process(
    world: World,
    journal: Killing,
    mut seed: Seed,
    known: Known,
    ends_vm: bool,
) -> World {
    let recovered = world.builder().recover(journal).await;
    let recovery = world.alive(recovered).await;
    check_holders(&recovery, &known);
    let mut kept = Vec::new();
    for name in names() {
        if seed.percent(60)
            && let Ok(held) = recovery.claim(&name)
        {
            known.with(|known| {
                known.held.insert(name.clone(), ());
                known.sums.claimed += 1;
            });
            kept.push((Some(name), held));
        }
    }
    let manager = recovery.manager().clone();
    if seed.percent(70) {
        // Who has not come back by now has lost its handle.
        let back = kept.iter().filter_map(|(name, _)| name.clone());
        let back: Vec<HolderName> = back.collect();
        known.with(|known| known.held.retain(|name, ()| back.contains(name)));
        drop(recovery.settle().await);
    } else {
        drop(recovery);
    }
    let mut callers = Vec::new();
    for _ in 0..1 + seed.below(3) {
        let of_caller = (manager.clone(), Seed::new(seed.next()), known.clone());
        callers.push(tokio::spawn(call(of_caller)));
    }
    if ends_vm {
        tokio::time::sleep(Duration::from_millis(seed.below(30))).await;
        known.with(|known| {
            known.may_lose = true;
            known.sums.ended_vms += 1;
        });
        world.vm.kill();
    }
    for (name, held) in kept {
        tokio::time::sleep(Duration::from_millis(seed.below(8))).await;
        give_back(&mut seed, &known, name, held).await;
    }
    for caller in callers {
        world.alive(caller.await).await;
    }
    // It ends by itself, with tear-downs under way and handles that it has kept.
    world.alive(Ok::<(), ()>(())).await;
    world.restart()
}

fn names() -> impl Iterator<Item = HolderName> {
    (0..NAMES).map(|number| HolderName::new(format!("holder {number}")).unwrap())
}

/// Every handle that was given out is known to the journal, and there unless something could take it away.
fn check_holders(recovery: &blockmount::Recovery, known: &Known) {
    let holders = &recovery.report().holders;
    known.with(|known| {
        for name in known.held.keys() {
            let found = holders.iter().find(|holder| holder.name == *name);
            let found = found.unwrap_or_else(|| panic!("{name} is forgotten"));
            assert!(
                found.is_up || known.may_lose,
                "{name} has lost its handle: {recovery:?}"
            );
        }
        for holder in holders.iter().filter(|holder| !holder.is_up) {
            if known.held.remove(&holder.name).is_some() {
                known.sums.lost += 1;
            }
        }
    });
}

/// One caller: some requests, one after the other.
async fn call((manager, mut seed, known): (Manager, Seed, Known)) {
    for _ in 0..1 + seed.below(4) {
        tokio::time::sleep(Duration::from_millis(seed.below(6))).await;
        if seed.percent(10) {
            drop(manager.drain().await);
            continue;
        }
        let name = seed
            .percent(60)
            .then(|| names().nth(seed.below(NAMES) as usize).unwrap());
        if let Ok(held) = ask(&manager, &mut seed, name.as_ref()).await {
            if let Some(name) = &name {
                known.with(|known| {
                    known.held.insert(name.clone(), ());
                    known.sums.handles += 1;
                });
            }
            tokio::time::sleep(Duration::from_millis(seed.below(6))).await;
            give_back(&mut seed, &known, name, held).await;
        }
    }
}

fn random_disk(seed: &mut Seed) -> Disk {
    layer(seed.below(3) as usize)
}

async fn ask(
    manager: &Manager,
    seed: &mut Seed,
    name: Option<&HolderName>,
) -> Result<Held, blockmount::Error> {
    match seed.below(10) {
        0 | 1 => {
            let disk = random_disk(seed);
            let attached = match name {
                Some(name) => manager.attach_held_by(&disk, name).await,
                None => manager.attach(&disk).await,
            };
            attached.map(Held::Attachment)
        }
        2..=6 => {
            let disk = random_disk(seed);
            let request = match seed.percent(30) {
                true => ro().at(*seed.pick(&["/a", "/a/b", "/run/m/m0"])),
                false => ro(),
            };
            let request = match name {
                Some(name) => request.held_by(name.clone()),
                None => request,
            };
            manager.add(&disk, &request).await.map(Held::Mount)
        }
        _ => {
            let mut stack = StackRequest::new(*seed.pick(&["/tree", "/a/b"]));
            for _ in 0..1 + seed.below(2) {
                stack = stack.layer(random_disk(seed), ro());
            }
            if seed.percent(40) {
                stack = stack.scratch(scratch(3), rw());
            }
            if let Some(name) = name {
                stack = stack.held_by(name.clone());
            }
            manager.stack(&stack).await.map(Held::Stack)
        }
    }
}

/// Gives a handle back one way or another, or keeps it to the end of the process.
async fn give_back(seed: &mut Seed, known: &Known, name: Option<HolderName>, held: Held) {
    let way = seed.below(10);
    if way < 5 {
        // It is kept until the process is killed.
        return std::mem::forget(held);
    }
    if let Some(name) = &name {
        known.with(|known| known.held.remove(name));
    }
    match way {
        5..=7 => drop(held.release().await),
        8 => drop(held.release()),
        _ => drop(held),
    }
}

/// The last process: nothing fails any more, and everything is given back.
async fn last(world: World, journal: Killing, known: Known) {
    let recovery = world.builder().recover(journal).await.unwrap();
    check_holders(&recovery, &known);
    let mut held = Vec::new();
    for name in names() {
        match recovery.claim(&name) {
            Ok(handle) => held.push(handle),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
        }
    }
    let manager = recovery.manager().clone();
    let settled = recovery.settle().await;
    assert!(settled.failed.is_empty(), "{settled:?}");
    for handle in held {
        handle.release().await.unwrap();
    }
    let drained = manager.drain().await;
    assert!(drained.is_clean(), "{drained:?}");
}
