//! How a device is mounted: canonical, so that equal requests compare equal.

mod builder;
mod check;
mod devices;
mod encryption;
mod flags;
mod format;
mod fs_group;
mod overlay;
mod verity;
mod view;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Disk, HolderName};

pub use builder::MountOptionsBuilder;
pub use check::Check;
pub use devices::{DeviceRole, ExtraDevice, ExtraDisk};
pub use encryption::{Aead, Encryption, KeySource, LuksKey};
pub use flags::{MountFlag, MountFlags, Propagation, PropagationMode};
pub use format::{Format, Overwrite};
pub use fs_group::{FsGroup, FsGroupPolicy};
pub use overlay::OverlayOptions;
pub use verity::{ErrorCorrection, HashAlgorithm, OnCorruption, Verity};
pub use view::{IdMap, IdRange, NewDirectory, ViewOptions};

/// How a device is mounted in the guest.
///
/// Options are canonical once built: the order in which order-free options were given and
/// repetitions do not matter to `==`, and what contradicts itself is not built at all. The default is
/// the whole disk, read-write, with the filesystem that is found on it.
///
/// ```
/// use blockmount::MountOptions;
///
/// let one = MountOptions::builder().options(["noatime", "ro", "nodev"]).build()?;
/// let other = MountOptions::builder().read_only().options(["nodev", "noatime"]).build()?;
/// assert_eq!(one, other);
/// assert!(MountOptions::builder().options(["ro", "rw"]).build().is_err());
/// # Ok::<(), blockmount::InvalidOptions>(())
/// ```
///
/// Cloning is cheap (a reference count), and so is comparing and hashing.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "MountOptionsBuilder", into = "MountOptionsBuilder")]
pub struct MountOptions(Arc<Hashed>);

/// The fields, and their hash: a mount is looked up by its options each time it is shared.
struct Hashed {
    hash: u64,
    fields: Fields,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Fields {
    partition: Option<NonZeroU32>,
    filesystem: Option<String>,
    read_only: bool,
    flags: MountFlags,
    data: Box<[String]>,
    propagation: Option<Propagation>,
    // Boxed, because most mounts have none and there are many mounts.
    verity: Option<Box<Verity>>,
    encryption: Option<Box<Encryption>>,
    format: Option<Box<Format>>,
    check: Option<Check>,
    expose: Expose,
    devices: Box<[ExtraDevice]>,
    id_map: Option<Box<IdMap>>,
    fs_group: Option<FsGroup>,
}

/// Why [`MountOptions`] cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidOptions {
    /// Two options that exclude each other.
    #[error("mount option {0:?} contradicts {1:?}")]
    Contradiction(String, String),
    /// An option that is about something else than mounting a device.
    #[error("mount option {0:?} does not apply to a device: {1}")]
    Inapplicable(String, &'static str),
    /// Something that no kernel could be given.
    #[error("mount option {0:?} is malformed: {1}")]
    Malformed(String, &'static str),
}

/// What appears at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Expose {
    /// The filesystem on the device.
    #[default]
    Filesystem,
    /// The block device itself.
    BlockDevice,
}

impl Expose {
    fn is_filesystem(&self) -> bool {
        *self == Expose::Filesystem
    }
}

impl MountOptions {
    /// Starts from the default: the whole disk, read-write, with the filesystem that is found on it.
    pub fn builder() -> MountOptionsBuilder {
        MountOptionsBuilder::default()
    }

    /// The default, but read-only.
    pub fn read_only() -> Self {
        Self::from_fields(Fields {
            read_only: true,
            ..Fields::default()
        })
    }

    /// The partition to mount, from 1; the whole disk if none.
    pub fn partition(&self) -> Option<NonZeroU32> {
        self.0.fields.partition
    }

    /// The filesystem by its kernel name; found by probing if none.
    pub fn filesystem(&self) -> Option<&str> {
        self.0.fields.filesystem.as_deref()
    }

    /// Whether writing through the mount is refused.
    pub fn is_read_only(&self) -> bool {
        self.0.fields.read_only
    }

    /// The flags that the kernel knows for every filesystem.
    pub fn flags(&self) -> MountFlags {
        self.0.fields.flags
    }

    /// The options for the filesystem itself, each `name` or `name=value`, sorted.
    pub fn data(&self) -> &[String] {
        &self.0.fields.data
    }

    /// Whether mounts below the target appear elsewhere, if that was requested.
    pub fn propagation(&self) -> Option<Propagation> {
        self.0.fields.propagation
    }

    /// The integrity check of the device.
    pub fn verity(&self) -> Option<&Verity> {
        self.0.fields.verity.as_deref()
    }

    /// The encryption of the device.
    pub fn encryption(&self) -> Option<&Encryption> {
        self.0.fields.encryption.as_deref()
    }

    /// The filesystem to make before mounting.
    pub fn format(&self) -> Option<&Format> {
        self.0.fields.format.as_deref()
    }

    /// The check of the filesystem before mounting.
    pub fn check(&self) -> Option<Check> {
        self.0.fields.check
    }

