//! What a journal in a file costs: a disk that is attached, mounted and released, beside the same without a journal.
//!
//! The journal is on a tmpfs (`/dev/shm`), where it belongs.

// A bench that cannot set up has nothing to measure.
#![allow(clippy::unwrap_used)]

mod report;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, HolderName, Manager, MountOptions, MountRequest,
    Mounter, Presence, Transport, Unplugger,
};
use blockmount_journal::FileJournal;
use criterion::Criterion;
use report::{Report, Row};
use tokio::runtime::{Builder, Runtime};

/// Backends that do nothing.
#[derive(Clone, Copy)]
struct Nothing;

#[async_trait]
impl Transport for Nothing {
    async fn identify(&self, _: &Disk) -> Result<DiskId, BackendError> {
        Ok(DiskId::inode(1, 1))
    }

    async fn attach(&self, _: &Disk, _: &DiskId) -> Result<DeviceLocator, BackendError> {
        Ok(DeviceLocator::new("nothing", 0).unwrap())
    }

    async fn detach(&self, _: &Disk) -> Result<(), BackendError> {
        Ok(())
    }

    async fn adopt(
        &self,
        _: &Disk,
        _: &DiskId,
        _: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        Ok(Presence::Absent)
    }
}

#[async_trait]
impl Unplugger for Nothing {
    async fn unplug(&self, _: &DeviceLocator) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl Mounter for Nothing {
    async fn mount(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        Ok(())
    }

    async fn unmount(&self, _: &Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Absent)
    }
}

fn disk() -> Disk {
    Disk::virtual_disk("/var/lib/images/layers/sha256-000001").read_only()
}

fn request() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}

/// An add alone, without its release, is timed by the caller.
async fn add(manager: &Manager, request: &MountRequest) -> Duration {
    let began = std::time::Instant::now();
    let mount = manager.add(&disk(), request).await.unwrap();
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
        let held = runtime.block_on(manager.add(&disk(), &request())).unwrap();
        group.bench_function(format!("join_{name}"), |bencher| {
            bencher.iter(|| runtime.block_on(manager.add(&disk(), &request())).unwrap());
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
        let builder = Manager::builder().transport(Nothing);
        builder.unplugger(Nothing).mounter(Nothing)
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
    let row = |what: &str, name: &str, baseline: &str| {
        Row::new(what, format!("durable/{name}")).baseline(format!("durable/{baseline}"))
    };
    report.print(&[
        row("durable add", "file", "none"),
        row("durable add with a name", "file_named", "none"),
        row("join", "join_file", "join_none"),
    ]);
}
