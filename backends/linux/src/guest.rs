//! The engine: mounts the device behind a locator at a target, and undoes it by the target alone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{
    BackendError, BindMount, Binder, BlockDevice, DeviceLocator, DeviceRole, ErrorKind, Expose,
    LayerCombiner, MountOptions, Mounter, Overlay, Presence, Resolver, Turns, Unplugger, Usage,
    blocking_call, blocking_step,
};

use crate::device::stack::{self, Timeouts};
use crate::device::{crypt, dax};
use crate::errno::{blocking, retry_while_busy};
use crate::filesystem::preflight::refuse_unsupported;
use crate::filesystem::{check, format};
use crate::kernel::Kernel;
use crate::mount::attempt::{Found, expose_once, mount_once};
use crate::mount::extra_devices::{self, Extra};
use crate::mount::target::Target;
use crate::mount::volume::ToGrow;
use crate::mount::{directory, expose, overlay, unmount, view, volume};
use crate::transports::Transports;
use crate::undo::ledger::{Ledger, UndoList};
use crate::undo::step::{Appearance, ViewUse};
use crate::undo::{recovery, teardown};

/// Mounts block devices in this kernel: the [`Mounter`], [`LayerCombiner`], [`Binder`] and [`Unplugger`] of a Linux guest.
///
/// Cloning is cheap; clones share the ledger of what to undo. The ledger is in memory: what is
/// mounted when the last clone is dropped stays mounted. A guest that may be killed and started
/// again keeps a journal as well: see [`LinuxGuestBuilder::journal`](crate::LinuxGuestBuilder::journal).
///
/// All methods must be called in a runtime of tokio that has I/O and time. Calls for different
/// targets run in parallel. Calls for one target run one after the other, in the order in which they were first polled.
/// A call that is dropped runs to its end, and the next one for the target waits for it.
#[derive(Debug, Clone)]
pub struct LinuxGuest(Arc<Inner>);

/// How a guest does its work.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) transports: Transports,
    pub(crate) busy_timeout: Duration,
    pub(crate) device_timeout: Duration,
    pub(crate) format_timeout: Duration,
    pub(crate) allowed: Vec<PathBuf>,
    pub(crate) keys: Option<PathBuf>,
    pub(crate) overlay_mark: String,
    pub(crate) kernel: Kernel,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    ledger: Arc<Ledger>,
    turns: Turns<OsString>,
}

impl LinuxGuest {
    pub(crate) fn new(config: Config, ledger: Ledger) -> Self {
        LinuxGuest(Arc::new(Inner {
            config,
            ledger: Arc::new(ledger),
            turns: Turns::default(),
        }))
    }

    /// Undoes what an earlier process has left half done.
    pub(crate) async fn undo_left(&self, targets: Vec<Target>) {
        for target in targets {
            if let Err(error) = self.0.undo(&target).await {
                let path = target.path().display();
                tracing::error!(path = %blockmount::printable(&path), %error, "cannot undo a mount of an earlier process");
            }
        }
    }

    /// Calls for one target run one after the other, each to its end.
    async fn in_turn<F>(
        &self,
        target: Target,
        call: impl FnOnce(Arc<Inner>, Target) -> F,
    ) -> Result<(), BackendError>
    where
        F: Future<Output = Result<(), BackendError>> + Send + 'static,
    {
        let key = target.key().to_owned();
        let underway = self.0.ledger.enter();
        let call = call(self.0.clone(), target);
        let call = async move {
            let done = call.await;
            drop(underway);
            done
        };
        self.0.turns.run_blocking(key, call).await
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
        refuse_unsupported(options)?;
        let target = Target::parse(target, &self.0.config.allowed)?;
        let (device, options) = (device.clone(), options.clone());
        let call = |inner: Arc<Inner>, target| async move {
            inner.mount(&device, &target, &options).await
        };
        self.in_turn(target, call).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        // What was mounted before the configuration was narrowed must be unmountable still.
        let target = Target::parse(target, &[])?;
        let call = |inner: Arc<Inner>, target| async move { inner.unmount(&target).await };
        self.in_turn(target, call).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.look(target, volume::usage).await
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.look(target, volume::trim).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        let target = Target::parse(target, &[])?;
        let call = |inner: Arc<Inner>, target| async move { inner.grow(&target, bytes).await };
        self.in_turn(target, call).await
    }

