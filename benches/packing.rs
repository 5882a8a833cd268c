//! Layers packed on one VPMEM device: how many fit, how much of the device is lost, and how long it takes.
//!
//! The baseline is the allocator that Hyper-V's shim for Linux containers uses for this: sizes rounded up to
//! powers of four, regions split in four. Both get the same random sequences of layers (see `filling.rs` for
//! their distribution) and the same limit of 1,024 layers on a device of 4 GiB.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod report;

#[path = "../backends/vpmem/tests/packing/filling.rs"]
mod filling;
#[path = "../backends/vpmem/tests/packing/four_way_split.rs"]
#[allow(dead_code)] // its tests look deeper into it
mod four_way_split;

use std::hint::black_box;
use std::time::Duration;

use blockmount::testing::Seed;
use blockmount_vpmem::Packing;
use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use filling::{Comparison, Device, Leaving, compare};
use four_way_split::FourWaySplit;
use report::{Beside, Report, Row, Target};

const SEQUENCES: u64 = 10_000;
const SIZES: usize = 1024;

/// What is on the device while pairs are timed.
const OCCUPANCIES: [&str; 2] = ["empty", "holes"];

/// Layers between 4 KiB and 2 MiB, so that hundreds fit with either allocator.
fn small(seed: &mut Seed) -> u64 {
    4096 * (1 + seed.below(512))
}

/// A device on which every other one of 800 small layers has left.
fn with_holes<D: Device>() -> (D, Vec<D::Range>) {
    let (mut device, mut seed) = (D::new(), Seed::new(0));
    let mut held: Vec<D::Range> = (0..800)
        .map_while(|_| device.take(small(&mut seed)))
        .collect();
    for number in (0..held.len()).rev().step_by(2) {
        device.give_back(held.swap_remove(number));
    }
    (device, held)
}

fn pairs<D: Device>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut seed = Seed::new(1);
    let sizes: Vec<u64> = (0..SIZES).map(|_| small(&mut seed)).collect();
    for occupancy in OCCUPANCIES {
        let (mut device, _held) = match occupancy {
            "empty" => (D::new(), Vec::new()),
            _ => with_holes::<D>(),
        };
        let mut next = sizes.iter().cycle();
        group.bench_function(occupancy, |bencher| {
            bencher.iter(|| {
                let range = device.take(*next.next().unwrap()).unwrap();
                device.give_back(black_box(range));
            });
        });
    }
}

fn rows(adding: &Comparison, leaving: &Comparison) -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, found) in [
        ("layers only added", adding),
        ("two in five leave", leaving),
    ] {
        let beside = Beside {
            ours: found.ours.to_string(),
            baseline: found.baseline.to_string(),
            ratio: found.ratio,
        };
        let what_held = format!("layers held before it is full, median; {what}");
        rows.push(Row::compared(
            &what_held,
            beside,
            ">= 1.5 x",
            found.ratio >= 1.5,
        ));
        let lowest = format!("{:.2} x", found.lowest_ratio);
        let what_lowest = format!("the lowest ratio of {SEQUENCES} sequences; {what}");
        rows.push(Row::measured(
            &what_lowest,
            lowest,
            ">= 1 x",
            found.lowest_ratio >= 1.0,
        ));
        let beside = Beside {
            ours: format!("{:.1} %", 100.0 * found.unused),
            baseline: format!("{:.1} %", 100.0 * found.baseline_unused),
            ratio: found.baseline_unused / found.unused,
        };
        let what_unused = format!("of the device lost when full, mean; {what}");
        rows.push(Row::compared(
            &what_unused,
            beside,
            "<= 15 %",
            found.unused <= 0.15,
        ));
    }
    for occupancy in OCCUPANCIES {
        let ours = format!("packing/{occupancy}");
        let row = Row::new(format!("an allocation and a release, {occupancy}"), ours);
        let row = row.baseline(format!("four_way_split/{occupancy}"));
        rows.push(row.target(Target::MaxNanos(2_000.0)));
    }
    rows
}

fn main() {
    let report = Report::begin();
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .without_plots()
        .configure_from_args();
    let mut group = criterion.benchmark_group("packing");
    pairs::<Packing>(&mut group);
    group.finish();
    let mut group = criterion.benchmark_group("four_way_split");
    pairs::<FourWaySplit>(&mut group);
    group.finish();
    criterion.final_summary();
    let [adding, leaving] =
        [Leaving::No, Leaving::TwoInFive].map(|leaving| compare(SEQUENCES, leaving));
    report.print(&rows(&adding, &leaving));
}
