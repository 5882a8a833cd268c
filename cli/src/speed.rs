//! How long it takes until disks are mounted in a VM, beside the least that it can take.
//!
//! The floor is what a program would need that knew everything beforehand, and did nothing but this: the bare commands
//! for QEMU, all sent at once, and then bare mounts in the guest, all at once, by a process that waits for the
//! devices there. It does not ask the guest over a bridge, looks at no image, and remembers nothing.

pub(crate) mod floor;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::{Disk, Manager, MountOptions, MountRequest, Step};
use futures_util::future::join_all;

use crate::failure::{Context, Failure};
use crate::guest::{MOUNTS, QemuGuest};
use crate::images;
use crate::interrupt::Interrupt;
use crate::report::{Comparison, Speed, milliseconds};
use crate::terminal::Progress;

/// The disks of a large stack: each layer of an image with many.
const MANY: usize = 64;
/// How often each is measured; the median counts.
const ROUNDS: usize = 3;
/// An ext4 of this size is empty but for its own tables.
const DISK_SIZE: u64 = 4 << 20;

/// How long disks took, all at once.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// Until the last was mounted.
    pub(crate) up: Duration,
    /// Until the last was taken out again.
    pub(crate) down: Duration,
    /// Each call, where they are known by step.
    pub(crate) steps: HashMap<Step, Vec<Duration>>,
}

/// Measures one disk, and many at once, in turn with the floor.
pub(crate) async fn measure(
    guest: &QemuGuest,
    directory: &Path,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Speed, Failure> {
    progress.stage("making disks to measure with");
    let images = make(directory, MANY, interrupt).await?;
    // One of its own: these disks are none of the containers', and are not counted with theirs.
    let manager = Manager::builder()
        .transport(guest.last_transport())
        .unplugger(guest.agent().clone())
        .mounter(guest.agent().clone())
        .combiner(guest.agent().clone())
        .mount_root(format!("{MOUNTS}/speed"))
        .build();
    let measured = compare(guest, &manager, &images, interrupt, progress).await;
    let drained = manager.drain().await;
    match drained.failed.into_iter().next() {
        Some(error) if measured.is_ok() => Err(error.into()),
        _ => measured,
    }
}

async fn compare(
    guest: &QemuGuest,
    manager: &Manager,
    images: &[PathBuf],
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Speed, Failure> {
    let mut compared = Vec::new();
    for disks in [1, MANY] {
        progress.stage(format!("measuring {disks} disks at once"));
        let (mut ours, mut floors) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            interrupt.check()?;
            floors.push(floor::in_vm(guest, &images[..disks]).await?.up);
            ours.push(pass(manager, &images[..disks]).await?.up);
        }
        let (ours, floor) = (median(ours), median(floors));
        compared.push(Comparison {
            disks,
            ours_ms: milliseconds(ours),
            floor_ms: milliseconds(floor),
            ratio: (ours.as_secs_f64() / floor.as_secs_f64() * 100.0).round() / 100.0,
        });
    }
    let [one, many] = compared
        .try_into()
        .expect("there is a comparison for each number of disks");
    Ok(Speed { one, many })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Makes disks with an empty ext4 each.
pub(crate) async fn make(
    directory: &Path,
    disks: usize,
    interrupt: &Interrupt,
) -> Result<Vec<PathBuf>, Failure> {
    let first = directory.join("speed-0.ext4");
    images::scratch(&first, DISK_SIZE, interrupt).await?;
    let directory = directory.to_owned();
    interrupt
        .blocking(move |stop| {
            let mut images = vec![first.clone()];
            for number in 1..disks {
                stop.check()?;
                let image = directory.join(format!("speed-{number}.ext4"));
                fs::copy(&first, &image).context(|| format!("cannot make {}", image.display()))?;
                images.push(image);
            }
            Ok(images)
        })
        .await
}

/// Adds disks by the manager, all at once, and releases them so.
pub(crate) async fn pass(manager: &Manager, images: &[PathBuf]) -> Result<Passed, Failure> {
    let disks: Vec<Disk> = images
        .iter()
        .map(|image| Disk::virtual_disk(image).read_only())
        .collect();
    let request = MountRequest::new(MountOptions::read_only());
    let start = Instant::now();
    let added = join_all(disks.iter().map(|disk| manager.add(disk, &request))).await;
    let up = start.elapsed();
    let mounts = added.into_iter().collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    let released = join_all(mounts.into_iter().map(|mount| mount.release())).await;
    let down = start.elapsed();
    for released in released {
        released.context(|| "cannot release a disk".to_owned())?;
    }
    Ok(Passed {
        up,
        down,
        steps: HashMap::new(),
    })
}
