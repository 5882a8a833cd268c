//! What a hash tree costs: built by us on all cores, beside `veritysetup format` of the same file.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod report;

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use blockmount::HashAlgorithm;
use blockmount_verity::{Parameters, Tree, format};
use criterion::{Criterion, Throughput};
use report::{Report, Row, Target};

const SIZE: u64 = 256 << 20;
const ALGORITHMS: [HashAlgorithm; 2] = [HashAlgorithm::Sha256, HashAlgorithm::Sha512];

fn main() {
    let report = Report::begin();
    let mut criterion = Criterion::default().without_plots().configure_from_args();
    // In memory, so that neither waits for a medium.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let [data, theirs] = ["data", "theirs"].map(|name| directory.path().join(name));
    let mut file = File::create(&data).unwrap();
    let mut state = 1u64;
    for _ in 0..SIZE >> 20 {
        let words = (0..1 << 17).flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_le_bytes()
        });
        file.write_all(&words.collect::<Vec<u8>>()).unwrap();
    }
    let file = File::open(&data).unwrap();
    let mut group = criterion.benchmark_group("verity");
    group.throughput(Throughput::Bytes(SIZE)).sample_size(10);
    group.measurement_time(Duration::from_secs(10));
    for algorithm in ALGORITHMS {
        let parameters = Parameters {
            algorithm,
            ..Parameters::default()
        };
        let tree = Tree::behind_superblock(&parameters, SIZE / 4096, 0).unwrap();
        group.bench_function(format!("ours_{algorithm}"), |bencher| {
            bencher.iter(|| {
                let ours = tempfile::tempfile_in(directory.path()).unwrap();
                format(&file, &ours, &tree, &|_| true).unwrap()
            });
        });
        group.bench_function(format!("veritysetup_{algorithm}"), |bencher| {
            bencher.iter(|| {
                let hash = format!("--hash={algorithm}");
                let mut command = Command::new("/usr/sbin/veritysetup");
                let command = command.args([&hash, "format"]).args([&data, &theirs]);
                assert!(command.stdout(Stdio::null()).status().unwrap().success());
                std::fs::remove_file(&theirs).unwrap();
            });
        });
    }
    group.finish();
    criterion.final_summary();
    report.print(&ALGORITHMS.map(|algorithm| {
        Row::new(
            format!("tree of {algorithm}, 256 MiB"),
            format!("verity/ours_{algorithm}"),
        )
        .baseline(format!("verity/veritysetup_{algorithm}"))
        .target(Target::MinRatio(1.5))
    }));
}