    /// A mount is known by the undo list of its target, so a guest that was started again needs its
    /// [journal](crate::LinuxGuestBuilder::journal). Without one, whatever is mounted at the target is `Unknown`.
    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let (device, options) = (device.clone(), options.clone());
        let is_it = move |there: Appearance<'_>| match there {
            Appearance::Device(used) => used.is_of(&device, &options),
            _ => false,
        };
        self.presence(target, is_it).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for LinuxGuest {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let target = Target::parse(&overlay.target, &self.0.config.allowed)?;
        let overlay = overlay.clone();
        let call = |inner: Arc<Inner>, target| async move { inner.combine(&target, overlay).await };
        self.in_turn(target, call).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        Mounter::unmount(self, target).await
    }

    /// As [`Mounter::adopt`]; an overlay is known by its target.
    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        let is_overlay = |there: Appearance<'_>| there == Appearance::Overlay;
        self.presence(&overlay.target, is_overlay).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Binder for LinuxGuest {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        let target = Target::parse(&bind.target, &self.0.config.allowed)?;
        let bind = bind.clone();
        let call = |inner: Arc<Inner>, target| async move { inner.bind(&target, bind).await };
        self.in_turn(target, call).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        Mounter::unmount(self, target).await
    }

    /// As [`Mounter::adopt`].
    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        let wanted = ViewUse::of(bind);
        let is_it = move |there: Appearance<'_>| there == Appearance::View(&wanted);
        self.presence(&bind.target, is_it).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for LinuxGuest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let (inner, device) = (self.0.clone(), device.clone());
        blocking_call(async move { inner.config.transports.unplug(&device).await }).await
    }
}

impl LinuxGuest {
    /// Does something with what is at a target.
    async fn look<T: Send + 'static>(
        &self,
        target: &Path,
        look: impl FnOnce(&UndoList<'_>, Kernel) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let target = Target::parse(target, &[])?;
        let (ledger, kernel) = (self.0.ledger.clone(), self.0.config.kernel);
        let key = target.key().to_owned();
        let look = move || look(&ledger.list(&target), kernel);
        self.0.turns.run_blocking(key, blocking(look)).await
    }

    /// What is there of a mount that another process remembers, by the undo list and the kernel's table.
    async fn presence(
        &self,
        target: &Path,
        is_it: impl Fn(Appearance<'_>) -> bool + Send + 'static,
    ) -> Result<Presence, BackendError> {
        let look = move |list: &UndoList<'_>, kernel| recovery::presence(list, kernel, is_it);
        self.look(target, look).await
    }
}

impl Inner {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Target,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        // A bad target costs no wait for the device, and nothing is written to it.
        if options.expose() == Expose::Filesystem {
            let (ledger, early) = (self.ledger.clone(), target.clone());
            blocking_step(move || directory::check_free(&ledger.list(&early))).await?;
        }
        let found = self.resolve(device, options).await?;
        // What is made by the size alone would be made wrong, and nobody would notice.
        if options.expose() != Expose::Filesystem || options.format().is_some() {
            self.measure(device, options).await?;
        }
        let done = self.mount_resolved(device, found, target, options).await;
        let Err(error) = done else { return Ok(()) };
        let may_repeat = error.kind() != ErrorKind::Uncertain;
        // Why it cannot be measured is of less use than why it cannot be mounted.
        if !(may_repeat && self.measure(device, options).await.unwrap_or(false)) {
            return Err(error);
        }
        let again = async {
            let found = self.resolve(device, options).await?;
            self.mount_resolved(device, found, target, options).await
        };
        Box::pin(again).await
    }

    /// Mounts what was found, or undoes what was made of it.
    async fn mount_resolved(
        &self,
        device: &DeviceLocator,
        (found, further): (BlockDevice, Vec<BlockDevice>),
        target: &Target,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.begin(target).await?;
        let done = self.mount_found(device, found, further, target, options);
        let done = done.await;
        self.end(target, done).await
    }

