//! The whole way: from a disk of the host to files in the guest, and back.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;

use crate::attach::give_back;
use crate::holders::Holders;
use crate::lease::{Table, Tables};
use crate::mount::ensure_writable;
use crate::stack::{Combining, combine, release_all, reserve};
use crate::target::Claims;
use crate::transports::Transports;
use crate::{
    AttachManager, Attachment, BackendError, BlockMountManager, DeviceLocator, Disk, DiskId, Error,
    HolderName, LayerCombiner, Mount, MountOptions, MountRequest, Mounter, Overlay, Presence,
    Stack, StackRequest, Transport, Turns, Unplugger, Usage,
};

/// How long a caller waits for one answer unless it says otherwise: five minutes, as long as the bridge
/// of Hyper-V's guests waits for a reply. Backends bound their waits themselves, and well below this.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// Disks in, mounts out: attaches a disk to the VM, mounts it in the guest, shares both between all callers
/// that request the same, and takes it out again exactly once, whatever fails on the way.
///
/// It is thin: an [`AttachManager`] and a [`BlockMountManager`] in a row, and overlays on top. Cloning is
/// cheap, and clones are the same manager.
///
/// Before the runtime ends, [`drain`](Self::drain) the manager: what was dropped is torn down in
/// the background, and a background needs a runtime.
#[derive(Clone)]
pub struct Manager {
    attachments: AttachManager,
    mounts: BlockMountManager,
    pub(crate) stacks: Arc<Table<Combining>>,
    pub(crate) resizing: Arc<Turns<DiskId>>,
}

/// Puts a [`Manager`] together from backends.
#[must_use]
pub struct ManagerBuilder {
    transports: Vec<Box<dyn Transport>>,
    unplugger: Option<Box<dyn Unplugger>>,
    mounter: Option<Box<dyn Mounter>>,
    combiner: Box<dyn LayerCombiner>,
    mount_root: PathBuf,
    timeout: Duration,
}

/// What [`Manager::drain`] found.
#[derive(Debug, Clone)]
#[must_use = "what failed is still there"]
#[non_exhaustive]
pub struct Drained {
    /// The errors of the tear-downs that failed once more, and are still pending. One of [`Step::Record`](crate::Step::Record)
    /// is about the journal alone, which could not be told yet of what is torn down.
    pub failed: Vec<Error>,
    /// How many attachments, mounts and stacks are up, because callers hold them.
    pub in_use: usize,
}

impl Drained {
    /// Whether nothing is left at all.
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty() && self.in_use == 0
    }
}

impl Manager {
    /// Starts with nothing: a manager needs at least a transport, and a mounter to mount.
    pub fn builder() -> ManagerBuilder {
        ManagerBuilder {
            transports: Vec::new(),
            unplugger: None,
            mounter: None,
            combiner: Box::new(Missing("a combiner")),
            mount_root: PathBuf::from("/run/mounts/blockmount"),
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Attaches a disk without mounting it, or shares the attachment if there is one.
    ///
    /// # Errors
    ///
    /// As for [`AttachManager::attach`].
    ///
    /// # Cancel safety
    ///
    /// As for [`AttachManager::attach`].
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn attach(&self, disk: &Disk) -> Result<Attachment, Error> {
        self.attachments.attach(disk).await
    }

    /// As [`attach`](Self::attach), for a holder who comes back for it after a restart.
    ///
    /// # Errors
    ///
    /// As for [`AttachManager::attach_held_by`].
    ///
    /// # Cancel safety
    ///
    /// As for [`AttachManager::attach`].
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn attach_held_by(
        &self,
        disk: &Disk,
        name: &HolderName,
    ) -> Result<Attachment, Error> {
        self.attachments.attach_held_by(disk, name).await
    }

    /// Attaches a disk and mounts it, or shares what there is.
    ///
    /// # Errors
    ///
    /// Those of [`AttachManager::attach`] and [`BlockMountManager::mount`]. After an error nothing is
    /// left for this caller: a disk that was attached and could not be mounted is detached.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; what is under way is finished and taken back in the
    /// background.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn add(&self, disk: &Disk, request: &MountRequest) -> Result<Mount, Error> {
        let _running = self.mounts.enter()?;
        self.add_running(disk, request).await
    }

    async fn add_running(&self, disk: &Disk, request: &MountRequest) -> Result<Mount, Error> {
        ensure_writable(disk, request)?;
        let holder = self.mounts.reserve(request)?;
        let id = self.attachments.identify(disk).await?;
        if holder.is_none()
            && let Some(locator) = self.attachments.peek(&id, disk)
            && let Some(mount) = self.mounts.join(&id, locator, request)
        {
            return Ok(mount);
        }
        let attachment = self.attachments.attach_identified(id, disk).await?;
        self.mounts.mount_for(holder, attachment, request).await
    }

    /// Adds all layers of a stack at once, and stacks them as an overlay: all or nothing.
    ///
    /// # Errors
    ///
    /// The error of the topmost layer that failed, or that of the overlay (`Conflict` if the target is taken). After
    /// an error nothing is left for this caller; what could not be torn down is logged and
    /// pending until the next [`drain`](Self::drain).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; what is under way is finished and taken back in the
    /// background.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn stack(&self, request: &StackRequest) -> Result<Stack, Error> {
        request.validate()?;
        let _running = self.mounts.enter()?;
        let ask = || self.stack_running(request);
        self.mounts.tables.clearing(ask).await
    }

