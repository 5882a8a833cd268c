//! Disks of the host, and what makes two of them the same.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use triomphe::Arc as Shared;

mod options;

pub use options::{CacheMode, DiskOption, DiskOptions, SectorSize};

/// A disk of the host that can be attached to a VM.
///
/// Two disks with the same [`DiskId`] are one attachment, whatever their names;
/// requesting one of them both read-only and read-write at once, or with other [options](DiskOptions), is a
/// conflict.
///
/// ```
/// use blockmount::Disk;
///
/// let layer = Disk::virtual_disk("/images/base.erofs").read_only();
/// let scratch = Disk::virtual_disk("/run/scratch.img");
/// assert!(layer.is_read_only() && !scratch.is_read_only());
/// ```
///
/// Cloning is cheap (a reference count): a disk is remembered in several places while it is attached.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Disk(Shared<Fields>);

#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Plain", into = "Plain")]
struct Fields {
    source: Box<Path>,
    read_only: bool,
    /// None for a disk image with the default options, which most are: there are many disks.
    unusual: Option<Box<Unusual>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Unusual {
    kind: DiskKind,
    options: DiskOptions,
}

/// A disk as it is written down.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plain {
    source: Box<Path>,
    kind: DiskKind,
    read_only: bool,
    #[serde(default, skip_serializing_if = "DiskOptions::is_default")]
    options: DiskOptions,
}

static USUAL: Unusual = Unusual {
    kind: DiskKind::VirtualDisk,
    options: DiskOptions::NONE,
};

impl Fields {
    fn kind_and_options(&self) -> &Unusual {
        self.unusual.as_deref().unwrap_or(&USUAL)
    }

    fn set(&mut self, kind: DiskKind, options: DiskOptions) {
        let unusual = Unusual { kind, options };
        self.unusual = (unusual != USUAL).then(|| Box::new(unusual));
    }
}

impl From<Plain> for Fields {
    fn from(plain: Plain) -> Self {
        let mut fields = Fields {
            source: plain.source,
            read_only: plain.read_only,
            unusual: None,
        };
        fields.set(plain.kind, plain.options);
        fields
    }
}

impl From<Fields> for Plain {
    fn from(fields: Fields) -> Self {
        let Unusual { kind, options } = fields.kind_and_options().clone();
        Plain {
            source: fields.source,
            kind,
            read_only: fields.read_only,
            options,
        }
    }
}

/// The kinds of disk that a hypervisor tells apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DiskKind {
    /// A disk image in a file.
    VirtualDisk,
    /// A block device of the host, passed through.
    PhysicalDisk,
    /// A disk served by a provider that is registered with the hypervisor (Hyper-V: an
    /// "extensible virtual disk").
    Extensible {
        /// The name under which the provider is registered.
        provider: String,
    },
}

impl Disk {
    /// A disk image in a file, to be attached read-write.
    pub fn virtual_disk(image: impl Into<PathBuf>) -> Self {
        Self::of_kind(DiskKind::VirtualDisk, image.into())
    }

    /// A block device of the host, to be attached read-write.
    pub fn physical_disk(device: impl Into<PathBuf>) -> Self {
        Self::of_kind(DiskKind::PhysicalDisk, device.into())
    }

    /// A disk served by `provider`, to be attached read-write. What `source` means is up to the
    /// provider.
    pub fn extensible(provider: impl Into<String>, source: impl Into<PathBuf>) -> Self {
        let provider = provider.into();
        Self::of_kind(DiskKind::Extensible { provider }, source.into())
    }

    fn of_kind(kind: DiskKind, source: PathBuf) -> Self {
        Disk(Shared::new(Fields::from(Plain {
            source: source.into_boxed_path(),
            kind,
            read_only: false,
            options: DiskOptions::NONE,
        })))
    }

