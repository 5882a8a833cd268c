//! Mounts by identity.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmount::BackendError;
use rustix::fs::{AtFlags, Statx, StatxAttributes, StatxFlags, fstat, fstatfs, makedev, statx};
use serde::{Deserialize, Serialize};

use crate::device::number::DeviceNumber;
use crate::errno::errno_error;
use crate::kernel::Kernel;
use crate::mount::mountinfo::{self, MountInfo};
use crate::mount::target;
use crate::sys;

/// The mask of `statx` for an id that is never given again (`STATX_MNT_ID_UNIQUE`).
pub(crate) const UNIQUE_ID: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Whether the kernel was asked for such an id, and has none.
static LACKS_UNIQUE_IDS: AtomicBool = AtomicBool::new(false);

/// A mount by identity.
#[derive(Debug, Clone, Copy, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MountId {
    /// Its number in `mountinfo`, which another mount may get as soon as this one is gone.
    reused: u64,
    /// Its number for ever, where the kernel has those.
    unique: Option<u64>,
    /// What else tells it from whatever got its number: the filesystem's device, and its kind unless it has a number for ever.
    device: u64,
    kind: i64,
}

/// By the numbers for ever where both have one.
impl PartialEq for MountId {
    fn eq(&self, other: &Self) -> bool {
        match (self.unique, other.unique) {
            (Some(one), Some(other)) => one == other,
            _ => {
                let all = |id: &MountId| (id.reused, id.unique, id.device, id.kind);
                all(self) == all(other)
            }
        }
    }
}

impl MountId {
    /// The mount that an open file is on.
    pub(crate) fn of(fd: &OwnedFd, kernel: Kernel) -> Result<Self, BackendError> {
        if let Some(unique) = Self::of_detached(fd, kernel) {
            let reused = target::mount_id(fd)?;
            return Ok(MountId { reused, ..unique });
        }
        let reused = target::mount_id(fd)?;
        let unique = None;
        let trouble = |errno| errno_error("cannot look at a mount", errno);
        let device = fstat(fd).map_err(trouble)?.st_dev;
        // The type of the field differs between machines.
        let kind = fstatfs(fd).map_err(trouble)?.f_type as i64;
        Ok(MountId {
            reused,
            unique,
            device,
            kind,
        })
    }

    /// The mount that an open file is on, without its number in `mountinfo`. `None` if the kernel has no numbers for ever.
    pub(crate) fn of_detached(fd: &OwnedFd, kernel: Kernel) -> Option<Self> {
        if !kernel.unique_ids || LACKS_UNIQUE_IDS.load(Ordering::Relaxed) {
            return None;
        }
        let answer = statx(fd, "", AtFlags::EMPTY_PATH, UNIQUE_ID).ok()?;
        let unique = unique_id(&answer);
        LACKS_UNIQUE_IDS.store(unique.is_none(), Ordering::Relaxed);
        Some(MountId {
            reused: 0,
            unique: Some(unique?),
            device: makedev(answer.stx_dev_major, answer.stx_dev_minor),
            kind: 0,
        })
    }

    /// Whether a file that was looked at with [`UNIQUE_ID`] is the root of this mount.
    pub(crate) fn is_root(&self, seen: &Statx) -> bool {
        let is_root = seen.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        is_root && self.unique.is_some() && unique_id(seen) == self.unique
    }

    /// The device of its filesystem; nothing if that has a number of its own.
    pub(crate) fn device(&self) -> Option<DeviceNumber> {
        Some(DeviceNumber::from_rdev(self.device)).filter(|number| number.major != 0)
    }

    /// Its number as of now.
    pub(crate) fn number(&self) -> u64 {
        self.reused
    }

    /// The number of the mount that it is on, as of now; none if it is nowhere in this namespace.
    pub(crate) fn parent(&mut self) -> Result<Option<u64>, BackendError> {
        if let Some(Ok(numbers)) = self.unique.map(sys::numbers_of_mount) {
            self.reused = numbers.own;
            return Ok(Some(numbers.parent));
        }
        let line = self.line();
        let line = line.map_err(|error| errno_error("cannot read the table of mounts", error))?;
        Ok(line.map(|line| line.parent))
    }

    /// Its line in the kernel's table; none if it is nowhere in this namespace.
    pub(crate) fn line(&self) -> io::Result<Option<MountInfo>> {
        let line = mountinfo::read_one(self.reused)?;
        Ok(line.filter(|line| self.is(line)))
    }

    /// Whether it is the mount in a line of the kernel's table.
    pub(crate) fn is(&self, line: &MountInfo) -> bool {
        let (major, minor) = line.device;
        // Each subvolume of a btrfs has a device number of its own, and the table shows the whole's.
        let is_device = makedev(major, minor) == self.device || line.filesystem == "btrfs";
        line.id == self.reused && is_device
    }
}

fn unique_id(answer: &Statx) -> Option<u64> {
    (answer.stx_mask & UNIQUE_ID.bits() != 0).then_some(answer.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use crate::mount::mountinfo;

    use super::*;

    #[test]
    fn is_the_line_of_its_number_and_device() {
        let mount = |device| MountId {
            reused: 40,
            unique: None,
            device,
            kind: 0,
        };
        let is = |mount: MountId, line: &str| mount.is(&mountinfo::parse(line.as_bytes())[0]);
        let (ext4, other) = (rustix::fs::makedev(7, 3), rustix::fs::makedev(0, 61));
        let line = "40 1 7:3 / /mnt rw - ext4 /dev/loop3 rw";
        assert!(is(mount(ext4), line) && !is(mount(other), line));
        assert!(!is(mount(ext4), &line.replace("40", "41")));
        let line = "40 1 0:60 / /mnt rw - btrfs /dev/loop3 rw";
        assert!(is(mount(other), line) && !is(mount(other), &line.replace("40", "41")));
    }
}