    async fn stack_running(&self, request: &StackRequest) -> Result<Stack, Error> {
        let holder = reserve(&self.stacks, request)?;
        // All in this one future: dropping it cancels all of them at once.
        let adding = request
            .disks()
            .map(|(disk, mount)| self.add_running(disk, mount));
        let (mut mounts, mut first_error) = (Vec::new(), None);
        for added in join_all(adding).await {
            match added {
                Ok(mount) => mounts.push(mount),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        if let Some(error) = first_error {
            give_back(release_all(mounts)).await;
            return Err(error);
        }
        combine(&self.stacks, holder, request, mounts).await
    }

    pub(crate) fn holders(&self) -> &Holders {
        self.mounts.holders()
    }

    /// The manager of the attachments.
    pub fn attachments(&self) -> &AttachManager {
        &self.attachments
    }

    /// The manager of the mounts.
    pub fn mounts(&self) -> &BlockMountManager {
        &self.mounts
    }

    /// Retries all pending tear-downs: failed releases, dropped handles, uncertain set-ups.
    ///
    /// Everything that was released, dropped or given up before this is called is down when it
    /// returns, or reported. What others hold stays.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-downs.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn drain(&self) -> Drained {
        // From the top down: each step releases what the next one tears down.
        let mut failed = self.stacks.drain().await;
        let mut in_use = self.stacks.up(|_| ()).len();
        for drained in [self.mounts.drain().await, self.attachments.drain().await] {
            failed.extend(drained.failed);
            in_use += drained.in_use;
        }
        failed.extend(self.holders().records().catch_up().err());
        Drained { failed, in_use }
    }
}

impl ManagerBuilder {
    /// Adds a transport after those that are there. They are tried in order: one that answers
    /// `Unsuitable` or `Full` passes the disk on.
    pub fn transport(mut self, transport: impl Transport) -> Self {
        self.transports.push(Box::new(transport));
        self
    }

    /// Unplugs devices in the guest before the host detaches them. A manager without one only attaches, and
    /// a detach is the host's alone ([`AttachManager::without_unplugger`]): it refuses to mount.
    pub fn unplugger(mut self, unplugger: impl Unplugger) -> Self {
        self.unplugger = Some(Box::new(unplugger));
        self
    }

    /// Mounts devices in the guest. A manager without one can only attach.
    pub fn mounter(mut self, mounter: impl Mounter) -> Self {
        self.mounter = Some(Box::new(mounter));
        self
    }

    /// Stacks layers as an overlay. A manager without one makes no stacks.
    pub fn combiner(mut self, combiner: impl LayerCombiner) -> Self {
        self.combiner = Box::new(combiner);
        self
    }

    /// Where paths are made up for mounts that name none; an absolute path in the guest. Two managers
    /// of one guest need two roots. Default: `/run/mounts/blockmount`.
    pub fn mount_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.mount_root = root.into();
        self
    }

    /// How long a caller waits for one answer before it gets `Uncertain`; what it waits for goes on.
    /// Default: [`DEFAULT_TIMEOUT`].
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The manager, without a journal: what it does is forgotten when its process ends. With one it is made by
    /// [`recover`](Self::recover).
    pub fn build(self) -> Manager {
        self.build_with(Holders::default())
    }

    pub(crate) fn build_with(self, holders: Holders) -> Manager {
        let ManagerBuilder {
            mut transports,
            unplugger,
            mounter,
            combiner,
            mount_root,
            timeout,
        } = self;
        let only = if transports.len() == 1 {
            transports.pop()
        } else {
            None
        };
        let transport: Box<dyn Transport> = match only {
            Some(only) => only,
            None => Box::new(Transports::new(transports)),
        };
        let mounter: Box<dyn Mounter> = match (mounter, &unplugger) {
            (Some(mounter), Some(_)) => mounter,
            (None, _) => Box::new(Missing("a mounter")),
            // What is mounted must be unplugged before it is detached.
            (Some(_), None) => Box::new(Missing("an unplugger")),
        };
        let claims = Claims::new(mount_root);
        let combining = Combining::new(combiner, claims.clone(), holders.clone());
        let mut manager = Manager {
            attachments: AttachManager::with_holders(
                transport,
                unplugger,
                timeout,
                holders.clone(),
            ),
            mounts: BlockMountManager::with_claims(mounter, claims, timeout, holders),
            stacks: Table::new(combining, timeout),
            resizing: Arc::default(),
        };
        let (mounts, attachments) = (&manager.mounts.tables, &manager.attachments.tables);
        let all = attachments
            .below(mounts)
            .below(&Tables::one(&manager.stacks));
        manager.mounts.tables = all.clone();
        manager.attachments.tables = all;
        manager
    }
}

/// Stands where the builder was given nothing.
struct Missing(&'static str);

impl Missing {
    fn refuse(&self) -> BackendError {
        BackendError::unsuitable(format!("the manager was built without {}", self.0))
    }
}

#[async_trait]
impl Mounter for Missing {
    async fn mount(
        &self,
        _: &DeviceLocator,
        _: &std::path::Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn unmount(&self, _: &std::path::Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn usage(&self, _: &std::path::Path) -> Result<Usage, BackendError> {
        Err(self.refuse())
    }

    async fn trim(&self, _: &std::path::Path) -> Result<u64, BackendError> {
        Err(self.refuse())
    }

    async fn grow(&self, _: &std::path::Path, _: u64) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &std::path::Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Err(self.refuse())
    }
}

#[async_trait]
impl LayerCombiner for Missing {
    async fn combine(&self, _: &Overlay) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn separate(&self, _: &std::path::Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn adopt(&self, _: &Overlay) -> Result<Presence, BackendError> {
        Err(self.refuse())
    }
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager")
            .field("attachments", &self.attachments)
            .field("mounts", &self.mounts)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ManagerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagerBuilder")
            .field("transports", &self.transports.len())
            .field("mount_root", &self.mount_root)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
