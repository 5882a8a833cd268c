//! The engine: mounts the device behind a locator at a target, and undoes it by the target alone.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, ErrorKind, LayerCombiner, MountOptions, Mounter,
    Overlay, Propagation, Resolver, Unplugger,
};

use crate::builder::LinuxGuestBuilder;
use crate::device::dax;
use crate::device::part;
use crate::device::partitions::{Added, Partitions};
use crate::device::windows::{WindowUse, Windows};
use crate::device::{self, DeviceNumber};
use crate::errno::{blocking, errno_error, retry_while_busy};
use crate::filesystem::preflight::{choose_filesystem, explained, refuse_unsupported};
use crate::filesystem::probe::probe;
use crate::kernel::Kernel;
use crate::mount::mounting::{self, Request};
use crate::mount::overlay;
use crate::mount::places::{PlaceUse, Places};
use crate::mount::target::Target;
use crate::transports::Transports;
use crate::undo::journal::{Intent, Journal, Placed};
use crate::undo::ledger::{Claim, Devices, Entry, Ledger, Scratches};

/// Mounts block devices in this kernel: the [`Mounter`], [`LayerCombiner`] and [`Unplugger`] of a Linux guest.
///
/// Cloning is cheap; clones share the ledger of what to undo. The ledger is in memory: what is
/// mounted when the last clone is dropped stays mounted. A guest that may be killed and started
/// again keeps a journal as well: see [`LinuxGuestBuilder::journal`].
///
/// All methods must be called in a runtime of tokio that has I/O and time. Calls for different
/// targets run in parallel. A call that is dropped half-way has done nothing or everything: the
/// part that changes something runs to its end.
#[derive(Debug, Clone)]
pub struct LinuxGuest(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    config: LinuxGuestBuilder,
    pub(crate) journal: Option<Arc<Journal>>,
    pub(crate) ledger: Ledger,
    places: Arc<Places>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) partitions: Arc<Partitions>,
    pub(crate) scratches: Arc<Scratches>,
    pub(crate) windows: Arc<Windows>,
}

impl LinuxGuest {
    /// Starts from the defaults: no resolvers, every target that is not the system's.
    pub fn builder() -> LinuxGuestBuilder {
        LinuxGuestBuilder::default()
    }

    /// The transports of its devices.
    pub fn transports(&self) -> &Transports {
        &self.0.config.transports
    }

