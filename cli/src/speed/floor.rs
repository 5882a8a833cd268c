//! The least that it can take: bare commands and system calls, which look at nothing and remember nothing.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::{DeviceLocator, Step, Unplugger};
use blockmount_checker::protocol::{BareMount, BareTimes};
use blockmount_loopback::BareLoop;
use blockmount_qemu::QemuScsi;
use blockmount_scsi::{Attacher, ScsiAddress};
use futures_util::future::{join_all, try_join_all};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use super::Passed;
use crate::failure::{Context, Failure};
use crate::guest::QemuGuest;

/// The floor's disks are at LUNs of their own, which the manager has not reached.
const FIRST_LUN: u64 = 128;
/// How the image is mounted: without a log, since it is read-only.
const DATA: &CStr = c"noload";

/// Mounts images on this machine, one after the other, each at a directory of its own, and unmounts them. The directories are
/// made and removed on the way, as the manager does, in the same filesystem: there is none to mount at before. Nothing stays after
/// a failure either.
pub(crate) fn here(images: &[PathBuf], mark: &str, mount_root: &Path) -> Result<Passed, Failure> {
    let directory = mount_root.join("bare");
    fs::create_dir_all(&directory).context(|| format!("cannot make {}", directory.display()))?;
    let targets: Vec<PathBuf> = (0..images.len())
        .map(|number| directory.join(number.to_string()))
        .collect();
    let mut passed = Passed::default();
    let start = Instant::now();
    let mounted = images
        .iter()
        .zip(&targets)
        .try_for_each(|(image, target)| mount_here(image, mark, target, &mut passed.steps));
    passed.up = start.elapsed();
    let start = Instant::now();
    let mut unmounted = Ok(());
    for target in &targets {
        let since = Instant::now();
        let removed = unmount(target, UnmountFlags::NOFOLLOW)
            .map_err(io::Error::from)
            .and_then(|()| {
                note(&mut passed.steps, Step::Unmount, since);
                fs::remove_dir(target)
            });
        match removed {
            // The first that could not be mounted has said why.
            Err(_) if mounted.is_err() => drop(fs::remove_dir(target)),
            removed => {
                let what = || format!("cannot unmount and remove {}", target.display());
                unmounted = unmounted.and(removed.context(what));
            }
        }
    }
    passed.down = start.elapsed();
    // In vain while the manager has mounts beside it, which removes the root after the last of them.
    let _ = fs::remove_dir(&directory).and_then(|()| fs::remove_dir(mount_root));
    mounted.and(unmounted).map(|()| passed)
}

fn mount_here(
    image: &Path,
    mark: &str,
    target: &Path,
    steps: &mut HashMap<Step, Vec<Duration>>,
) -> Result<(), Failure> {
    let since = Instant::now();
    let device = BareLoop::bind(image, mark);
    let device = device.context(|| format!("cannot bind {} to a loop device", image.display()))?;
    note(steps, Step::Attach, since);
    let since = Instant::now();
    fs::create_dir(target).context(|| format!("cannot make {}", target.display()))?;
    mount(
        device.node(),
        target,
        "ext4",
        MountFlags::RDONLY,
        Some(DATA),
    )
    .context(|| format!("cannot mount {}", device.node().display()))?;
    note(steps, Step::Mount, since);
    Ok(())
}

fn note(steps: &mut HashMap<Step, Vec<Duration>>, step: Step, since: Instant) {
    steps.entry(step).or_default().push(since.elapsed());
}

/// Plugs images into a VM by bare commands, all at once, has a process of the guest mount and unmount them, and takes them
/// out. For unplugging there is nothing barer than the agent.
pub(crate) async fn in_vm(guest: &QemuGuest, images: &[PathBuf]) -> Result<Passed, Failure> {
    let controllers = u64::from(guest.scsi().geometry().controllers());
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
        Ok(took) => mount_bare(guest, addresses.iter().map(|(at, _)| *at))
            .await
            .map(|mounted| (took, mounted)),
        Err(failure) => Err(failure),
    };
    // Also what a failure has left half-way.
    let start = Instant::now();
    let taken_out = join_all(addresses.iter().map(|(at, _)| take_out(guest, *at))).await;
    let taking_out = start.elapsed();
    let (attaching, times) = mounted?;
    taken_out.into_iter().collect::<Result<(), Failure>>()?;
    let all = |of: fn(&BareTimes) -> &Vec<u64>| -> Vec<Duration> {
        let times = times.iter().flat_map(of);
        times.copied().map(Duration::from_micros).collect()
    };
    let last = |of| all(of).into_iter().max().unwrap_or_default();
    let mut steps = HashMap::from([(Step::Attach, attaching)]);
    steps.insert(Step::Mount, all(|times| &times.mount));
    steps.insert(Step::Unmount, all(|times| &times.unmount));
    Ok(Passed {
        up: plugging + last(|times| &times.mounted),
        down: last(|times| &times.unmount) + taking_out,
        steps,
    })
}
async fn plug(guest: &QemuGuest, at: ScsiAddress, image: &Path) -> Result<Duration, Failure> {
    let since = Instant::now();
    let qmp = guest.qmp();
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
    Ok(since.elapsed())
}

async fn take_out(guest: &QemuGuest, at: ScsiAddress) -> Result<(), Failure> {
    guest.agent().unplug(&DeviceLocator::from(at)).await?;
    Ok(guest.scsi().detach(at).await?)
}

/// By the guest's clock.
async fn mount_bare(
    guest: &QemuGuest,
    addresses: impl Iterator<Item = ScsiAddress>,
) -> Result<Vec<BareTimes>, Failure> {
    let mounts = addresses.map(|at| BareMount {
        // The controllers are the only SCSI hosts of this VM, and found in the order of their addresses.
        device: format!("{}:0:0:{}", at.controller, at.lun),
        filesystem: "ext4".to_owned(),
        target: format!("/run/bare-{}-{}", at.controller, at.lun).into(),
        read_only: true,
        data: DATA.to_string_lossy().into_owned(),
        count: 1,
    });
    let mut checker = guest.checker()?.lock().await;
    checker
        .bare_mount(mounts.collect())
        .await
        .map_err(Failure::of_io)
}
