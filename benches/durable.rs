//! What a journal in a file costs: a disk that is attached, mounted and released, beside the same without a journal.
//!
//! The journal is on a tmpfs (`/dev/shm`), where it belongs.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod nothing;
mod report;

use std::time::Duration;

use blockmount::{HolderName, Manager, MountRequest};
use blockmount_journal::FileJournal;
use criterion::Criterion;
use nothing::{Nothing, disk, request};
use report::{Report, Row, Target};
use tokio::runtime::{Builder, Runtime};

/// An add alone, without its release, is timed by the caller.
async fn add(manager: &Manager, request: &MountRequest) -> Duration {
    let began = std::time::Instant::now();
    let mount = manager.add(&disk(1), request).await.unwrap();
    let took = began.elapsed();
    mount.release().await.unwrap();
    took
}

fn measure(
    criterion: &mut Criterion,
    runtime: &Runtime,
    managers: &[(&str, Manager, MountRequest)],
) {
    let mut group = criterion.benchmark_group("durable");
    for (name, manager, request) in managers {
        group.bench_function(*name, |bencher| {
            bencher.iter_custom(|rounds| {
                runtime.block_on(async {
                    let mut sum = Duration::ZERO;
                    for _ in 0..rounds {
                        sum += add(manager, request).await;
                    }
                    sum
                })
            });
        });
    }
    for (name, manager, _) in managers.iter().take(2) {
        let held = runtime.block_on(manager.add(&disk(1), &request())).unwrap();
        group.bench_function(format!("join_{name}"), |bencher| {
            bencher.iter(|| runtime.block_on(manager.add(&disk(1), &request())).unwrap());
        });
        drop(held);
        runtime.block_on(async { assert!(manager.drain().await.is_clean()) });
    }
    group.finish();
}

fn main() {
    let report = Report::begin();
    let mut criterion = Criterion::default().without_plots().configure_from_args();
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let builder = || {
        let nothing = Nothing::default();
        let builder = Manager::builder().transport(nothing).unplugger(nothing);
        builder.mounter(nothing)
    };
    let journal = FileJournal::open(directory.path().join("vm1")).unwrap();
    let recovery = runtime.block_on(builder().recover(journal)).unwrap();
    let durable = recovery.manager().clone();
    let named = request().held_by(HolderName::new("web").unwrap());
    let managers = [
        ("none", builder().build(), request()),
        ("file", durable.clone(), request()),
        ("file_named", durable, named),
    ];
    measure(&mut criterion, &runtime, &managers);
    criterion.final_summary();
    let row = |what: &str, name: &str, baseline: &str, most: f64| {
        let row = Row::new(what, format!("durable/{name}"));
        let row = row.baseline(format!("durable/{baseline}"));
        row.target(Target::MaxAdded(most))
    };
    report.print(&[
        row("durable add", "file", "none", 50e3),
        row("durable add with a name", "file_named", "none", 50e3),
        row("join", "join_file", "join_none", 20.0),
    ]);
}
