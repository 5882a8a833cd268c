//! What the managers add to the backends: sharing what is up, the first lease and the last, many layers at
//! once, memory.
//!
//! The backends here do nothing, or wait a millisecond for each step. The baselines:
//!
//! - "hcsshim scan": how hcsshim's SCSI package shares a disk. One table under one lock,
//!   walked from end to end, with a full comparison of the configuration at each entry.
//! - "floor": the steps of one disk one after the other, with nobody in between.
//! - "primitives": what a manager cannot do without, in the same run: a look-up in a `DashMap`; an uncontended lock of a
//!   `tokio` mutex, with a task that is spawned and waited for.
//!
//! A join is of 64 mounts in turn, however many are live: what is measured is the table, not the memory
//! behind it.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod counting;
mod nothing;
mod primitives;
mod report;

use std::future::Future;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use blockmount::{Disk, Linger, Manager, Mount};
use criterion::{BenchmarkId, Criterion, SamplingMode};
use nothing::{Ids, Nothing, disk, request};
use report::{Beside, Report, Row, Target};
use tokio::runtime::{Builder, Runtime};

const LIVE: [usize; 4] = [1, 256, 100_000, 1_000_000];
const OCCUPANCIES: [usize; 4] = [0, 1_000, 100_000, 1_000_000];
const LAYERS: usize = 64;
const TASKS: usize = 8;

/// So many live, each in turn; only the first ones where nothing is measured, as `cargo test` runs it.
fn measured(live: [usize; 4]) -> impl Iterator<Item = usize> {
    let is_measured = std::env::args().any(|argument| argument == "--bench");
    live.into_iter().take(if is_measured { 4 } else { 2 })
}

fn manager(step: Duration) -> Manager {
    manager_that_keeps(Linger::OFF, step)
}

fn manager_that_keeps(linger: Linger, step: Duration) -> Manager {
    manager_of(
        Nothing {
            step,
            ids: Ids::Inodes,
        },
        linger,
    )
}

fn manager_of(nothing: Nothing, linger: Linger) -> Manager {
    let builder = Manager::builder().transport(nothing).unplugger(nothing);
    builder.mounter(nothing).linger(linger).build()
}

async fn live(manager: &Manager, count: usize) -> Vec<Mount> {
    let (mut mounts, request) = (Vec::with_capacity(count), request());
    for number in 0..count {
        mounts.push(manager.add(&disk(number), &request).await.unwrap());
    }
    mounts
}

fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

fn two_threads() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).enable_time().build().unwrap()
}

/// The time of `rounds` rounds, inside the runtime.
fn timed<F: Future<Output = ()>>(
    runtime: &Runtime,
    rounds: u64,
    mut round: impl FnMut() -> F,
) -> Duration {
    runtime.block_on(async {
        let began = Instant::now();
        for _ in 0..rounds {
            round().await;
        }
        began.elapsed()
    })
}

/// hcsshim's table: what it does to share a disk that is attached, or to attach one.
#[derive(Default)]
struct HcsshimScan(Mutex<Vec<Option<(Disk, usize)>>>);

impl HcsshimScan {
    fn with(count: usize) -> Self {
        let taken = (0..count).map(|number| Some((disk(number), 1)));
        HcsshimScan(Mutex::new(taken.chain([None]).collect()))
    }

    fn take(&self, disk: &Disk) -> usize {
        let mut table = self.0.lock().unwrap();
        let mut free = None;
        for (index, entry) in table.iter_mut().enumerate() {
            match entry {
                Some((taken, shares)) if taken == disk => {
                    *shares += 1;
                    return index;
                }
                Some(_) => {}
                None => free = free.or(Some(index)),
            }
        }
        let index = free.unwrap();
        table[index] = Some((disk.clone(), 1));
        index
    }

    fn give_back(&self, index: usize) {
        let entry = &mut self.0.lock().unwrap()[index];
        match entry {
            Some((_, shares)) if *shares > 1 => *shares -= 1,
            _ => *entry = None,
        }
    }
}

fn joining(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("join");
    group.sampling_mode(SamplingMode::Flat);
    let runtime = one_thread();
    for count in measured(LIVE) {
        let (manager, request) = (manager(Duration::ZERO), request());
        let mounts = runtime.block_on(live(&manager, count));
        // Spread over all that are live.
        let shared: Vec<Disk> = (0..LAYERS).map(|n| disk(n * count / LAYERS)).collect();
        let mut turn = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter_custom(|rounds| {
                timed(&runtime, rounds, || {
                    turn = (turn + 1) % LAYERS;
                    let (manager, disk, request) = (&manager, &shared[turn], &request);
                    async move {
                        let mount = manager.add(disk, request).await.unwrap();
                        black_box(mount.path());
                        drop(mount);
                    }
                })
            });
        });
        drop(mounts);
        runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
        primitives::look_up(&mut group, count, LAYERS);

        let scan = HcsshimScan::with(count);
        let name = BenchmarkId::from_parameter(format!("{count}_seed_scan"));
        group.sample_size(20).bench_function(name, |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % LAYERS;
                scan.give_back(black_box(scan.take(&shared[turn])));
            });
        });
        group.sample_size(100);
    }
}