    /// Has the kernel ask the devices of a mount anew where it may know them by others. Whether it did.
    async fn measure(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
    ) -> Result<bool, BackendError> {
        let further = options.devices().iter().map(|extra| &extra.locator);
        let mut differs = false;
        for device in std::iter::once(device).chain(further) {
            differs |= self.config.transports.measure(device).await?;
        }
        Ok(differs)
    }

    /// Finds a device and the further ones of its filesystem.
    async fn resolve(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
    ) -> Result<(BlockDevice, Vec<BlockDevice>), BackendError> {
        let transports = &self.config.transports;
        let found = transports.resolve(device).await?;
        let mut further = Vec::new();
        for (index, extra) in options.devices().iter().enumerate() {
            let resolved = transports.resolve(&extra.locator).await;
            further.push(resolved.map_err(|error| extra_devices::explained(error, index, extra))?);
        }
        Ok((found, further))
    }

    async fn mount_found(
        &self,
        locator: &DeviceLocator,
        found: BlockDevice,
        further: Vec<BlockDevice>,
        target: &Target,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let timeouts = Timeouts {
            ready: self.config.device_timeout,
            busy: self.config.busy_timeout,
        };
        let roles = options.devices().iter().map(|asked| asked.role);
        let (trees, further): (Vec<_>, Vec<_>) = further
            .into_iter()
            .zip(roles)
            .partition(|(_, role)| *role == DeviceRole::HashTree);
        let found = stack::Found {
            device: found,
            tree: trees.into_iter().next().map(|(tree, _)| tree),
            keys: self.config.keys.clone(),
        };
        // Boxed, as is all that most mounts do without: a call is moved as a whole to the thread that runs it.
        let device = match found.as_it_is(options) {
            Some(device) => device,
            None => {
                let opened = stack::open(&self.ledger, target, found, options, timeouts);
                Box::pin(opened).await?
            }
        };
        let mut extra = Vec::new();
        for (found, role) in further {
            let layer = Box::pin(stack::open_plain(&self.ledger, target, found, timeouts)).await?;
            extra.push(Extra::new(layer, role));
        }
        let device = Arc::new(device);
        if let Some(wanted) = options.format() {
            let timeouts = format::Timeouts {
                make: self.config.format_timeout,
                busy: self.config.busy_timeout,
            };
            let made = Box::pin(format::ensure(
                &self.ledger,
                target,
                &device.node,
                wanted,
                device.worth(),
                timeouts,
            ));
            if let Err(error) = made.await {
                let device = device.clone();
                return blocking(move || Err(device.explained(error))).await;
            }
        }
        if let Some(wanted) = options.check() {
            let timeouts = check::Timeouts {
                check: self.config.format_timeout,
                busy: self.config.busy_timeout,
            };
            let checked = check::check(&self.ledger, target, &device.node, wanted, timeouts);
            Box::pin(checked).await?;
        }
        let (options, locator) = (options.clone(), locator.clone());
        let (extra, kernel) = (Arc::new(extra), self.config.kernel);
        let within = self.config.format_timeout;
        let attempt = move |list: &UndoList<'_>| {
            let done = match options.expose() {
                Expose::Filesystem => {
                    let found = Found {
                        locator: &locator,
                        node: &device.node,
                        open: &device.open,
                        extra: &extra,
                    };
                    mount_once(list, found, &options, within, kernel)
                }
                _ => expose_once(list, &locator, &device.open, &options),
            };
            done.map_err(|error| device.explained(error))
        };
        self.attempt(target, attempt).await
    }

    async fn combine(&self, target: &Target, overlay: Overlay) -> Result<(), BackendError> {
        let early = target.clone();
        blocking(move || early.check_free()).await?;
        self.begin(target).await?;
        let (mark, kernel) = (self.config.overlay_mark.clone(), self.config.kernel);
        let (ledger, at) = (self.ledger.clone(), target.clone());
        let combine = move || overlay::combine(&ledger.list(&at), &overlay, &mark, kernel);
        let done = blocking(combine).await;
        self.end(target, done).await
    }

    async fn bind(&self, target: &Target, bind: BindMount) -> Result<(), BackendError> {
        let early = target.clone();
        blocking(move || early.check_free()).await?;
        self.begin(target).await?;
        let kernel = self.config.kernel;
        let attempt = move |list: &UndoList<'_>| view::bind(list, &bind, kernel);
        let done = self.attempt(target, attempt).await;
        self.end(target, done).await
    }

    /// Takes a target, and undoes what an earlier call for it has left.
    async fn begin(&self, target: &Target) -> Result<(), BackendError> {
        let (ledger, target, kernel) = (self.ledger.clone(), target.clone(), self.config.kernel);
        blocking(move || {
            let list = ledger.list(&target);
            if !list.is_in_use() {
                teardown::undo(&list, 0, kernel)?;
            }
            list.begin()
        })
        .await
    }

    /// Tries a part of a mount until it is not busy. A failed attempt undoes its own steps.
    async fn attempt(
        &self,
        target: &Target,
        attempt: impl Fn(&UndoList<'_>) -> Result<(), BackendError> + Clone + Send + 'static,
    ) -> Result<(), BackendError> {
        let (ledger, target, kernel) = (self.ledger.clone(), target.clone(), self.config.kernel);
        let attempt = move || {
            let list = ledger.list(&target);
            let first = list.steps().len();
            attempt(&list).map_err(|error| match teardown::undo(&list, first, kernel) {
                // Only an attempt of which nothing is left can be repeated.
                Err(left) if error.kind() == ErrorKind::Busy => uncertain(&error, &left),
                _ => error,
            })
        };
        retry_while_busy(self.config.busy_timeout, attempt).await
    }

    /// Undoes what was made of a mount that has failed, and says so if it cannot be undone.
    async fn end(
        &self,
        target: &Target,
        done: Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let Err(error) = done else { return Ok(()) };
        Err(match self.undo(target).await {
            Ok(()) => error,
            Err(left) => uncertain(&error, &left),
        })
    }

    async fn grow(&self, target: &Target, bytes: u64) -> Result<(), BackendError> {
        let kernel = self.config.kernel;
        let deadline = Instant::now() + self.config.device_timeout;
        let (ledger, at) = (self.ledger.clone(), target.clone());
        let find = move || volume::to_grow(&ledger.list(&at), kernel);
        let ToGrow { disk, crypt } = blocking(find).await?;
        let bytes = volume::await_size(disk, bytes, deadline).await?;
        let (ledger, at) = (self.ledger.clone(), target.clone());
        blocking(move || {
            let list = ledger.list(&at);
            if let Some(step) = crypt {
                crypt::grow(&list, &step, bytes)?;
            }
            volume::grow(&list, kernel)
        })
        .await
    }

    async fn unmount(&self, target: &Target) -> Result<(), BackendError> {
        let (ledger, at) = (self.ledger.clone(), target.clone());
        blocking(move || match ledger.list(&at).is_in_use() {
            true => Ok(()),
            false if expose::is_taken(&at) => Err(BackendError::conflict(format!(
                "cannot remove {}: somebody else made it",
                at.path().display()
            ))),
            false => unmount::refuse_foreign(&at),
        })
        .await?;
        self.undo(target).await
    }

    /// Undoes what is on the list of a target, for as long as a step may be busy.
    async fn undo(&self, target: &Target) -> Result<(), BackendError> {
        let (ledger, at, kernel) = (self.ledger.clone(), target.clone(), self.config.kernel);
        let attempt = move || teardown::undo_all(&ledger.list(&at), kernel);
        match retry_while_busy(self.config.busy_timeout, attempt).await {
            Err(error) if error.kind() == ErrorKind::Busy => {
                let (ledger, at) = (self.ledger.clone(), target.clone());
                blocking(move || Err(teardown::name_users(&ledger.list(&at), error))).await
            }
            done => done,
        }
    }
}

fn uncertain(error: &BackendError, left: &BackendError) -> BackendError {
    BackendError::uncertain(format!("{}, and {}", error.message(), left.message()))
}
