//! The devices that a mount has beside the one that is mounted.

use serde::{Deserialize, Serialize};

use super::InvalidOptions;
use crate::{DeviceLocator, Disk};

/// The most further devices of one mount, so that a request of the guest's protocol has a limit. Tools that merge erofs images
/// make less than a hundred.
const MOST: usize = 255;

/// What a filesystem keeps on a further device.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DeviceRole {
    /// Data: the blobs of an erofs, in the order of its table; the other devices of a btrfs, in any order. (`device=`)
    #[default]
    Data,
    /// The log of an xfs (`logdev=`), or the journal of an ext3 or ext4 (`journal_path=`).
    Log,
    /// The realtime section of an xfs. (`rtdev=`)
    Realtime,
    /// The hash tree by which the device that is mounted is checked: [`Verity::separate_tree`](super::Verity::separate_tree).
    HashTree,
}

impl DeviceRole {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            DeviceRole::Data => "data",
            DeviceRole::Log => "log",
            DeviceRole::Realtime => "realtime",
            DeviceRole::HashTree => "hash tree",
        }
    }

    fn is_data(&self) -> bool {
        *self == DeviceRole::Data
    }
}

/// A further device of a filesystem, by where it is attached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ExtraDevice {
    /// What is on it.
    #[serde(default, skip_serializing_if = "DeviceRole::is_data")]
    pub role: DeviceRole,
    /// Where it is.
    pub locator: DeviceLocator,
}

impl ExtraDevice {
    /// A device with this on it.
    pub fn new(role: DeviceRole, locator: DeviceLocator) -> Self {
        ExtraDevice { role, locator }
    }
}

/// A further disk of a filesystem, to be attached with the one that is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ExtraDisk {
    /// What is on it.
    #[serde(default, skip_serializing_if = "DeviceRole::is_data")]
    pub role: DeviceRole,
    /// The disk.
    pub disk: Disk,
}

impl ExtraDisk {
    pub(crate) fn new(role: DeviceRole, disk: Disk) -> Self {
        ExtraDisk { role, disk }
    }
}

/// The canonical order: by role, and devices of one role as they were given.
pub(super) fn canonical(
    mut devices: Vec<ExtraDevice>,
) -> Result<Box<[ExtraDevice]>, InvalidOptions> {
    devices.sort_by_key(|device| device.role);
    let malformed = |device: &ExtraDevice, why| {
        let what = format!("{} device {}", device.role.name(), device.locator);
        Err(InvalidOptions::Malformed(what, why))
    };
    for (index, device) in devices.iter().enumerate() {
        let (before, role) = (&devices[..index], device.role);
        if before.iter().any(|other| other.locator == device.locator) {
            return malformed(device, "it is given twice");
        }
        if !role.is_data() && before.iter().any(|other| other.role == role) {
            return malformed(device, "a mount has one of them");
        }
        if index >= MOST {
            return malformed(device, "a mount has at most 255 further devices");
        }
    }
    Ok(devices.into())
}

/// The option of a filesystem that names a device in place of a further device, if it is one.
pub(super) fn is_named_by(option: &str) -> bool {
    let name = option.split('=').next().unwrap_or(option);
    matches!(
        name,
        "device" | "logdev" | "rtdev" | "journal_path" | "journal_dev"
    )
}
