//! The records of a journal.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{BindMount, DeviceLocator, Disk, DiskId, HolderName, MountOptions, Overlay};

/// How far a set-up or tear-down has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Progress {
    /// The backend was about to be called: it may or may not be there.
    Begun,
    /// It was set up.
    Up,
    /// It was about to be torn down: it may or may not be there, in whole or in part.
    Ending,
}

impl Progress {
    pub(crate) fn of(is_up: bool) -> Self {
        match is_up {
            true => Progress::Up,
            false => Progress::Ending,
        }
    }
}

/// One thing that a [`Journal`](super::Journal) keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Record {
    /// A disk that is attached.
    Attachment(AttachmentRecord),
    /// A device that is mounted.
    Mount(MountRecord),
    /// Layers that are combined.
    Stack(StackRecord),
    /// A mount, or the tree of a stack, that is seen at a further place.
    View(ViewRecord),
    /// A holder's name.
    Holder(HolderRecord),
}

/// What a [`Record`] is found by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RecordKey {
    /// The attachment of a disk.
    Attachment(DiskId),
    /// The mount of a device with some options.
    Mount(MountKey),
    /// The stack at a target.
    Stack(PathBuf),
    /// The view at a target.
    View(PathBuf),
    /// The holder of a name.
    Holder(HolderName),
}

/// The attachment of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AttachmentRecord {
    /// What the disk was identified as.
    pub id: DiskId,
    /// The disk, as the first caller named it.
    pub disk: Disk,
    /// How far it has got.
    pub progress: Progress,
    /// Where it is; none if the answer to the attach was never written down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locator: Option<DeviceLocator>,
    /// Whether the guest has unplugged the device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unplugged: bool,
}

/// What tells mounts apart: two requests with equal keys share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MountKey {
    /// The device.
    pub device: DeviceLocator,
    /// How it is mounted.
    pub options: MountOptions,
}

/// A [`MountKey`] by reference, to look one up. It has the fields of that in the same order, and so the same hash.
#[derive(Hash)]
pub(crate) struct MountKeyParts<'a> {
    pub(crate) device: &'a DeviceLocator,
    pub(crate) options: &'a MountOptions,
}

impl PartialEq<MountKey> for MountKeyParts<'_> {
    fn eq(&self, key: &MountKey) -> bool {
        *self.device == key.device && *self.options == key.options
    }
}

/// The mount of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MountRecord {
    /// What is mounted, and how.
    pub key: MountKey,
    /// The disk that the mount keeps attached; none if it was attached without this manager.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskId>,
    /// The disks of its further devices that the mount keeps attached, in the order of its options; fewer if a restart has
    /// not found all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DiskId>,
    /// Where it is mounted in the guest.
    pub target: PathBuf,
    /// How far it has got.
    pub progress: Progress,
}

/// Layers that are combined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct StackRecord {
    /// What is combined, and where.
    pub overlay: Overlay,
    /// The mount of each layer, the topmost first.
    pub layers: Vec<MountKey>,
    /// The mount of the scratch disk, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<MountKey>,
    /// How far it has got.
    pub progress: Progress,
}

/// A mount, or the tree of a stack, that is seen at a further place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ViewRecord {
    /// What is seen, where and how.
    pub bind: BindMount,
    /// The mount; none if it is the tree of the stack at the source that is seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<MountKey>,
    /// How far it has got.
    pub progress: Progress,
}

/// A holder: who comes back for a handle after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct HolderRecord {
    /// The name.
    pub name: HolderName,
    /// What it holds.
    pub of: RecordKey,
}

impl Record {
    /// What the record is found by.
    pub fn key(&self) -> RecordKey {
        match self {
            Record::Attachment(record) => RecordKey::Attachment(record.id.clone()),
            Record::Mount(record) => RecordKey::Mount(record.key.clone()),
            Record::Stack(record) => RecordKey::Stack(record.overlay.target.clone()),
            Record::View(record) => RecordKey::View(record.bind.target.clone()),
            Record::Holder(record) => RecordKey::Holder(record.name.clone()),
        }
    }
}

impl MountRecord {
    /// The disks that the mount keeps attached.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &DiskId> {
        self.disk.iter().chain(&self.devices)
    }
}

impl ViewRecord {
    /// Whether it may show a mount, also if the record makes no sense: it is named, or at the path that is shown.
    pub(crate) fn may_show(&self, mount: &MountRecord) -> bool {
        self.mount.as_ref() == Some(&mount.key) || self.bind.source == mount.target
    }
}

impl MountKey {
    pub(crate) fn new(device: DeviceLocator, options: MountOptions) -> Self {
        MountKey { device, options }
    }
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordKey::Attachment(disk) => write!(f, "the attachment of {disk}"),
            RecordKey::Mount(key) => write!(f, "the mount of {}", key.device),
            RecordKey::Stack(target) => write!(f, "the stack at {}", target.display()),
            RecordKey::View(target) => write!(f, "the view at {}", target.display()),
            RecordKey::Holder(name) => write!(f, "the holder {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

    use super::*;

    #[test]
    fn the_parts_of_a_key_are_found_where_it_is() {
        let device: DeviceLocator = "scsi:0/3".parse().unwrap();
        let options = MountOptions::read_only();
        let key = MountKey::new(device.clone(), options.clone());
        let (device, options) = (&device, &options);
        let parts = MountKeyParts { device, options };
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        assert_eq!(hasher.hash_one(&parts), hasher.hash_one(&key));
        assert!(parts == key);
        let options = &MountOptions::default();
        assert!(MountKeyParts { device, options } != key);
    }
}