fn first_and_last(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("first_and_last");
    group.sampling_mode(SamplingMode::Flat);
    let runtime = one_thread();
    for count in measured(OCCUPANCIES) {
        let (manager, request) = (manager(Duration::ZERO), request());
        let mounts = runtime.block_on(live(&manager, count));
        let new = disk(count);
        group.bench_function(format!("attach_{count}"), |bencher| {
            bencher.iter_custom(|rounds| {
                timed(&runtime, rounds, || async {
                    let attachment = manager.attach(&new).await.unwrap();
                    attachment.release().await.unwrap();
                })
            });
        });
        group.bench_function(format!("mount_{count}"), |bencher| {
            bencher.iter_custom(|rounds| {
                timed(&runtime, rounds, || async {
                    let mount = manager.add(&new, &request).await.unwrap();
                    mount.release().await.unwrap();
                })
            });
        });
        drop(mounts);
        runtime.block_on(async { assert!(manager.drain().await.is_clean()) });

        let scan = HcsshimScan::with(count);
        let name = format!("{count}_seed_scan");
        group.sample_size(20).bench_function(name, |bencher| {
            bencher.iter(|| scan.give_back(black_box(scan.take(&new))));
        });
        group.sample_size(100);
    }
}

/// The first lease and the last, by several tasks at once. A time is that of the run, divided by what all did together.
fn by_many_tasks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tasks");
    group.sampling_mode(SamplingMode::Flat);
    let runtime = two_threads();
    let manager = manager(Duration::ZERO);
    group.bench_function("add_and_release", |bencher| {
        bencher.iter_custom(|rounds| {
            primitives::by_tasks(&runtime, TASKS, rounds, |task| {
                let (manager, request, disk) = (manager.clone(), request(), disk(task));
                move || {
                    let (manager, request, disk) = (manager.clone(), request.clone(), disk.clone());
                    async move {
                        let mount = manager.add(&disk, &request).await.unwrap();
                        mount.release().await.unwrap();
                    }
                }
            })
        });
    });
    group.bench_function("lock_and_task", |bencher| {
        bencher.iter_custom(|rounds| {
            primitives::by_tasks(&runtime, TASKS, rounds, |_| primitives::lock_and_task())
        });
    });
    group.finish();
    let one = one_thread();
    let mut group = criterion.benchmark_group("first_and_last");
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function("lock_and_task", |bencher| {
        bencher.iter_custom(|rounds| timed(&one, rounds, primitives::lock_and_task()));
    });
}

/// A disk that is released and asked for again, with backends that take a millisecond for each step.
fn lingering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linger");
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    let (runtime, step, request) = (one_thread(), Duration::from_millis(1), request());
    let keeps = Linger {
        at_most: Duration::from_secs(600),
        how_many: 8,
    };
    for (name, linger) in [("on", keeps), ("off", Linger::OFF)] {
        let manager = manager_that_keeps(linger, step);
        for (what, timed) in [("release", 1), ("add", 0)] {
            group.bench_function(format!("{what}_{name}"), |bencher| {
                bencher.iter_custom(|rounds| {
                    runtime.block_on(async {
                        let mut took = [Duration::ZERO; 2];
                        for _ in 0..rounds {
                            let began = Instant::now();
                            let mount = manager.add(&disk(1), &request).await.unwrap();
                            let added = Instant::now();
                            mount.release().await.unwrap();
                            took[0] += added - began;
                            took[1] += added.elapsed();
                        }
                        took[timed]
                    })
                });
            });
        }
        runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
    }
    let manager = manager(step);
    let held = runtime.block_on(async { manager.add(&disk(1), &request).await.unwrap() });
    group.bench_function("join", |bencher| {
        bencher.iter_custom(|rounds| {
            runtime.block_on(async {
                let mut took = Duration::ZERO;
                for _ in 0..rounds {
                    let began = Instant::now();
                    let mount = manager.add(&disk(1), &request).await.unwrap();
                    took += began.elapsed();
                    drop(mount);
                }
                took
            })
        });
    });
    drop(held);
    runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
}

