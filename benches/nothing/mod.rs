//! Backends that do nothing: what is left is the managers' own time.

use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, MountOptions, MountRequest, Mounter, Presence,
    Transport, Unplugger, Usage,
};

/// Backends that take `step` for each step, and do nothing.
#[derive(Clone, Copy, Default)]
pub(crate) struct Nothing {
    pub(crate) step: Duration,
    pub(crate) ids: Ids,
}

/// What disks are identified by.
#[derive(Clone, Copy, Default)]
#[allow(dead_code, reason = "each bench uses its own part of this")]
pub(crate) enum Ids {
    #[default]
    Inodes,
    Names,
}

impl Nothing {
    async fn step(&self) {
        if !self.step.is_zero() {
            tokio::time::sleep(self.step).await;
        }
    }
}

/// The number that [`disk`] has put at the end of the name.
fn number(disk: &Disk) -> u64 {
    let name = disk.source().as_os_str().as_encoded_bytes();
    // Nothing of this is ours, so it must take next to no time.
    let digit = |byte: u8| u64::from(byte & 0xf) + 9 * u64::from(byte >> 6);
    let digits = name[name.len() - 6..].iter();
    digits.fold(0, |number, byte| (number << 4) | digit(*byte))
}

#[async_trait]
impl Transport for Nothing {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let id = match self.ids {
            Ids::Inodes => DiskId::inode(1, number(disk)),
            Ids::Names => DiskId::name(disk.source().to_str().unwrap()),
        };
        Ok(id.with_version(NonZeroU64::MIN))
    }

    async fn attach(&self, disk: &Disk, _id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.step().await;
        Ok(DeviceLocator::new("nothing", number(disk)).unwrap())
    }

    async fn detach(&self, _: &Disk) -> Result<(), BackendError> {
        self.step().await;
        Ok(())
    }

    async fn resize(&self, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("nothing has a size"))
    }

    async fn adopt(
        &self,
        _: &Disk,
        _: &DiskId,
        _: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        Ok(Presence::Unknown)
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
        self.step().await;
        Ok(())
    }

    async fn unmount(&self, _: &Path) -> Result<(), BackendError> {
        self.step().await;
        Ok(())
    }

    async fn usage(&self, _: &Path) -> Result<Usage, BackendError> {
        Err(BackendError::unsuitable("nothing has a size"))
    }

    async fn trim(&self, _: &Path) -> Result<u64, BackendError> {
        Err(BackendError::unsuitable("nothing has a size"))
    }

    async fn grow(&self, _: &Path, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("nothing has a size"))
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

pub(crate) fn disk(number: usize) -> Disk {
    Disk::virtual_disk(format!("/var/lib/images/layers/sha256-{number:06x}")).read_only()
}

pub(crate) fn request() -> MountRequest {
    MountRequest::new(MountOptions::read_only())
}