    /// Whether the files of what is mounted at a target are accessed without a copy in the page cache
    /// (DAX), as the kernel says of them (`STATX_ATTR_DAX`); for a filesystem without files, whether it is
    /// mounted so. Nothing if nothing is mounted there.
    pub async fn is_dax(&self, target: &Path) -> Option<bool> {
        let target = target.to_owned();
        let look = blocking(move || Ok(dax::of_mount(&target)));
        look.await.ok().flatten().map(dax::Dax::is_on)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Mounter for LinuxGuest {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.0.clone().mount(device, target, options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.clone().unmount(target).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for LinuxGuest {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let inner = self.0.clone();
        let target = Target::parse(&overlay.target, &inner.config.allowed)?;
        let overlay = overlay.clone();
        blocking(move || overlay::combine(&inner, &overlay, &target)).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.0.clone().unmount(target).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for LinuxGuest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.config.transports.unplug(device).await
    }
}

impl Inner {
    pub(crate) fn new(config: LinuxGuestBuilder, journal: Option<Arc<Journal>>) -> Self {
        Inner {
            config,
            places: Arc::new(Places::new(journal.clone())),
            partitions: Arc::new(Partitions::new(journal.clone())),
            journal,
            ledger: Ledger::default(),
            devices: Arc::default(),
            scratches: Arc::default(),
            windows: Arc::default(),
        }
    }

    async fn mount(
        self: Arc<Self>,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        refuse_unsupported(options)?;
        let target = Target::parse(target, &self.config.allowed)?;
        let early = target.clone();
        // A bad target should not cost a wait for the device.
        blocking(move || early.check_free()).await?;
        let found = self.config.transports.resolve(device).await?;
        let done = self.clone().mount_found(found, &target, options).await;
        done.map_err(|error| match self.windows.owes(target.path()) {
            false => error,
            true => BackendError::uncertain(format!(
                "{}, and the device made for it is in use",
                error.message()
            )),
        })
    }

    async fn mount_found(
        self: Arc<Self>,
        found: BlockDevice,
        target: &Target,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let deadline = Instant::now() + self.config.device_deadline;
        let mut partition = None;
        let mut node = found.path;
        let mut open = device::await_open(&node, deadline).await?;
        let mut window = None;
        let number = options.partition();
        if let Some(mut range) = found.range {
            // The kernel makes no partitions of a window: one is a smaller window.
            if let Some(number) = number {
                let at = node.clone();
                range = blocking(move || part::partition(&at, &open, range, number)).await?;
            }
            let mapped = self.map(node, range, target).await?;
            open = device::await_open(mapped.node(), deadline).await?;
            node = mapped.node().to_owned();
            window = Some(mapped);
        } else if let Some(number) = number {
            (node, partition) = self.partitions.find(&open, number, deadline).await?;
            open = device::await_open(&node, deadline).await?;
        }
        let (inner, options, target) = (self.clone(), options.clone(), target.clone());
        let (below, open) = ((partition, window), Arc::new(open));
        let attempt = move || {
            // As long as somebody has it open, the kernel keeps what was read of it: once for all of this.
            let _kept = &open;
            inner.mount_device(&node, below.clone(), &target, &options)
        };
        retry_while_busy(self.config.busy_timeout, attempt).await
    }

    async fn map(
        self: &Arc<Self>,
        node: PathBuf,
        range: Range<u64>,
        target: &Target,
    ) -> Result<Arc<WindowUse>, BackendError> {
        let (inner, target, at) = (self.clone(), target.clone(), node.clone());
        let attempt = move || {
            let (node, range) = (&node, range.clone());
            inner.windows.map(node, range, target.path()).map(Arc::new)
        };
        match retry_while_busy(self.config.busy_timeout, attempt).await {
            Err(error) if error.kind() == ErrorKind::Busy => {
                blocking(move || {
                    let users = device::in_use(&at);
                    let message = format!("{}: {}", error.message(), users.message());
                    Err(BackendError::busy(message).with_source(error))
                })
                .await
            }
            done => done,
        }
    }

    fn mount_device(
        &self,
        node: &Path,
        (partition, window): (Option<Arc<Added>>, Option<Arc<WindowUse>>),
        target: &Target,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let mut open = device::open(node)?.ok_or_else(|| {
            BackendError::not_found(format!("device {} has vanished", node.display()))
        })?;
        let number = DeviceNumber::of(&open)?;
        let place = self.places.enter(target)?;
        device::read_ahead(&open);
        let found = probe(&mut open)
            .map_err(|error| errno_error(format!("cannot read {}", node.display()), error))?;
        let filesystem = choose_filesystem(node, &found, options.filesystem())?;
        drop(open);
        let is_dax = dax::is_asked(options);
        let mut request = Request::new(&filesystem, node, options);
        let kernel = self.config.kernel;
        let intent = Intent {
            journal: self.journal.as_ref(),
            target: target.path(),
            device: Some((number, options)),
            partition: partition.as_ref().map(|added| added.id()),
            scratch: None,
        };
        let (Placed { mount, note }, claim) = self.devices.claim(number, options, |only| {
            request.exclusive = only;
            self.mount_one(&mut request, &place, options.propagation(), &intent)
                .map_err(|error| {
                    if is_dax {
                        dax::explained(error, node)
                    } else {
                        error
                    }
                })
                .map_err(|error| explained(error, node))
        })?;
        let entry = Entry {
            mount,
            note,
            place,
            claim: Claim::Device(claim),
            partition,
            window,
        };
        self.record(entry, options.propagation(), kernel)?;
        if is_dax {
            self.prove_dax(target)?;
        }
        Ok(())
    }

    /// Takes a mount back that was to be without the page cache, and is not.
    fn prove_dax(&self, target: &Target) -> Result<(), BackendError> {
        let found = dax::of_mount(target.path());
        tracing::info!(target = %target.path().display(), ?found, "mounted with dax=always");
        if found.is_some_and(|found| found.option || found.is_on()) {
            return Ok(());
        }
        let path = target.path().display();
        let message = format!("the filesystem at {path} does without dax=always");
        Err(self.take_back(target, BackendError::unsuitable(message)))
    }

    fn mount_one(
        &self,
        request: &mut Request,
        place: &PlaceUse,
        propagation: Option<Propagation>,
        intent: &Intent<'_>,
    ) -> Result<Placed, BackendError> {
        let kernel = self.config.kernel;
        let detached = match request.build(kernel) {
            // Where the one driver for the whole family does not answer to the older names.
            Err(error)
                if error.kind() == ErrorKind::Unsuitable
                    && matches!(&*request.filesystem, "ext2" | "ext3") =>
            {
                request.filesystem = "ext4".to_owned();
                request.build(kernel)?
            }
            built => built?,
        };
        let at = place.prepare()?;
        match detached {
            Some(mount) => mounting::attach(&mount, &at, propagation, kernel, intent),
            None => {
                let expected = || request.expected();
                mounting::in_one_step(at, kernel, intent, expected, |at| request.mount_at(at))
            }
        }
    }

    /// Enters a mount into the ledger, and sets what can be set only in its place.
    pub(crate) fn record(
        &self,
        entry: Entry,
        propagation: Option<Propagation>,
        kernel: Kernel,
    ) -> Result<(), BackendError> {
        let target = entry.place.target().clone();
        self.ledger.insert(entry);
        let Some(propagation) = propagation else {
            return Ok(());
        };
        let done = target.find().and_then(|place| match place {
            Some(place) => mounting::propagate(&place.into_path_at(), propagation, kernel),
            None => Err(BackendError::other(format!(
                "{} has vanished",
                target.path().display()
            ))),
        });
        done.map_err(|error| self.take_back(&target, error))
    }

    /// Unmounts what must not stay, and says so if it does.
    fn take_back(&self, target: &Target, error: BackendError) -> BackendError {
        match self.ledger.unmount(target, self.config.kernel) {
            Ok(()) => error,
            Err(left) => {
                BackendError::uncertain(format!("{}, and {}", error.message(), left.message()))
            }
        }
    }

    async fn unmount(self: Arc<Self>, target: &Path) -> Result<(), BackendError> {
        // What was mounted before the configuration was narrowed must be unmountable still.
        let target = Target::parse(target, &[])?;
        let (inner, at, kernel) = (self.clone(), target.clone(), self.config.kernel);
        let attempt = move || {
            inner.ledger.unmount(&at, kernel)?;
            inner.windows.settle(at.path())
        };
        match retry_while_busy(self.config.busy_timeout, attempt).await {
            Err(error) if error.kind() == ErrorKind::Busy => {
                blocking(move || {
                    let error = self.windows.name_users(target.path(), error);
                    Err(self.ledger.name_users(target.path(), error))
                })
                .await
            }
            done => done,
        }
    }

    pub(crate) fn kernel(&self) -> Kernel {
        self.config.kernel
    }

    pub(crate) fn overlay_mark(&self) -> &str {
        &self.config.overlay_mark
    }

    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.places
    }
}
