//! What the suites work on.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use crate::{Disk, MountOptions, Transport, Unplugger};

/// Lists what a backend has set up, for the suite to compare before and after a call.
///
/// A closure that returns the list is a snapshot. Implement the trait where the list has to be asked
/// for, of a hypervisor for example:
///
/// ```
/// # use blockmount::testing::conformance::Snapshot;
/// # struct Monitor;
/// # impl Monitor { async fn query_block(&self) -> Result<Vec<String>, std::io::Error> { Ok(vec![]) } }
/// struct Devices(Monitor);
///
/// #[async_trait::async_trait]
/// impl Snapshot for Devices {
///     async fn entries(&self) -> Vec<String> {
///         self.0.query_block().await.expect("the monitor answers")
///     }
/// }
/// ```
#[async_trait]
pub trait Snapshot: Send + Sync + 'static {
    /// A line for each entry, in a stable order: the slots of the VM, the kernel's loop devices and
    /// mounts, the directories that were made.
    ///
    /// The list must show nothing that others may change meanwhile, and nothing that changes by itself.
    async fn entries(&self) -> Vec<String>;
}

#[async_trait]
impl<F: Fn() -> Vec<String> + Send + Sync + 'static> Snapshot for F {
    async fn entries(&self) -> Vec<String> {
        self()
    }
}

/// Removes the file behind a disk from the host.
pub(super) type RemoveSource = Box<dyn Fn(&Disk) + Send + Sync>;

/// What the suite of [`transport`](super::transport) works on.
pub struct TransportFixture {
    pub(super) disks: Vec<Disk>,
    pub(super) missing: Disk,
    pub(super) snapshot: Box<dyn Snapshot>,
    pub(super) aliases: Vec<Disk>,
    pub(super) capacity: Option<usize>,
    pub(super) remove_source: Option<RemoveSource>,
}

impl TransportFixture {
    /// A fixture with what every transport has to offer.
    ///
    /// - `disks`: different disks that are there and not attached; at least two, and more than the
    ///   [capacity](Self::capacity).
    /// - `missing`: a disk whose source is not there.
    /// - `snapshot`: what the transport has set up.
    pub fn new(
        disks: impl IntoIterator<Item = Disk>,
        missing: Disk,
        snapshot: impl Snapshot,
    ) -> Self {
        TransportFixture {
            disks: disks.into_iter().collect(),
            missing,
            snapshot: Box::new(snapshot),
            aliases: Vec::new(),
            capacity: None,
            remove_source: None,
        }
    }

    /// Other names of the first disk, as far as the transport can tell: relative, through a symbolic
    /// link, a hard link.
    #[must_use]
    pub fn aliases(mut self, aliases: impl IntoIterator<Item = Disk>) -> Self {
        self.aliases = aliases.into_iter().collect();
        self
    }

    /// How many disks fit at once, if that is few enough to try.
    #[must_use]
    pub fn capacity(mut self, disks: usize) -> Self {
        self.capacity = Some(disks);
        self
    }

    /// Removes the source of a disk, if the transport keeps a disk that has lost its name. The suite
    /// does it to the last disk.
    #[must_use]
    pub fn remove_source(mut self, remove: impl Fn(&Disk) + Send + Sync + 'static) -> Self {
        self.remove_source = Some(Box::new(remove));
        self
    }
}

/// What the suites of the guest's contracts work on.
pub struct GuestFixture {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) unplugger: Arc<dyn Unplugger>,
    pub(super) disks: Vec<Disk>,
    pub(super) directory: PathBuf,
    pub(super) snapshot: Box<dyn Snapshot>,
    pub(super) options: MountOptions,
    pub(super) blank: Option<Disk>,
    pub(super) scratch: Option<Disk>,
}

impl GuestFixture {
    /// A fixture with what every guest has to offer.
    ///
    /// - `transport` makes devices for the guest, and `unplugger` with it takes them out again.
    /// - `disks`: different disks that are there and not attached, each with a filesystem on all of it
    ///   that can be mounted with the [options](Self::options); at least two.
    /// - `directory`: an absolute path in the guest below which the suite has the paths to itself. The
    ///   suite makes no directories there; the mounter does.
    /// - `snapshot`: what transport and guest have set up.
    pub fn new(
        transport: impl Transport,
        unplugger: impl Unplugger,
        disks: impl IntoIterator<Item = Disk>,
        directory: impl Into<PathBuf>,
        snapshot: impl Snapshot,
    ) -> Self {
        GuestFixture {
            transport: Arc::new(transport),
            unplugger: Arc::new(unplugger),
            disks: disks.into_iter().collect(),
            directory: directory.into(),
            snapshot: Box::new(snapshot),
            options: MountOptions::read_only(),
            blank: None,
            scratch: None,
        }
    }

    /// How to mount the disks; read-only unless set.
    #[must_use]
    pub fn options(mut self, options: MountOptions) -> Self {
        self.options = options;
        self
    }

    /// A disk without a filesystem, if mounting looks for one.
    #[must_use]
    pub fn blank(mut self, disk: Disk) -> Self {
        self.blank = Some(disk);
        self
    }

    /// A disk with a filesystem that can be mounted read-write, for the changes of an overlay. Without
    /// one, overlays are only tried read-only.
    #[must_use]
    pub fn scratch(mut self, disk: Disk) -> Self {
        self.scratch = Some(disk);
        self
    }

    /// The first two disks.
    pub(super) fn two_disks(&self) -> &[Disk] {
        assert!(
            self.disks.len() >= 2,
            "the fixture must have two disks, not {}",
            self.disks.len()
        );
        &self.disks[..2]
    }
}

impl fmt::Debug for TransportFixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportFixture")
            .field("disks", &self.disks)
            .field("aliases", &self.aliases)
            .field("missing", &self.missing)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for GuestFixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFixture")
            .field("disks", &self.disks)
            .field("options", &self.options)
            .field("blank", &self.blank)
            .field("scratch", &self.scratch)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}
