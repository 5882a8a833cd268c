//! Finding a disk by its controller and LUN.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver, blocking};
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe, present, wait_for};
use tokio::sync::OwnedMutexGuard;

use super::controller::{self, ControllerId, Hosts};
use super::identity;
use super::scan::{AddressLocks, scan};
use super::unplugged::Unplugged;
use crate::{Lun, ScsiAddress};

/// How long a disk may take to appear.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The state of a device that takes commands. (Source: Linux, Documentation/scsi/scsi_mid_low_api.rst)
const RUNNING: &str = "running";

/// Finds the disk behind a locator such as `scsi:0/3` in a Linux guest.
///
/// The number of the controller is an index in a list of [`ControllerId`]s. From the identity of the
/// controller it finds the SCSI host, from there the LUN, and from there the block device: nothing is
/// guessed by name or order. What is not there yet is awaited, by the events of the kernel. A disk is
/// found when it takes commands and its node can be opened and is that disk. A disk with the
/// [serial number](ScsiAddress::serial) of another address is never taken: `Conflict`, unless it is replaced in time.
///
/// Resolving changes nothing, with two exceptions: when half of the timeout is over, the kernel is asked
/// to look for exactly this LUN, because the hypervisor's announcement of it may have been lost. It never looks
/// while a [`ScsiUnplugger`](crate::ScsiUnplugger) of a clone works on that address. And the kernel is had to ask a disk for its
/// size again if it has no bytes, which it may have refused to say in a burst of hot-plugs.
///
/// Cloning is cheap.
#[derive(Debug, Clone)]
pub struct ScsiResolver {
    controllers: Arc<[ControllerId]>,
    timeout: Duration,
    sysfs: PathBuf,
    hosts: Arc<Hosts>,
    locks: Arc<AddressLocks>,
    unplugged: Arc<Unplugged>,
}

impl ScsiResolver {
    /// Finds the disks of these controllers: the first is number 0.
    pub fn new(controllers: impl IntoIterator<Item = ControllerId>) -> Self {
        ScsiResolver {
            controllers: controllers.into_iter().collect(),
            timeout: DEFAULT_TIMEOUT,
            sysfs: "/sys".into(),
            hosts: Arc::default(),
            locks: Arc::default(),
            unplugged: Arc::default(),
        }
    }

    /// Finds the disks of the four controllers of a virtual machine of Hyper-V.
    pub fn hyper_v() -> Self {
        ScsiResolver::new(ControllerId::hyper_v())
    }

    /// Waits this long for a disk to appear, instead of ten seconds.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Looks at another tree than `/sys`. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn with_sysfs(mut self, root: impl Into<PathBuf>) -> Self {
        self.sysfs = root.into();
        self
    }

    pub(super) fn lookup(&self, device: &DeviceLocator) -> Result<Lookup, BackendError> {
        let address = ScsiAddress::try_from(device)?;
        let number = usize::from(address.controller.get());
        let controller = self.controllers.get(number).ok_or_else(|| {
            let count = self.controllers.len();
            BackendError::invalid(format!(
                "{device} is on controller {number}, but this guest knows {count} controllers, from 0"
            ))
        })?;
        Ok(Lookup {
            controller: *controller,
            address,
            sysfs: self.sysfs.clone(),
            hosts: Arc::clone(&self.hosts),
        })
    }

    /// Notes that a disk was unplugged from an address.
    pub(super) fn note_unplugged(&self, address: ScsiAddress) {
        self.unplugged.note(address);
    }

    /// The lock of an address, which excludes scans for it.
    pub(super) async fn lock(&self, address: ScsiAddress) -> OwnedMutexGuard<()> {
        self.locks.of(address).await
    }

    /// What the kernel does with a disk that may not answer, and then goes on after this has given up.
    async fn in_time<T: Send + 'static>(
        &self,
        device: &DeviceLocator,
        measure: impl FnOnce() -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let measured = tokio::time::timeout(self.timeout, blocking(measure)).await;
        measured.unwrap_or_else(|_elapsed| {
            let late = BackendError::not_found("it has not told the kernel its size in time");
            Err(named(device, late))
        })
    }

    fn scan(&self, lookup: &Lookup, wanted: Weak<()>) {
        let Ok(host) = lookup.host() else {
            return;
        };
        let (locks, address) = (self.locks.clone(), lookup.address);
        tracing::warn!(host, %address, "no disk was announced, having the kernel look for it");
        let directory = self.sysfs.join(format!("class/scsi_host/host{host}"));
        tokio::spawn(scan(locks, directory.into(), address, wanted));
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for ScsiResolver {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let lookup = self.lookup(device)?;
        let deadline = Instant::now() + self.timeout;
        let probe = {
            let lookup = lookup.clone();
            move || lookup.disk()
        };
        let concerns = controller::concerns(lookup.lun());
        let half = Instant::now() + self.timeout / 2;
        let early = wait_for(half, concerns.clone(), probe.clone()).await;
        let found = match early {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict) => {
                // A scan that has not begun when this is over, or dropped, is not wanted any more.
                let wanted = Arc::new(());
                if error.kind() == ErrorKind::NotFound {
                    self.scan(&lookup, Arc::downgrade(&wanted));
                }
                let found = wait_for(deadline, concerns, probe).await;
                drop(wanted);
                found
            }
            early => early,
        };
        let (disk, open) = found.map_err(|error| named(device, error))?;
        if disk.size() == 0 {
            self.in_time(device, move || lookup.ensure_measured())
                .await?;
        }
        Ok(BlockDevice::new(disk.node()).with_open(Arc::new(open)))
    }

    async fn measure(&self, device: &DeviceLocator) -> Result<bool, BackendError> {
        let lookup = self.lookup(device)?;
        match self.unplugged.has(lookup.address()) {
            true => self.in_time(device, move || lookup.measure()).await,
            // The kernel knows no other disk by this address.
            false => Ok(false),
        }
    }
}

