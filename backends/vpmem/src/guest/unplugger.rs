//! Unplugging persistent memory before the hypervisor takes it out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{BackendError, DeviceLocator, ErrorKind, PciAddress, Unplugger, blocking};
use blockmount_linux::mapper;
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe, present, wait_for};

use super::pmem::{PmemId, pci_of};
use super::resolver::{Lookup, VpmemResolver};

/// How long a device may be busy for a moment before it counts as in use.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the kernel may take to eject a device.
const REMOVAL: Duration = Duration::from_secs(10);

/// Unplugs the persistent memory that a [`VpmemResolver`] finds in a Linux guest.
///
/// A device is proven free, in all namespaces, and held so that it stays free. One in a PCI slot for hot-plug
/// is then ejected, because its hypervisor waits for that; any other stays, because an NVDIMM
/// cannot be taken out. Of a device that holds many disks only the range that is meant is proven free.
/// What is in use is `Busy`, and stays as it was. What is not there is a success.
#[derive(Debug, Clone)]
pub struct VpmemUnplugger {
    resolver: VpmemResolver,
    timeout: Duration,
    removal: Duration,
}

impl VpmemUnplugger {
    /// Unplugs the devices that this resolver finds.
    pub fn new(resolver: VpmemResolver) -> Self {
        VpmemUnplugger {
            resolver,
            timeout: DEFAULT_TIMEOUT,
            removal: REMOVAL,
        }
    }

    /// Waits this long for a device that is busy, instead of one second.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Waits this long for the kernel to eject a device, instead of ten seconds.
    #[must_use]
    pub fn with_removal_deadline(mut self, removal: Duration) -> Self {
        self.removal = removal;
        self
    }

    async fn eject(
        &self,
        device: &DeviceLocator,
        disk: Option<Disk>,
        slot: Option<Slot>,
    ) -> Result<(), BackendError> {
        let deadline = Instant::now() + self.removal;
        let mut lost = Ok(());
        let held = match &disk {
            Some(disk) => disk.hold_or_lose(self.timeout, &mut lost).await?.map(Some),
            None => Some(None),
        };
        let (Some(held), Some(slot)) = (held, slot) else {
            return lost;
        };
        sysfs::command_by(deadline, &slot.directory, "power", "0".to_owned(), held).await?;
        let look = move || is_gone(&slot.device, disk.as_ref());
        wait_for(deadline, |_| true, look).await.map_err(|left| {
            let message = format!("the kernel does not eject {device}: {}", left.message());
            BackendError::uncertain(message).with_source(left)
        })?;
        lost
    }
}

/// A PCI slot with a device in it.
#[derive(Debug)]
struct Slot {
    directory: PathBuf,
    device: PathBuf,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for VpmemUnplugger {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let Lookup { id, root, range } = self.resolver.lookup(device)?;
        let (disk, slot) = blocking(move || target(id, &root)).await?;
        let Some(range) = range else {
            return self.eject(device, disk, slot).await;
        };
        let Some(disk) = disk else { return Ok(()) };
        let done = mapper::release_range(disk.node(), range.into(), self.timeout).await;
        match done {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match blocking(move || disk.is_there()).await? {
                    false => Ok(()),
                    true => Err(error),
                }
            }
            done => done,
        }
    }
}

/// What there is to unplug, and the slot that it can be ejected from.
fn target(id: PmemId, root: &Path) -> Result<(Option<Disk>, Option<Slot>), BackendError> {
    let disk = present(id.disk(root))?;
    let known = id.pci_device(root)?.map(|(address, _)| address);
    let address = known.or_else(|| pci_of(disk.as_ref()?.directory()));
    let slot = match address {
        Some(address) => slot(root, address)?,
        None => None,
    };
    Ok((disk, slot))
}

/// The slot that a device is in, if it is in one for hot-plug.
fn slot(root: &Path, address: PciAddress) -> Result<Option<Slot>, BackendError> {
    let device = root.join(format!("bus/pci/devices/{address}"));
    let slots = root.join("bus/pci/slots");
    for name in sysfs::names(&slots)? {
        let directory = slots.join(name);
        let at = sysfs::text(&directory, "address")?;
        let is_in = at.and_then(|at| format!("{at}.0").parse().ok()) == Some(address);
        if is_in && directory.join("power").exists() {
            return Ok(Some(Slot { directory, device }));
        }
    }
    Ok(None)
}

fn is_gone(device: &Path, disk: Option<&Disk>) -> Probe<()> {
    let is_there = match disk {
        Some(disk) => disk.is_there()?,
        None => false,
    };
    if is_there || device.symlink_metadata().is_ok() {
        let message = format!("{} is there still", device.display());
        return Err(NotReady::not_found(message));
    }
    Ok(())
}
