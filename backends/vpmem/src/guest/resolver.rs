//! Finding the persistent memory behind a locator.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{BackendError, BlockDevice, DeviceLocator, PciAddress, Resolver};
use blockmount_linux::uevent::{Probe, wait_for};

use super::pmem::PmemId;
use crate::{ByteRange, DeviceNumber, VpmemAddress};

/// How long a device may take to appear.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

type Rule = dyn Fn(DeviceNumber) -> Option<PmemId> + Send + Sync;

/// Finds the persistent memory behind a locator such as `vpmem:2` or `vpmem:2@0+4096` in a Linux guest.
///
/// What a device number means to the guest is the hypervisor's choice: a [`PmemId`] for each number, or a
/// rule. From there it finds the region of memory and its block device: nothing is guessed by name or
/// order. What is not there yet is awaited, by the events of the kernel. A device is found when its node
/// can be opened and is that device. The range in a locator becomes the range of the [`BlockDevice`], and
/// must be inside the device.
#[derive(Clone)]
pub struct VpmemResolver {
    rule: Arc<Rule>,
    own: BTreeMap<DeviceNumber, PmemId>,
    timeout: Duration,
    sysfs: PathBuf,
}

impl VpmemResolver {
    /// Finds devices by a rule, which answers nothing for numbers that it does not know.
    pub fn new(rule: impl Fn(DeviceNumber) -> Option<PmemId> + Send + Sync + 'static) -> Self {
        VpmemResolver {
            rule: Arc::new(rule),
            own: BTreeMap::new(),
            timeout: DEFAULT_TIMEOUT,
            sysfs: "/sys".into(),
        }
    }

    /// Finds NVDIMMs: device N has the NFIT handle N + 1. (Source: QEMU, `nvdimm_slot_to_handle`)
    pub fn nfit() -> Self {
        VpmemResolver::new(|device| Some(PmemId::NfitHandle(u32::from(device.get()) + 1)))
    }

    /// Finds virtio-pmem devices: device N is behind the bridge with the N-th of these PCI addresses.
    pub fn ports(bridges: impl IntoIterator<Item = PciAddress>) -> Self {
        let bridges: Vec<PciAddress> = bridges.into_iter().collect();
        VpmemResolver::new(move |device| {
            bridges
                .get(usize::from(device.get()))
                .copied()
                .map(PmemId::Port)
        })
    }

    /// Finds one device by an identity of its own.
    #[must_use]
    pub fn with(mut self, device: DeviceNumber, id: PmemId) -> Self {
        self.own.insert(device, id);
        self
    }

    /// Waits this long for a device to appear, instead of ten seconds.
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
        let VpmemAddress {
            device: number,
            range,
        } = VpmemAddress::try_from(device)?;
        let own = self.own.get(&number).copied();
        let id = own.or_else(|| (self.rule)(number)).ok_or_else(|| {
            BackendError::invalid(format!(
                "this guest does not know which persistent memory {device} is"
            ))
        })?;
        let root = self.sysfs.clone();
        Ok(Lookup { id, root, range })
    }
}

impl fmt::Debug for VpmemResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VpmemResolver")
            .field("own", &self.own)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Resolver for VpmemResolver {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let lookup = self.lookup(device)?;
        let deadline = Instant::now() + self.timeout;
        let found = wait_for(deadline, is_pmem, move || lookup.device()).await;
        found.map_err(|error| {
            let message = format!("cannot find {device}: {}", error.message());
            BackendError::new(error.kind(), message).with_source(error)
        })
    }

    /// Its driver takes a device out with its disk.
    async fn measure(&self, _device: &DeviceLocator) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// Whether an event about a device, by its path, is about persistent memory or what it is plugged into.
fn is_pmem(path: &[u8]) -> bool {
    let mut names = path.split(|byte| *byte == b'/');
    names.any(|name| name.starts_with(b"ndbus") || name.starts_with(b"virtio"))
}

/// Which disk is looked for.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) id: PmemId,
    pub(super) root: PathBuf,
    pub(super) range: Option<ByteRange>,
}

impl Lookup {
    fn device(&self) -> Probe<BlockDevice> {
        let disk = self.id.disk(&self.root)?;
        let range: Option<Range<u64>> = self.range.map(Range::from);
        if let Some(end) = range
            .as_ref()
            .map(|range| range.end)
            .filter(|end| *end > disk.size())
        {
            let (node, size) = (disk.node().display(), disk.size());
            let message = format!("the range ends at {end}, and {node} has {size} bytes");
            return Err(BackendError::invalid(message).into());
        }
        disk.open()?;
        Ok(BlockDevice::new(disk.node()).with_range(range))
    }
}
