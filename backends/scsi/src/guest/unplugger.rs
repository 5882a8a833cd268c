//! Unplugging a disk before the hypervisor takes it out.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{BackendError, DeviceLocator, Unplugger, blocking};
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe, present, wait_for};

use super::controller::concerns;
use super::resolver::{Lookup, ScsiResolver};

/// How long a disk may be busy for a moment before it counts as in use.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the kernel may take to remove a disk. It takes 40 ms, unless a disk no longer answers.
const REMOVAL: Duration = Duration::from_secs(10);

/// Unplugs the disks that a [`ScsiResolver`] finds in a Linux guest.
///
/// Linux removes a disk in use without an error, and its users get I/O errors then. So the disk is first
/// proven free, in all namespaces, and held so that it stays free; what is cached is written to it; and
/// only then it is taken from the guest. A disk in use is `Busy`, and stays as it was. A disk that is not
/// there is a success. `LostWrites` is said of a disk that is out, and did not take all that was cached.
#[derive(Debug, Clone)]
pub struct ScsiUnplugger {
    resolver: ScsiResolver,
    timeout: Duration,
    removal: Duration,
}

impl ScsiUnplugger {
    /// Unplugs the disks that this resolver finds.
    pub fn new(resolver: ScsiResolver) -> Self {
        ScsiUnplugger {
            resolver,
            timeout: DEFAULT_TIMEOUT,
            removal: REMOVAL,
        }
    }

    /// Waits this long for a disk that is busy, instead of one second.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Waits this long for the kernel to remove a disk, instead of ten seconds.
    #[must_use]
    pub fn with_removal_deadline(mut self, removal: Duration) -> Self {
        self.removal = removal;
        self
    }
}

/// A disk that is about to go.
#[derive(Debug)]
struct UnplugTarget {
    device: PathBuf,
    /// Which device of this address it is: sysfs gives each a number of its own.
    number: u64,
    disk: Option<Disk>,
}

/// What has become of a disk that was taken out of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Gone,
    /// The kernel looks for all disks of a target when one with LUN 0 is plugged in (`virtscsi_handle_transport_reset`),
    /// and finds this one again, since the hypervisor has it still.
    Back,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for ScsiUnplugger {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let lookup = self.resolver.lookup(device)?;
        let (root, lun) = (lookup.sysfs().to_owned(), lookup.lun());
        let deadline = Instant::now() + self.removal;
        let lock = self.resolver.lock(lookup.address());
        let _lock = tokio::time::timeout_at(deadline.into(), lock)
            .await
            .map_err(|_| BackendError::busy(format!("the kernel is still looking for {device}")))?;
        self.resolver.note_unplugged(lookup.address());
        let lookup = Arc::new(lookup);
        let mut lost = Ok(());
        loop {
            let looked_up = Arc::clone(&lookup);
            let Some(found) = blocking(move || target(&looked_up)).await? else {
                return lost;
            };
            let held = match &found.disk {
                Some(disk) => disk.hold_or_lose(self.timeout, &mut lost).await?.map(Some),
                // It is no disk yet, or no longer: there is nothing that could be in use.
                None => Some(None),
            };
            if let Some(held) = held {
                sysfs::command_by(deadline, &found.device, "delete", "1".to_owned(), held).await?;
            }
            let root = root.clone();
            let look = move || outcome(&root, &found);
            let outcome = wait_for(deadline, concerns(lun), look).await;
            match outcome.map_err(|left| {
                let message = format!("the kernel does not remove {device}: {}", left.message());
                BackendError::uncertain(message).with_source(left)
            })? {
                Outcome::Gone => return lost,
                Outcome::Back => {
                    tracing::debug!(%device, "the kernel has found it anew; once more")
                }
            }
        }
    }
}

/// What there is to unplug, if anything.
fn target(lookup: &Lookup) -> Result<Option<UnplugTarget>, BackendError> {
    let Some(device) = present(lookup.device())? else {
        return Ok(None);
    };
    let Ok(metadata) = device.symlink_metadata() else {
        return Ok(None);
    };
    let disk = present(Disk::below(&device))?;
    Ok(Some(UnplugTarget {
        device,
        number: metadata.ino(),
        disk,
    }))
}

/// Whether the device has gone from sysfs, and its node with it.
fn outcome(root: &Path, target: &UnplugTarget) -> Probe<Outcome> {
    let UnplugTarget { device, disk, .. } = target;
    if let Ok(metadata) = device.symlink_metadata() {
        if metadata.ino() != target.number {
            return Ok(Outcome::Back);
        }
        let message = format!("{} is there still", device.display());
        return Err(NotReady::not_found(message));
    }
    let Some(disk) = disk else {
        return Ok(Outcome::Gone);
    };
    // The name may have gone to another disk already.
    let owner = root
        .join(format!("dev/block/{}", disk.number()))
        .canonicalize();
    let is_ours =
        owner.is_ok_and(|owner| owner.iter().any(|part| Some(part) == device.file_name()));
    if is_ours && disk.node().exists() {
        let message = format!("{} is there still", disk.node().display());
        return Err(NotReady::not_found(message));
    }
    Ok(Outcome::Gone)
}