/// Says which disk it was that was not found.
fn named(device: &DeviceLocator, error: BackendError) -> BackendError {
    let message = format!("cannot find {device}: {}", error.message());
    BackendError::new(error.kind(), message).with_source(error)
}

/// Which disk is looked for.
#[derive(Debug, Clone)]
pub(super) struct Lookup {
    controller: ControllerId,
    address: ScsiAddress,
    sysfs: PathBuf,
    hosts: Arc<Hosts>,
}

impl Lookup {
    /// The number of the controller's SCSI host.
    fn host(&self) -> Probe<u32> {
        self.hosts.number(self.controller, &self.sysfs)
    }

    /// The directory of the device, which is there.
    pub(super) fn device(&self) -> Probe<PathBuf> {
        let host = self.host()?;
        let device = controller::device(&self.sysfs, host, self.lun());
        if device.exists() {
            return Ok(device);
        }
        let (lun, controller) = (self.address.lun, self.controller);
        Err(NotReady::not_found(format!(
            "there is no LUN {lun} on SCSI host {host}, which is the {controller}"
        )))
    }

    pub(super) fn address(&self) -> ScsiAddress {
        self.address
    }

    pub(super) fn lun(&self) -> Lun {
        self.address.lun
    }

    pub(super) fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// Has the kernel ask the disk for its size again if it has no bytes.
    fn ensure_measured(&self) -> Result<(), BackendError> {
        let Some(device) = present(self.device())? else {
            return Ok(());
        };
        tracing::info_span!("measure", address = %self.address)
            .in_scope(|| Disk::ensure_measured(&device))
    }

    /// Has the kernel ask the disk again for what it knows of it. Whether it knew something else.
    fn measure(&self) -> Result<bool, BackendError> {
        let Some(device) = present(self.device())? else {
            return Ok(false);
        };
        let known = || {
            let Some(disk) = present(Disk::below(&device))? else {
                return Ok(None);
            };
            let is_read_only = sysfs::text(disk.directory(), "ro")?;
            Ok::<_, BackendError>(Some((disk, is_read_only)))
        };
        let before = known()?;
        Disk::measure(&device)?;
        let differs = known()? != before;
        if differs {
            let address = self.address;
            tracing::warn!(%address, "the kernel knew this disk by what was there before, and has asked it anew");
        }
        Ok(differs)
    }

    /// The disk, once it is ready and the one that is meant, and open.
    fn disk(&self) -> Probe<(Disk, File)> {
        let device = self.device()?;
        let at = device.display();
        let state = sysfs::text(&device, "state")?.unwrap_or_else(|| "unknown".to_owned());
        if state != RUNNING {
            let message = format!("the state of {at} is {state} and not {RUNNING}");
            return Err(NotReady::not_found(message));
        }
        let disk = Disk::below(&device)?;
        identity::check(self.address, &device)?;
        let open = disk.open()?;
        Ok((disk, open))
    }
}