    /// What appears at the target.
    pub fn expose(&self) -> Expose {
        self.0.fields.expose
    }

    /// The devices that the filesystem has beside the one that is mounted, by role, and in their order.
    pub fn devices(&self) -> &[ExtraDevice] {
        &self.0.fields.devices
    }

    /// The owners that the files appear with; those that the filesystem has if none.
    pub fn id_map(&self) -> Option<&IdMap> {
        self.0.fields.id_map.as_deref()
    }

    /// The group that all files are given to before they appear.
    pub fn fs_group(&self) -> Option<FsGroup> {
        self.0.fields.fs_group
    }

    /// The same with further devices.
    pub(crate) fn with_devices(&self, devices: Vec<ExtraDevice>) -> Result<Self, InvalidOptions> {
        let builder = MountOptionsBuilder::from(self.clone());
        let all = devices.into_iter();
        all.fold(builder, MountOptionsBuilder::device).build()
    }

    /// Whether a device can have a mount with these options and one with `other` at once.
    ///
    /// The kernel gives all mounts of one device one superblock: they can differ in what belongs to
    /// the mount, not in what belongs to the filesystem, and a writer excludes everybody else.
    /// Different partitions are different devices; the whole disk overlaps each of them.
    pub fn is_compatible_with(&self, other: &MountOptions) -> bool {
        let (one, other) = (&self.0.fields, &other.0.fields);
        let apart =
            |a: Option<NonZeroU32>, b: Option<NonZeroU32>| a.is_some() && b.is_some() && a != b;
        let same_superblock = one.partition == other.partition
            && one.filesystem == other.filesystem
            && one.data == other.data
            && one.flags.of_superblock() == other.flags.of_superblock()
            && one.verity == other.verity
            && one.encryption == other.encryption
            && one.devices == other.devices
            && one.expose == other.expose;
        apart(one.partition, other.partition)
            || (one.read_only && other.read_only && same_superblock)
    }

    fn from_fields(fields: Fields) -> Self {
        let mut hasher = DefaultHasher::new();
        fields.hash(&mut hasher);
        MountOptions(Arc::new(Hashed {
            hash: hasher.finish(),
            fields,
        }))
    }
}

impl Default for MountOptions {
    fn default() -> Self {
        Self::from_fields(Fields::default())
    }
}

impl PartialEq for MountOptions {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || (self.0.hash == other.0.hash && self.0.fields == other.0.fields)
    }
}

impl Eq for MountOptions {}

impl Hash for MountOptions {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.hash);
    }
}

impl std::fmt::Debug for MountOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fields.fmt(f)
    }
}

/// A mount to make: how, and where.
///
/// ```
/// use blockmount::{MountOptions, MountRequest};
///
/// let anywhere = MountRequest::new(MountOptions::read_only());
/// let there = MountRequest::new(MountOptions::read_only()).at("/run/layers/base");
/// assert_eq!(anywhere.target(), None);
/// assert_eq!(there.target().unwrap().to_str(), Some("/run/layers/base"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MountRequest {
    options: MountOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_by: Option<HolderName>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<ExtraDisk>,
}

impl MountRequest {
    /// A mount at a path that the manager makes up.
    pub fn new(options: MountOptions) -> Self {
        MountRequest {
            options,
            target: None,
            held_by: None,
            devices: Vec::new(),
        }
    }

    /// The same mount for a holder who comes back for it after a restart
    /// ([`Recovery::claim`](crate::Recovery::claim)). One name has one handle at a time.
    #[must_use]
    pub fn held_by(mut self, name: HolderName) -> Self {
        self.held_by = Some(name);
        self
    }

    /// The same mount at an absolute path in the guest.
    ///
    /// Where the device is mounted already with the same options, that mount is shared and its path is
    /// what the caller gets.
    #[must_use]
    pub fn at(mut self, target: impl Into<PathBuf>) -> Self {
        self.target = Some(target.into());
        self
    }

    /// Adds a disk that the filesystem has beside the one that is mounted, after those that are there: a blob of an erofs,
    /// in the order of its table, or another device of a btrfs. All disks are attached together, and stay attached for as
    /// long as the mount lives.
    #[must_use]
    pub fn with_device(self, disk: Disk) -> Self {
        self.with_device_as(DeviceRole::Data, disk)
    }

    /// The same for a disk with something else on it, such as the log of an xfs.
    #[must_use]
    pub fn with_device_as(mut self, role: DeviceRole, disk: Disk) -> Self {
        self.devices.push(ExtraDisk::new(role, disk));
        self
    }

    /// The disks that are attached beside the one that is mounted.
    pub fn devices(&self) -> &[ExtraDisk] {
        &self.devices
    }

    /// How to mount.
    pub fn options(&self) -> &MountOptions {
        &self.options
    }

    /// Who comes back for it after a restart.
    pub fn holder(&self) -> Option<&HolderName> {
        self.held_by.as_ref()
    }

    /// Where to mount; the manager makes up a path if none.
    pub fn target(&self) -> Option<&Path> {
        self.target.as_deref()
    }
}
