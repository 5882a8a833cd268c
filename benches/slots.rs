//! Taking a slot and giving it back: at any size, occupancy and policy, from one thread and from two.
//!
//! The baseline, "hcsshim scan", is how hcsshim's SCSI package keeps its slots: a
//! nested table under one lock, walked from end to end for each request. At every slot that is taken it compares the whole
//! configuration (it might be the disk that is asked for), and it remembers the first free one.
//! It finds equal disks on the way, which here is the lease table's work: see the bench of
//! joining and of first attachments for that part.
//!
//! The other baselines are what no table under a lock can do without, in the same run: one lock and unlock of an uncontended
//! `parking_lot::Mutex`; a counter under that lock that goes up and down again, from two threads.
//!
//! With two threads, a time is the time of the run divided by what both did together.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod report;

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmount::slots::{Policy, Reservation, Slots};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, measurement::WallTime};
use report::{Report, Row, Target};

const SIZES: [(u16, u16); 3] = [(4, 64), (64, 256), (64, 16_384)];
const OCCUPANCIES: [&str; 3] = ["empty", "half", "one_free"];
const POLICIES: [(&str, Policy); 2] = [
    ("lowest_first", Policy::LowestFirst),
    ("spread", Policy::Spread),
];
const THREADS: [usize; 2] = [1, 2];
const BASELINE: &str = "seed_scan";
const UNCONTENDED: &str = "lock/uncontended_1t";
const COUNTER: &str = "lock/counter_2t";

/// What hcsshim compares at each slot.
#[derive(Clone, PartialEq, Eq)]
struct Config {
    path: String,
    read_only: bool,
    kind: String,
    provider: String,
}

impl Config {
    /// Paths of one length that differ at the end, as layers of one store do.
    fn number(number: usize) -> Self {
        Config {
            path: format!("/var/lib/images/layers/{number:012}.vhd"),
            read_only: true,
            kind: "VirtualDisk".into(),
            provider: String::new(),
        }
    }
}

struct HcsshimScan(Mutex<Vec<Vec<Option<Config>>>>);

impl HcsshimScan {
    /// Takes the first free slot, unless the same disk has one.
    fn attach(&self, config: Config) -> Option<(usize, usize)> {
        let mut table = self.0.lock().unwrap();
        let mut free = None;
        for (group, slots) in table.iter().enumerate() {
            for (index, slot) in slots.iter().enumerate() {
                match slot {
                    Some(taken) if *taken == config => return Some((group, index)),
                    Some(_) => {}
                    None => free = free.or(Some((group, index))),
                }
            }
        }
        let (group, index) = free?;
        table[group][index] = Some(config);
        free
    }

    fn detach(&self, (group, index): (usize, usize)) -> Option<Config> {
        self.0.lock().unwrap()[group][index].take()
    }
}

fn name((groups, per_group): (u16, u16), occupancy: &str, threads: usize) -> String {
    format!("{groups}x{per_group}_{occupancy}_{threads}t")
}

/// How many slots are taken. "One free" is one for each thread, so that no thread finds none.
fn taken((groups, per_group): (u16, u16), occupancy: &str, threads: usize) -> usize {
    let capacity = usize::from(groups) * usize::from(per_group);
    match occupancy {
        "empty" => 0,
        "half" => capacity / 2,
        _ => capacity - threads,
    }
}