fn many_at_once(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("layers");
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    let (runtime, step) = (two_threads(), Duration::from_millis(1));
    let (manager, request) = (manager(step), request());
    group.bench_function("64_at_once", |bencher| {
        bencher.iter_custom(|rounds| {
            timed(&runtime, rounds, || async {
                let layers: Vec<_> = (0..LAYERS)
                    .map(|number| {
                        let (manager, request) = (manager.clone(), request.clone());
                        tokio::spawn(async move {
                            let mount = manager.add(&disk(number), &request).await.unwrap();
                            mount.release().await.unwrap();
                        })
                    })
                    .collect();
                for layer in layers {
                    layer.await.unwrap();
                }
            })
        });
    });
    group.bench_function("floor", |bencher| {
        bencher.iter_custom(|rounds| {
            timed(&runtime, rounds, || async {
                for _ in 0..4 {
                    tokio::time::sleep(step).await;
                }
            })
        });
    });
}

/// Bytes of memory for each live mount. hcsshim's controller takes 642 for the same, with the same names.
fn memory(ids: Ids) -> usize {
    const COUNT: usize = 100_000;
    let runtime = one_thread();
    let step = Duration::ZERO;
    let manager = manager_of(Nothing { step, ids }, Linger::OFF);
    let before = counting::in_use();
    let mounts = runtime.block_on(live(&manager, COUNT));
    let bytes = (counting::in_use() - before) / COUNT;
    drop(mounts);
    runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
    bytes
}

fn memory_rows() -> [Row; 2] {
    [("names", Ids::Names), ("inodes", Ids::Inodes)].map(|(by, ids)| {
        let bytes = memory(ids);
        let beside = Beside {
            ours: format!("{bytes} B"),
            baseline: "642 B".into(),
            ratio: 642.0 / bytes as f64,
        };
        let what = format!("memory of a live mount, ids by {by}");
        Row::compared(&what, beside, "< 640 B", bytes < 640)
    })
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for count in LIVE {
        let row = Row::new(
            format!("join and leave, {count} live"),
            format!("join/{count}"),
        )
        .baseline(format!("join/{count}_look_up"))
        .target(Target::WithinBaseline { factor: 5.0 });
        rows.push(row);
        let row = Row::new(
            format!("join and leave, {count} live, beside hcsshim"),
            format!("join/{count}"),
        );
        rows.push(row.baseline(format!("join/{count}_seed_scan")));
    }
    let others = LIVE[1..]
        .iter()
        .map(|count| format!("join/{count}"))
        .collect();
    let flat = Target::FlatWithin {
        of: others,
        factor: 1.5,
    };
    rows.push(Row::new("the same, slowest over fastest", "join/1").target(flat));
    for count in OCCUPANCIES {
        for (what, bench) in [
            ("attach + last detach", "attach"),
            ("add + last release", "mount"),
        ] {
            let name = format!("first_and_last/{bench}_{count}");
            let row = Row::new(format!("first {what}, {count} live"), name)
                .baseline("first_and_last/lock_and_task")
                .target(Target::WithinBaseline { factor: 10.0 })
                .target(Target::MaxNanos(2_000.0));
            rows.push(row);
        }
        let name = format!("first_and_last/mount_{count}");
        let row = Row::new(
            format!("add + last release, {count} live, beside hcsshim"),
            name,
        );
        rows.push(row.baseline(format!("first_and_last/{count}_seed_scan")));
    }
    let flat = Target::FlatWithin {
        of: vec!["first_and_last/mount_1000000".into()],
        factor: 2.0,
    };
    let row = Row::new(
        "add + last release, 1,000 and 1,000,000 live",
        "first_and_last/mount_1000",
    );
    rows.push(row.target(flat));
    let row = Row::new(
        "first add + last release by 8 tasks",
        "tasks/add_and_release",
    );
    let row = row.baseline("tasks/lock_and_task");
    rows.push(row.target(Target::WithinBaseline { factor: 10.0 }));
    let row =
        Row::new("release of what lingers", "linger/release_on").baseline("linger/release_off");
    rows.push(row.target(Target::WithinBaseline { factor: 0.01 }));
    let row =
        Row::new("add of what lingers, beside a join", "linger/add_on").baseline("linger/join");
    rows.push(row.target(Target::WithinBaseline { factor: 2.0 }));
    let within = Target::WithinBaseline { factor: 1.25 };
    let layers = Row::new("64 layers at once, 4 steps of 1 ms", "layers/64_at_once");
    rows.push(layers.baseline("layers/floor").target(within));
    rows
}

fn main() {
    let report = Report::begin();
    let mut criterion = Criterion::default()
        .sample_size(100)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .without_plots()
        .configure_from_args();
    joining(&mut criterion);
    first_and_last(&mut criterion);
    by_many_tasks(&mut criterion);
    lingering(&mut criterion);
    many_at_once(&mut criterion);
    criterion.final_summary();
    let mut rows = rows();
    rows.extend(memory_rows());
    report.print(&rows);
}
