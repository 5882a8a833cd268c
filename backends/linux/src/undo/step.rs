//! The steps by which a mount is undone, as they are kept in memory and in the journal.
//!
//! A new kind of layer is one variant of [`Undo`], one builder that puts it on the list before it makes something,
//! and one function that undoes it, called by [`teardown`](crate::undo::teardown). A variant has all that is needed
//! to prove that what is there is what was made, because a step may be undone by a later process.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use blockmount::{BindMount, DeviceLocator, Encryption, IdMap, MountOptions, Verity, ViewOptions};
use serde::{Deserialize, Serialize};

use crate::device::number::DeviceNumber;
use crate::mount::mount_id::MountId;
use crate::mount::target::FileId;

/// One thing to undo. Undoing what is not there, or is not the same any more, changes nothing and succeeds.
///
/// Unknown fields are refused when a record is read: a step that is not known cannot be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Undo {
    /// Unmount what is mounted at the target. Boxed because it is several times the size of the others.
    Unmount(Box<MountStep>),
    /// Remove the device that encrypts another, and with it the key. Boxed for its size.
    CloseCrypt(Box<CryptStep>),
    /// Remove the device with a tag for each block of another.
    CloseIntegrity(IntegrityStep),
    /// Remove the device that checks the integrity of another. Boxed for its size.
    CloseVerity(Box<VerityStep>),
    /// Remove the device that was made of a byte range.
    RemoveRange(RangeStep),
    /// Make the kernel forget a partition that it does not know by itself.
    DeletePartition(PartitionStep),
    /// Remove a directory that was made for a mount.
    RemoveDirectory(DirectoryStep),
    /// Remove the node of a device that is exposed at the target. Boxed for its size.
    RemoveNode(Box<NodeStep>),
}

/// A mount, and what it keeps others from doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MountStep {
    pub(crate) mount: Identity,
    /// The device that is mounted, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<DeviceUse>,
    /// The scratch directory of an overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch: Option<FileId>,
    /// What is shown, if it is a view of another mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) view: Option<ViewUse>,
}

/// A mount that is shown at a further place, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ViewUse {
    pub(crate) source: RecordedPath,
    pub(crate) options: ViewOptions,
}

impl ViewUse {
    pub(crate) fn of(bind: &BindMount) -> Self {
        ViewUse {
            source: bind.source.as_path().into(),
            options: bind.options.clone(),
        }
    }
}

/// Which mount it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Identity {
    /// The one with these numbers. A mount that is built detached has them before it is visible.
    Known(MountId),
    /// What `mount(2)` is about to make visible, as the kernel's table will show it; it has no
    /// numbers before.
    Expected {
        filesystem: String,
        source: RecordedPath,
        /// Its further devices where the table may show any of them as the source, which btrfs does.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        further_sources: Vec<RecordedPath>,
        /// Options that its filesystem was given, each of which the table shows.
        options: Vec<String>,
    },
}

/// A device that is in use, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceUse {
    pub(crate) number: DeviceNumber,
    pub(crate) options: MountOptions,
    /// By what the device was asked for. Records of earlier versions do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) locator: Option<DeviceLocator>,
}

impl DeviceUse {
    /// Whether it is the use of this device with these options.
    pub(crate) fn is_of(&self, device: &DeviceLocator, options: &MountOptions) -> bool {
        let is_device = self
            .locator
            .as_ref()
            .is_none_or(|locator| locator == device);
        is_device && self.options == *options
    }
}

impl MountStep {
    /// The owners that files of the mount appear with.
    pub(crate) fn id_map(&self) -> Option<&IdMap> {
        let of_device = self.device.as_ref().and_then(|used| used.options.id_map());
        let of_view = || self.view.as_ref().and_then(|view| view.options.id_map());
        of_device.or_else(of_view)
    }

    /// The device, if files of it can be written to through the mount.
    pub(crate) fn writable_device(&self) -> Option<DeviceNumber> {
        let used = self.device.as_ref()?;
        (!used.options.is_read_only()).then_some(used.number)
    }
}

/// A byte range of a device. The name of the device that is made of it follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RangeStep {
    pub(crate) backing: DeviceNumber,
    /// Tells the device from a later one with the same number: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// In bytes.
    pub(crate) start: u64,
    /// In bytes.
    pub(crate) end: u64,
    /// What the engine [marks](crate::LinuxGuestBuilder::device_mark) its devices with, if with anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<String>,
}

/// A device that is encrypted. The name of the device that does so follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CryptStep {
    pub(crate) backing: DeviceNumber,
    /// Tells the device from a later one with the same number: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// How, with no more of a key than its name. Records of earlier versions do not have it.
    #[serde(default = "ephemeral", skip_serializing_if = "is_plainly_ephemeral")]
    pub(crate) encryption: Encryption,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) read_only: bool,
    /// What the engine [marks](crate::LinuxGuestBuilder::device_mark) its devices with, if with anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<String>,
}

fn ephemeral() -> Encryption {
    Encryption::Ephemeral
}

