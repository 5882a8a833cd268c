//! What the managers add to the backends: sharing what is up, the first lease and the last, many layers at
//! once, memory.
//!
//! The backends here do nothing, or wait a millisecond for each step. The baselines:
//!
//! - "hcsshim scan": how hcsshim's SCSI package shares a disk. One table under one lock,
//!   walked from end to end, with a full comparison of the configuration at each entry.
//! - "floor": the steps of one disk one after the other, with nobody in between.
//!
//! A join is of 64 mounts in turn, however many are live: what is measured is the table, not the memory
//! behind it.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod counting;
mod nothing;
mod report;

use std::future::Future;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use blockmount::{Disk, Manager, Mount};
use criterion::{BenchmarkId, Criterion, SamplingMode};
use nothing::{Nothing, disk, request};
use report::{Report, Row, Target};
use tokio::runtime::{Builder, Runtime};

const LIVE: [usize; 3] = [1, 256, 100_000];
const OCCUPANCIES: [usize; 3] = [0, 255, 100_000];
const LAYERS: usize = 64;

fn manager(step: Duration) -> Manager {
    let nothing = Nothing { step };
    let builder = Manager::builder().transport(nothing).unplugger(nothing);
    builder.mounter(nothing).build()
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
    for count in LIVE {
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
    for count in OCCUPANCIES {
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

/// Bytes of memory for each live mount.
fn memory() -> Row {
    const COUNT: usize = 100_000;
    let runtime = one_thread();
    let manager = manager(Duration::ZERO);
    let before = counting::in_use();
    let mounts = runtime.block_on(live(&manager, COUNT));
    let bytes = (counting::in_use() - before) / COUNT;
    drop(mounts);
    runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
    let met = bytes < 1024;
    Row::measured(
        "memory per live mount",
        format!("{bytes} B"),
        "< 1 KiB",
        met,
    )
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for count in LIVE {
        let row = Row::new(
            format!("join and leave, {count} live"),
            format!("join/{count}"),
        )
        .baseline(format!("join/{count}_seed_scan"))
        .target(Target::MaxNanos(200.0));
        rows.push(row);
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
                .baseline(format!("first_and_last/{count}_seed_scan"))
                .target(Target::MaxNanos(10_000.0));
            rows.push(row);
        }
    }
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
    many_at_once(&mut criterion);
    criterion.final_summary();
    let mut rows = rows();
    rows.push(memory());
    report.print(&rows);
}
