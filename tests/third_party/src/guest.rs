//! The guest's half: the disk behind a port.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, PciAddress, Resolver, Unplugger, blocking,
};
use blockmount_agent::{Argument, GuestDevices, GuestTransport, Timeouts};
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe, present, wait_for};

use crate::SCHEME;

/// How long the kernel may take to remove a disk.
const REMOVAL: Duration = Duration::from_secs(30);

/// The ports that an agent is told of, in the order of their numbers: port 0 is the first.
#[derive(Debug, Clone, Default)]
pub struct VirtioBlk {
    ports: Vec<PciAddress>,
    timeouts: Timeouts,
}

impl GuestTransport for VirtioBlk {
    fn scheme(&self) -> &str {
        SCHEME
    }

    fn arguments(&self) -> &[Argument] {
        const {
            &[Argument::new(
                "vblk-port",
                "ADDRESS",
                "The PCI address of a port; repeatable",
            )]
        }
    }

    fn set(&mut self, _: &str, value: &str) -> Result<(), String> {
        let address = value.parse::<PciAddress>();
        self.ports.push(address.map_err(|error| error.to_string())?);
        Ok(())
    }

    fn modules(&self) -> &[&str] {
        &["virtio_blk"]
    }

    fn devices(&self, timeouts: Timeouts) -> Option<GuestDevices> {
        let ports = self.ports.clone();
        let devices = VirtioBlk { ports, timeouts };
        (!self.ports.is_empty()).then(|| GuestDevices::new(devices.clone(), devices))
    }
}

impl VirtioBlk {
    /// The directory of the port that a locator means.
    fn port(&self, device: &DeviceLocator) -> Result<PathBuf, BackendError> {
        let number = DeviceLocator::number(device.address());
        let number = number.and_then(|number| usize::try_from(number).ok());
        let address = number.and_then(|number| self.ports.get(number));
        match address {
            _ if device.transport() != SCHEME => {
                let message = format!("{device} is not the locator of a disk behind a port");
                Err(BackendError::unsuitable(message))
            }
            None => Err(BackendError::invalid(format!(
                "there is no port for {device}"
            ))),
            Some(address) => Ok(Path::new("/sys/bus/pci/devices").join(address.to_string())),
        }
    }
}

/// The PCI device behind a port.
fn behind(port: &Path) -> Probe<PathBuf> {
    for name in sysfs::names(port)? {
        if name.parse::<PciAddress>().is_ok() {
            return Ok(port.join(name));
        }
    }
    Err(NotReady::not_found(format!(
        "nothing is behind the port {}",
        port.display()
    )))
}

/// The disk behind a port, once it can be opened.
fn disk(port: &Path) -> Probe<Disk> {
    let device = behind(port)?;
    let drivers = sysfs::numbered(&device, "virtio")?;
    let (virtio, _) = drivers
        .first()
        .ok_or_else(|| NotReady::not_found(format!("{} has no driver yet", device.display())))?;
    let disk = Disk::below(virtio)?;
    disk.open()?;
    Ok(disk)
}

#[async_trait]
impl Resolver for VirtioBlk {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let port = self.port(device)?;
        let found = wait_for(
            Instant::now() + self.timeouts.device,
            |_| true,
            move || disk(&port),
        )
        .await?;
        Ok(BlockDevice::new(found.node()))
    }
}

#[async_trait]
impl Unplugger for VirtioBlk {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let port = self.port(device)?;
        let deadline = Instant::now() + REMOVAL;
        let at = port.clone();
        let (disk, slot) = blocking(move || Ok((present(disk(&at))?, slot(&at)?))).await?;
        let Some(disk) = disk else { return Ok(()) };
        // Proven free, and held so that it stays free while it goes.
        let Some(held) = disk.hold(self.timeouts.busy).await? else {
            return Ok(());
        };
        let slot = slot
            .ok_or_else(|| BackendError::other(format!("{device} is in no slot for hot-plug")))?;
        sysfs::command_by(deadline, &slot, "power", "0".to_owned(), held).await?;
        let is_gone = move || match present(behind(&port))? {
            None => Ok(()),
            Some(there) => Err(NotReady::not_found(format!(
                "{} is still there",
                there.display()
            ))),
        };
        wait_for(deadline, |_| true, is_gone).await
    }
}

/// The hot-plug slot of the device behind a port.
fn slot(port: &Path) -> Result<Option<PathBuf>, BackendError> {
    let Some(device) = present(behind(port))? else {
        return Ok(None);
    };
    let address = device
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let slots = Path::new("/sys/bus/pci/slots");
    for name in sysfs::names(slots)? {
        let slot = slots.join(name);
        let at = sysfs::text(&slot, "address")?;
        if at.is_some_and(|at| address.strip_prefix(&at).is_some_and(|rest| rest == ".0")) {
            return Ok(Some(slot));
        }
    }
    Ok(None)
}