    /// The same disk, attached so that the VM cannot write to it.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        Shared::make_mut(&mut self.0).read_only = true;
        self
    }

    /// The same disk, attached with these options.
    #[must_use]
    pub fn with_options(mut self, options: DiskOptions) -> Self {
        let fields = Shared::make_mut(&mut self.0);
        fields.set(fields.kind_and_options().kind.clone(), options);
        self
    }

    /// The same disk under another name.
    pub(crate) fn with_source(mut self, source: PathBuf) -> Self {
        Shared::make_mut(&mut self.0).source = source.into_boxed_path();
        self
    }

    /// The file or device on the host, as the caller named it.
    pub fn source(&self) -> &Path {
        &self.0.source
    }

    /// What kind of disk it is.
    pub fn kind(&self) -> &DiskKind {
        &self.0.kind_and_options().kind
    }

    /// Whether the VM is kept from writing to it.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// Whether one attachment can be of both, whatever their names.
    pub(crate) fn is_attached_like(&self, other: &Disk) -> bool {
        self.0.read_only == other.0.read_only && self.0.unusual == other.0.unusual
    }

    /// How it is attached, apart from that.
    pub fn options(&self) -> &DiskOptions {
        &self.0.kind_and_options().options
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("source", &self.source())
            .field("kind", self.kind())
            .field("read_only", &self.is_read_only())
            .field("options", self.options())
            .finish()
    }
}

impl fmt::Display for Disk {
    /// The source and the access, for messages: `/images/base.erofs (read-only)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.is_read_only() {
            "read-only"
        } else {
            "read-write"
        };
        write!(f, "{} ({access})", self.source().display())
    }
}

/// What a disk is, whatever it is called: two names of one file have one id.
///
/// Made by [`Transport::identify`](crate::Transport::identify), because only the backend that attaches a
/// disk knows what can be told apart. Cloning is cheap.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId {
    identity: Identity,
    /// No part of the identity, and of no use to another process.
    #[serde(skip)]
    version: Option<NonZeroU64>,
}

#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Identity {
    Inode { device: u64, inode: u64 },
    Name(#[serde(with = "shared_str")] Shared<str>),
}

/// `triomphe` has serde only for what is sized.
mod shared_str {
    use serde::{Deserialize, Deserializer, Serializer};
    use triomphe::Arc;

    pub(super) fn serialize<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(from).map(Arc::from)
    }
}

impl DiskId {
    /// A file by device and inode number: the same through links and relative names, and never
    /// given to another file while this one is open.
    pub fn inode(device: u64, inode: u64) -> Self {
        Self::of(Identity::Inode { device, inode })
    }

    /// A disk by a name of which there is only one, such as a canonical path or a provider's own
    /// identifier.
    pub fn name(name: &str) -> Self {
        Self::of(Identity::Name(name.into()))
    }

    fn of(identity: Identity) -> Self {
        let version = None;
        DiskId { identity, version }
    }

    /// The same disk with a number that is another one whenever what is on it may have changed, such as the time of the last
    /// change of its file in nanoseconds. Ids that differ in nothing else are equal: it is one disk.
    ///
    /// What lingers ([`Linger`](crate::Linger)) is used again only if its version is the same; without one nothing lingers.
    #[must_use]
    pub fn with_version(mut self, version: NonZeroU64) -> Self {
        self.version = Some(version);
        self
    }

    /// The same of which no version is known: what another process has seen of it says nothing here.
    pub(crate) fn without_version(&self) -> Self {
        Self::of(self.identity.clone())
    }

    /// Whether the disk is now as it was when it got this id, as far as that matters.
    pub(crate) fn is_unchanged(&self, now: &DiskId) -> bool {
        self.version.is_none() || self.version == now.version
    }

    /// Which version of the disk it is, if that is known.
    pub fn version(&self) -> Option<NonZeroU64> {
        self.version
    }
}

impl PartialEq for DiskId {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for DiskId {}

impl Hash for DiskId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity.hash(state);
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Identity::Inode { device, inode } => write!(f, "inode {inode} of device {device}"),
            Identity::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