/// The time that `threads` take for `rounds` of `round` together; each makes its own `round`.
fn timed<R: FnMut()>(threads: usize, rounds: u64, start: impl Fn(usize) -> R + Sync) -> Duration {
    let each = rounds.div_ceil(threads as u64);
    let ready = AtomicUsize::new(0);
    let run = |thread| {
        let mut round = start(thread);
        // Not a barrier: the thread that sleeps in one wakes when the other is half done.
        ready.fetch_add(1, Ordering::SeqCst);
        while ready.load(Ordering::SeqCst) < threads {
            std::thread::yield_now();
        }
        let began = Instant::now();
        (0..each).for_each(|_| round());
        (began, Instant::now())
    };
    let times: Vec<(Instant, Instant)> = if threads == 1 {
        vec![run(0)]
    } else {
        std::thread::scope(|scope| {
            let run = &run;
            let start = |thread| scope.spawn(move || run(thread));
            let running: Vec<_> = (0..threads).map(start).collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    };
    // From the first start to the last end, so that threads which had to take turns count in full.
    let began = times.iter().map(|(began, _)| *began).min();
    let ended = times.iter().map(|(_, ended)| *ended).max();
    ended
        .zip(began)
        .map(|(ended, began)| ended - began)
        .unwrap_or_default()
}

fn ours(
    group: &mut BenchmarkGroup<'_, WallTime>,
    size: (u16, u16),
    policy: Policy,
    occupancy: &str,
) {
    for threads in THREADS {
        let slots = Slots::new(size.0, size.1, policy).unwrap();
        let fill = taken(size, occupancy, threads);
        let _held: Vec<Reservation> = (0..fill).map_while(|_| slots.reserve()).collect();
        group.bench_function(name(size, occupancy, threads), |bencher| {
            bencher.iter_custom(|rounds| {
                timed(threads, rounds, |_| {
                    || drop(black_box(slots.reserve().unwrap()))
                })
            });
        });
    }
}

fn baseline(group: &mut BenchmarkGroup<'_, WallTime>, size: (u16, u16), occupancy: &str) {
    let (groups, per_group) = (usize::from(size.0), usize::from(size.1));
    for threads in THREADS {
        let fill = taken(size, occupancy, threads);
        let config = |place| (place < fill).then(|| Config::number(place));
        let table = (0..groups).map(|group| {
            (0..per_group)
                .map(|index| config(group * per_group + index))
                .collect()
        });
        let scan = HcsshimScan(Mutex::new(table.collect()));
        group.bench_with_input(
            BenchmarkId::from_parameter(name(size, occupancy, threads)),
            &scan,
            |bencher, scan| {
                bencher.iter_custom(|rounds| {
                    timed(threads, rounds, |thread| {
                        let mut config = Some(Config::number(groups * per_group + thread));
                        // The configuration goes back and forth: no allocation is counted against it.
                        move || {
                            let slot = scan.attach(config.take().unwrap()).unwrap();
                            config = black_box(scan.detach(slot));
                        }
                    })
                });
            },
        );
    }
}

/// The lock alone.
fn lock(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lock");
    group.sampling_mode(SamplingMode::Flat);
    let counter = &parking_lot::Mutex::new(0_u64);
    group.bench_function("uncontended_1t", |bencher| {
        bencher.iter_custom(|rounds| timed(1, rounds, |_| || *black_box(counter).lock() += 1));
    });
    group.bench_function("counter_2t", |bencher| {
        bencher.iter_custom(|rounds| {
            timed(2, rounds, |_| {
                || {
                    *black_box(counter).lock() += 1;
                    *black_box(counter).lock() -= 1;
                }
            })
        });
    });
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for threads in THREADS {
        let (lock, of_lock, factor) = match threads {
            1 => (UNCONTENDED, "a lock", 3.0),
            _ => (COUNTER, "a counter under a lock", 1.5),
        };
        let mut all = Vec::new();
        for (policy, _) in POLICIES {
            for size in SIZES {
                for occupancy in OCCUPANCIES {
                    let case = name(size, occupancy, threads);
                    let ours = format!("slots_{policy}/{case}");
                    let what = format!("{policy} {}", case.replace('_', " "));
                    let row = Row::new(what, &ours).baseline(format!("{BASELINE}/{case}"));
                    rows.push(match (size, occupancy) {
                        ((4, 64), "one_free") => row.target(Target::MinRatio(20.0)),
                        ((64, _), "one_free") => row.target(Target::MinRatio(1_000.0)),
                        _ => row,
                    });
                    let what = format!("the same, beside {of_lock}");
                    let row = Row::new(what, &ours).baseline(lock);
                    rows.push(row.target(Target::WithinBaseline { factor }));
                    all.push(ours);
                }
            }
        }
        let first = all.remove(0);
        let what = format!("slowest of the above over fastest, {threads}t");
        rows.push(Row::new(what, first).target(Target::FlatWithin {
            of: all,
            factor: 2.0,
        }));
    }
    rows
}

fn main() {
    let report = Report::begin();
    // Many samples, each much shorter than a time slice: the median is then one of those during which
    // nobody else had the processor.
    let mut criterion = Criterion::default()
        .sample_size(200)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(40))
        .without_plots()
        .configure_from_args();
    lock(&mut criterion);
    for (name, policy) in POLICIES {
        let mut group = criterion.benchmark_group(format!("slots_{name}"));
        group.sampling_mode(SamplingMode::Flat);
        for size in SIZES {
            for occupancy in OCCUPANCIES {
                ours(&mut group, size, policy, occupancy);
            }
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group(BASELINE);
    // A scan of a million slots takes milliseconds; that of 256 gets samples as short as ours.
    group
        .sample_size(30)
        .measurement_time(Duration::from_millis(6))
        .sampling_mode(SamplingMode::Flat);
    for size in SIZES {
        for occupancy in OCCUPANCIES {
            baseline(&mut group, size, occupancy);
        }
    }
    group.finish();
    criterion.final_summary();
    report.print(&rows());
}
