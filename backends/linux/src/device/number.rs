//! Block devices by number.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blockmount::BackendError;
use serde::{Deserialize, Serialize};

use crate::errno::errno_error;

/// A block device by its numbers: the same whatever its node is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver's number.
    pub major: u32,
    /// The device's number with that driver.
    pub minor: u32,
}

impl DeviceNumber {
    /// The device behind an open node.
    ///
    /// # Errors
    ///
    /// `Invalid` if it is no block device.
    pub fn of(device: &File) -> Result<Self, BackendError> {
        let meta = device
            .metadata()
            .map_err(|error| errno_error("cannot look at the open device", error))?;
        if !meta.file_type().is_block_device() {
            return Err(BackendError::invalid("the open file is not a block device"));
        }
        Ok(Self::from_rdev(meta.rdev()))
    }

    /// The device behind a node, which is not opened. Blocks.
    ///
    /// # Errors
    ///
    /// `Invalid` if it is no block device; others as they come.
    pub(crate) fn at(node: &Path) -> Result<Self, BackendError> {
        let meta = fs::metadata(node)
            .map_err(|error| errno_error(format!("cannot look at {}", node.display()), error))?;
        if !meta.file_type().is_block_device() {
            let message = format!("{} is not a block device", node.display());
            return Err(BackendError::invalid(message));
        }
        Ok(Self::from_rdev(meta.rdev()))
    }

    /// Refuses a node that leads to another device by now.
    pub(crate) fn ensure_is(self, now: DeviceNumber, node: &Path) -> Result<(), BackendError> {
        if now == self {
            return Ok(());
        }
        let node = node.display();
        let message = format!("{node} was replaced: it was block device {self}, and is {now}");
        Err(BackendError::conflict(message))
    }

    /// Whether the kernel says that nothing is written to the device. Blocks.
    pub(crate) fn is_read_only(self) -> bool {
        let said = fs::read_to_string(self.sysfs().join("ro"));
        said.is_ok_and(|said| said.trim() == "1")
    }

    /// Whether the kernel has lost the device while it is in use: it is gone from sysfs, has no capacity any more, or is a SCSI
    /// disk that is offline. Without sysfs no device is known to be lost. Blocks.
    pub(crate) fn is_lost(self) -> bool {
        let devices = Path::new("/sys/dev/block");
        let directory = devices.join(format!("{}:{}", self.major, self.minor));
        let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
        let states = ["device/state", "../device/state"].map(read);
        let lost = ["offline", "transport-offline", "cancel", "deleted", "dead"];
        let is_offline = |state: &String| lost.contains(&state.trim());
        devices.exists()
            && (!directory.exists() || read("size").trim() == "0" || states.iter().any(is_offline))
    }

    /// From what `stat` calls `st_rdev`.
    pub fn from_rdev(rdev: u64) -> Self {
        DeviceNumber {
            major: rustix::fs::major(rdev),
            minor: rustix::fs::minor(rdev),
        }
    }

    /// Its directory in sysfs.
    pub fn sysfs(self) -> PathBuf {
        format!("/sys/dev/block/{self}").into()
    }
}

/// As the kernel writes it: `7:3`.
impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Reads what the kernel writes, such as the attribute `dev` in sysfs with its line feed.
impl FromStr for DeviceNumber {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        let parse = || {
            let (major, minor) = text.trim_end().split_once(':')?;
            Some(DeviceNumber {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        };
        parse().ok_or_else(|| {
            BackendError::invalid(format!("{text:?} is no device number, such as 7:3"))
        })
    }
}
