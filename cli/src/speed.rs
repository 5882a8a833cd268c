//! How long it takes until disks are mounted in a VM, beside the least that it can take.
//!
//! The floor is what a program would need that knew everything beforehand, and did nothing but this: the bare commands
//! for QEMU, all sent at once, and then bare mounts in the guest, all at once, by a process that waits for the
//! devices there. It does not ask the guest over a bridge, looks at no image, and remembers nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::{DeviceLocator, Disk, Manager, MountOptions, MountRequest, Unplugger};
use blockmount_qemu::QemuScsi;
use blockmount_scsi::{Attacher, ScsiAddress};
use futures_util::future::{join_all, try_join_all};
use serde_json::json;

use crate::failure::{Context, Failure};
use crate::guest::{MOUNTS, QemuGuest};
use crate::images;
use crate::interrupt::Interrupt;
use crate::report::{Comparison, Speed, milliseconds};
use crate::terminal::Progress;
use blockmount_checker::protocol::BareMount;

/// The disks of a large stack: each layer of an image with many.
const MANY: usize = 64;
/// How often each is measured; the median counts.
const ROUNDS: usize = 3;
/// An ext4 of this size is empty but for its own tables.
const DISK_SIZE: u64 = 4 << 20;
/// The floor's disks are at LUNs of their own, which the manager has not reached.
const FIRST_LUN: u64 = 128;

/// Measures one disk, and many at once, in turn with the floor.
pub(crate) async fn measure(
    guest: &QemuGuest,
    directory: &Path,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Speed, Failure> {
    progress.stage("making disks to measure with");
    let images = make(directory, interrupt).await?;
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
            floors.push(floor(guest, &images[..disks]).await?);
            ours.push(add(manager, &images[..disks]).await?);
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

async fn make(directory: &Path, interrupt: &Interrupt) -> Result<Vec<PathBuf>, Failure> {
    let first = directory.join("speed-0.ext4");
    images::scratch(&first, DISK_SIZE, interrupt).await?;
    let directory = directory.to_owned();
    interrupt
        .blocking(move |stop| {
            let mut images = vec![first.clone()];
            for number in 1..MANY {
                stop.check()?;
                let image = directory.join(format!("speed-{number}.ext4"));
                fs::copy(&first, &image).context(|| format!("cannot make {}", image.display()))?;
                images.push(image);
            }
            Ok(images)
        })
        .await
}

/// Adds disks by the manager, and releases them.
async fn add(manager: &Manager, images: &[PathBuf]) -> Result<Duration, Failure> {
    let disks: Vec<Disk> = images
        .iter()
        .map(|image| Disk::virtual_disk(image).read_only())
        .collect();
    let request = MountRequest::new(MountOptions::read_only());
    let start = Instant::now();
    let added = join_all(disks.iter().map(|disk| manager.add(disk, &request))).await;
    let took = start.elapsed();
    let mounts = added.into_iter().collect::<Result<Vec<_>, _>>()?;
    for released in join_all(mounts.into_iter().map(|mount| mount.release())).await {
        released.context(|| "cannot release a disk".to_owned())?;
    }
    Ok(took)
}

/// Does the same with bare commands and bare mounts.
async fn floor(guest: &QemuGuest, images: &[PathBuf]) -> Result<Duration, Failure> {
    let controllers = u64::from(guest.vm().scsi().geometry().controllers());
    let mut addresses = Vec::new();
    for (number, image) in (0..).zip(images) {
        let controller = (number % controllers).try_into();
        let lun = (FIRST_LUN + number / controllers).try_into();
        let what = || "cannot address a disk".to_owned();
        let address = ScsiAddress::new(controller.context(what)?, lun.context(what)?);
        addresses.push((address, image));
    }
    let start = Instant::now();
    let plugged = try_join_all(addresses.iter().map(|(at, image)| plug(guest, *at, image))).await;
    let plugging = start.elapsed();
    let mounted = match plugged {
        Ok(_) => mount_bare(guest, addresses.iter().map(|(at, _)| *at)).await,
        Err(failure) => Err(failure),
    };
    // Also what a failure has left half-way.
    for taken_out in join_all(addresses.iter().map(|(at, _)| take_out(guest, *at))).await {
        taken_out?;
    }
    Ok(plugging + mounted?)
}

async fn plug(guest: &QemuGuest, at: ScsiAddress, image: &Path) -> Result<(), Failure> {
    let qmp = guest.vm().qmp();
    let what = || format!("cannot plug {}", image.display());
    let name = QemuScsi::name(at);
    let node = json!({
        "driver": "raw",
        "node-name": name,
        "read-only": true,
        "file": { "driver": "file", "filename": image.to_string_lossy(), "read-only": true },
    });
    qmp.execute("blockdev-add", node).await.context(what)?;
    let device = json!({
        "driver": "scsi-hd",
        "id": name,
        "bus": format!("scsi{}.0", at.controller),
        "channel": 0,
        "scsi-id": 0,
        "lun": at.lun.get(),
        "drive": name,
    });
    qmp.execute("device_add", device).await.context(what)?;
    Ok(())
}

async fn take_out(guest: &QemuGuest, at: ScsiAddress) -> Result<(), Failure> {
    guest.agent().unplug(&DeviceLocator::from(at)).await?;
    Ok(guest.vm().scsi().detach(at).await?)
}

/// Until the last is mounted, by the guest's clock.
async fn mount_bare(
    guest: &QemuGuest,
    addresses: impl Iterator<Item = ScsiAddress>,
) -> Result<Duration, Failure> {
    let mounts = addresses.map(|at| BareMount {
        // The controllers are the only SCSI hosts of this VM, and found in the order of their addresses.
        device: format!("{}:0:0:{}", at.controller, at.lun),
        filesystem: "ext4".to_owned(),
        target: format!("/run/bare-{}-{}", at.controller, at.lun).into(),
        read_only: true,
        data: "noload".to_owned(),
        count: 1,
    });
    let mut checker = guest.checker().lock().await;
    let times = checker
        .bare_mount(mounts.collect())
        .await
        .map_err(Failure::of_io)?;
    let mounted = times.iter().flat_map(|times| &times.mounted).max();
    Ok(Duration::from_micros(mounted.copied().unwrap_or_default()))
}
