//! How large the disks and filesystems of the fake VM are.

use std::path::Path;

use super::state::{DISK, VmState, What};
use crate::{BackendError, DiskId, Space, Usage};

impl VmState {
    fn size_of(&self, disk: &DiskId) -> u64 {
        self.sizes.get(disk).copied().unwrap_or(DISK)
    }

    pub(super) fn resize(&mut self, disk: &DiskId, bytes: u64) -> Result<(), BackendError> {
        if self.host_gone {
            return Err(BackendError::gone("the VM is gone"));
        }
        if self.locator_of(disk).is_none() {
            return Err(BackendError::not_found(format!(
                "disk {disk} is not attached"
            )));
        }
        let size = self.size_of(disk);
        if bytes < size {
            let message = format!("disk {disk} has {size} bytes, and is not made smaller");
            return Err(BackendError::invalid(message));
        }
        self.sizes.insert(disk.clone(), bytes);
        Ok(())
    }

    /// The size of the device at a target, and of what is on it.
    fn sizes_at(&self, target: &Path) -> Result<(u64, u64), BackendError> {
        if self.guest_gone {
            return Err(BackendError::gone("the guest is gone"));
        }
        let at = self.mounts.get(target);
        match at.map(|at| (&at.what, at.size)) {
            Some((What::Device { uses, .. }, size)) => {
                let slot = uses.first().and_then(|first| self.slots.get(&first.slot));
                let disk = slot.map(|slot| &slot.disk);
                Ok((disk.map_or(DISK, |disk| self.size_of(disk)), size))
            }
            _ => Err(BackendError::not_found(format!(
                "no device is mounted at {}",
                target.display()
            ))),
        }
    }

    pub(super) fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        let (_, total) = self.sizes_at(target)?;
        let space = |total| Space {
            total,
            used: total / 4,
            available: total - total / 4,
        };
        Ok(Usage::new(space(total), space(1000)))
    }

    pub(super) fn grow(&mut self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        let (device, _) = self.sizes_at(target)?;
        if device < bytes {
            let message = format!("the device has {device} bytes still, and not {bytes}");
            return Err(BackendError::not_found(message));
        }
        if let Some(at) = self.mounts.get_mut(target) {
            at.size = device;
        }
        Ok(())
    }
}