/// Whether it is what a record that says nothing means. One with tags is another: what was changed on its disk is reported.
fn is_plainly_ephemeral(encryption: &Encryption) -> bool {
    *encryption == Encryption::Ephemeral
}

/// A device that has a tag for each of its blocks. The name of the device without them follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct IntegrityStep {
    pub(crate) backing: DeviceNumber,
    /// Tells the device from a later one with the same number: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// What the engine [marks](crate::LinuxGuestBuilder::device_mark) its devices with, if with anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<String>,
}

/// A device whose integrity is checked. The name of the device that does so follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VerityStep {
    pub(crate) backing: DeviceNumber,
    /// Tells the device from a later one with the same number: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    pub(crate) verity: Verity,
    /// The device with the hash tree, if it is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tree: Option<TreeStep>,
    /// What the engine [marks](crate::LinuxGuestBuilder::device_mark) its devices with, if with anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<String>,
}

/// A device with the hash tree of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeStep {
    pub(crate) device: DeviceNumber,
    /// Tells the device from a later one with the same number: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
}

/// A partition, with what tells it from one of a disk that got the same number later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PartitionStep {
    pub(crate) disk: DeviceNumber,
    pub(crate) number: u32,
    /// The sequence number of the disk, which no other one gets: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// In bytes.
    pub(crate) start: u64,
    /// In bytes.
    pub(crate) size: u64,
}

/// A directory. With a journal, it is made under a name that nobody else uses and then renamed, so that its
/// identity is on record before it can be taken for somebody else's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DirectoryStep {
    pub(crate) path: RecordedPath,
    /// The name that it has at first, in the same directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staged: Option<String>,
    /// Nothing until it is made under its first name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<FileId>,
    /// Whether it is in the scratch of an overlay, or in the mount that a view shows: it stays once there is the overlay or the view.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) scratch: bool,
}

/// The node of a device. With a journal, it is made under a name that nobody else uses and then renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeStep {
    pub(crate) path: RecordedPath,
    /// The name that it has at first, in the same directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staged: Option<String>,
    /// Nothing until it is made under its first name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<FileId>,
    pub(crate) device: DeviceUse,
}

/// What appears at a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appearance<'a> {
    /// A device, mounted or exposed.
    Device(&'a DeviceUse),
    Overlay,
    View(&'a ViewUse),
}

impl Undo {
    /// How a step of what appears at a target uses a device; nothing if it is something else, or of no device.
    pub(crate) fn device_use(&self) -> Option<&DeviceUse> {
        match self {
            Undo::Unmount(step) => step.device.as_ref(),
            Undo::RemoveNode(step) => Some(&step.device),
            _ => None,
        }
    }

    /// What it is, if it appears at the target.
    pub(crate) fn appearance(&self) -> Option<Appearance<'_>> {
        match self {
            Undo::Unmount(step) => Some(match (&step.device, &step.view) {
                (Some(device), _) => Appearance::Device(device),
                (None, Some(view)) => Appearance::View(view),
                (None, None) => Appearance::Overlay,
            }),
            Undo::RemoveNode(step) => Some(Appearance::Device(&step.device)),
            _ => None,
        }
    }

    /// Whether two steps are about the same thing, which several targets share.
    pub(crate) fn is_same(&self, other: &Undo) -> bool {
        match (self, other) {
            (Undo::RemoveDirectory(one), Undo::RemoveDirectory(other)) => {
                one.id.is_some() && one.id == other.id && one.path.is(&other.path.0)
            }
            (Undo::DeletePartition(one), Undo::DeletePartition(other)) => one == other,
            (Undo::RemoveRange(one), Undo::RemoveRange(other)) => one == other,
            (Undo::CloseCrypt(one), Undo::CloseCrypt(other)) => one == other,
            (Undo::CloseIntegrity(one), Undo::CloseIntegrity(other)) => one == other,
            (Undo::CloseVerity(one), Undo::CloseVerity(other)) => one == other,
            _ => false,
        }
    }
}

/// A path of any bytes: text if it is text, else its bytes as numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Spelled", from = "Spelled")]
pub(crate) struct RecordedPath(pub(crate) PathBuf);

impl RecordedPath {
    /// Compares bytes, which is several times as fast as comparing paths by component.
    pub(crate) fn is(&self, path: &Path) -> bool {
        self.0.as_os_str() == path.as_os_str()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelled {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&Path> for RecordedPath {
    fn from(path: &Path) -> Self {
        RecordedPath(path.to_owned())
    }
}

impl From<RecordedPath> for Spelled {
    fn from(RecordedPath(path): RecordedPath) -> Self {
        match path.to_str() {
            Some(text) => Spelled::Text(text.to_owned()),
            None => Spelled::Bytes(path.as_os_str().as_bytes().to_owned()),
        }
    }
}

impl From<Spelled> for RecordedPath {
    fn from(spelled: Spelled) -> Self {
        RecordedPath(match spelled {
            Spelled::Text(text) => text.into(),
            Spelled::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}
