//! What the suites work on.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use crate::testing::VmStep;
use crate::{Binder, Disk, LayerCombiner, MountOptions, Mounter, Transport, Unplugger};

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

/// How a fixture can make a call end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The answer is lost: the backend cannot know whether the call had its effect. Make the
    /// hypervisor or the guest silent, or break the connection to it.
    Uncertain {
        /// Whether it had.
        happens: bool,
    },
    /// The device, mount or overlay is in use. Hold it open, for example.
    Busy,
    /// The call takes no effect before [`Faults::clear`]: what the backend asks is slow. The suite
    /// gives the call up meanwhile, and makes the next one for the same key.
    Held,
    /// The VM has ended. This is the last fault of a suite, which needs the VM for nothing more
    /// than tear-downs afterwards.
    Gone,
}

/// Makes calls fail on purpose, for a fixture.
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
/// use std::sync::Arc;
///
/// use blockmount::testing::VmStep;
/// use blockmount::testing::conformance::{Fault, Faults};
///
/// /// A hypervisor in memory, which looks at these before it answers.
/// #[derive(Clone, Default)]
/// struct Switches {
///     /// The next device is added, but nobody is told.
///     silent_add: Arc<AtomicBool>,
/// }
///
/// #[async_trait::async_trait]
/// impl Faults for Switches {
///     async fn inject(&self, step: VmStep, fault: Fault) -> bool {
///         let known = (step, fault) == (VmStep::Attach, Fault::Uncertain { happens: true });
///         self.silent_add.store(known, Relaxed);
///         known
///     }
///
///     async fn clear(&self) {
///         self.silent_add.store(false, Relaxed);
///     }
/// }
/// ```
#[async_trait]
pub trait Faults: Send + Sync + 'static {
    /// Makes the next call of `step` end in `fault`, and says whether this fixture can do that. If it
    /// cannot, it changes nothing, and the suite reports the checks that need the fault as
    /// [not run](super::Passed::not_run).
    async fn inject(&self, step: VmStep, fault: Fault) -> bool;

    /// Ends every fault, also one that no call has met: what is held goes on, what is busy is free.
    /// What has ended with [`Fault::Gone`] stays so.
    async fn clear(&self);
}

/// The faults of `F` but for [`Fault::Gone`], for a VM that is needed after the suite.
#[derive(Debug, Clone)]
pub struct WithoutGone<F>(pub F);

#[async_trait]
impl<F: Faults> Faults for WithoutGone<F> {
    async fn inject(&self, step: VmStep, fault: Fault) -> bool {
        fault != Fault::Gone && self.0.inject(step, fault).await
    }

    async fn clear(&self) {
        self.0.clear().await;
    }
}

/// Makes a backend as the next process of the host has it.
pub(super) type Successor<B> = Box<dyn Fn() -> Box<B> + Send + Sync>;

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
    pub(super) faults: Option<Box<dyn Faults>>,
    pub(super) successor: Option<Successor<dyn Transport>>,
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
            faults: None,
            successor: None,
        }
    }

    /// Makes the transport anew over the same VM, as the next process has it that adopts what this one attached. The suite
    /// makes no call of the one before from then on. Without it, the checks of adoptions are not run.
    #[must_use]
    pub fn successor<T: Transport>(mut self, next: impl Fn() -> T + Send + Sync + 'static) -> Self {
        self.successor = Some(Box::new(move || Box::new(next())));
        self
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

    /// Makes calls fail on purpose. Without it, the checks of the state after `Uncertain`, `Busy` and
    /// `Gone`, and of the order of calls, are not run.
    #[must_use]
    pub fn faults(mut self, faults: impl Faults) -> Self {
        self.faults = Some(Box::new(faults));
        self
    }
}

/// A filesystem of several disks.
#[derive(Debug)]
pub(super) struct Several {
    /// The one that is mounted.
    pub(super) disk: Disk,
    pub(super) data: Vec<Disk>,
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
    pub(super) several: Option<Several>,
    pub(super) faults: Option<Box<dyn Faults>>,
    pub(super) next_mounter: Option<Successor<dyn Mounter>>,
    pub(super) next_combiner: Option<Successor<dyn LayerCombiner>>,
    pub(super) next_binder: Option<Successor<dyn Binder>>,
}

impl GuestFixture {
    /// A fixture with what every guest has to offer.
    ///
    /// - `transport` makes devices for the guest, and `unplugger` with it takes them out again.
    /// - `disks`: different disks that are there and not attached, each with a filesystem on all of it
    ///   that can be mounted with the [options](Self::options), and no directory `missing`; at least two.
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
            several: None,
            faults: None,
            next_mounter: None,
            next_combiner: None,
            next_binder: None,
        }
    }

    /// Makes the mounter anew over the same guest, as the next process has it that adopts what this one mounted. Without it,
    /// the checks of adoptions are not run.
    #[must_use]
    pub fn next_mounter<M: Mounter>(
        mut self,
        next: impl Fn() -> M + Send + Sync + 'static,
    ) -> Self {
        self.next_mounter = Some(Box::new(move || Box::new(next())));
        self
    }

    /// The same for the combiner.
    #[must_use]
    pub fn next_combiner<C: LayerCombiner>(
        mut self,
        next: impl Fn() -> C + Send + Sync + 'static,
    ) -> Self {
        self.next_combiner = Some(Box::new(move || Box::new(next())));
        self
    }

    /// The same for the binder.
    #[must_use]
    pub fn next_binder<B: Binder>(mut self, next: impl Fn() -> B + Send + Sync + 'static) -> Self {
        self.next_binder = Some(Box::new(move || Box::new(next())));
        self
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

    /// A disk with a filesystem whose data is on these others, of which it has one at least. All can be mounted together with
    /// the [options](Self::options). Without it, the checks of further devices are not run.
    #[must_use]
    pub fn several(mut self, disk: Disk, data: impl IntoIterator<Item = Disk>) -> Self {
        let data = data.into_iter().collect();
        self.several = Some(Several { disk, data });
        self
    }

    /// Makes calls fail on purpose. Without it, the checks of the state after `Uncertain`, `Busy` and
    /// `Gone`, and of the order of calls, are not run.
    #[must_use]
    pub fn faults(mut self, faults: impl Faults) -> Self {
        self.faults = Some(Box::new(faults));
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
            .field("several", &self.several)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}
