//! The whole way: from a disk of the host to files in the guest, and back.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};

use crate::call::Asked;
use crate::holders::{Holder, Holders};
use crate::inspect::Observed;
use crate::lease::Table;
use crate::mount::ensure_writable;
use crate::release::give_back;
use crate::stack::{Combining, combine, release_all, reserve};
use crate::view::{self, Viewing};
use crate::{
    AttachManager, Attachment, BlockMountManager, DeviceLocator, Disk, DiskId, Error, ExtraDisk,
    HolderName, Mount, MountRequest, Stack, StackRequest, Turns, View, ViewRequest, Viewable,
};

mod builder;
mod missing;

pub use builder::ManagerBuilder;

/// How long a caller waits for one answer unless it says otherwise: five minutes, as long as the bridge
/// of Hyper-V's guests waits for a reply. Backends bound their waits themselves, and well below this.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// Disks in, mounts out: attaches a disk to the VM, mounts it in the guest, shares both between all callers
/// that request the same, and takes it out again exactly once, whatever fails on the way.
///
/// It is thin: an [`AttachManager`] and a [`BlockMountManager`] in a row, and overlays and views on top. Cloning is
/// cheap, and clones are the same manager.
///
/// Before the runtime ends, [`drain`](Self::drain) the manager: what was dropped is torn down in
/// the background, and a background needs a runtime.
#[derive(Clone)]
pub struct Manager {
    attachments: AttachManager,
    mounts: BlockMountManager,
    pub(crate) stacks: Arc<Table<Combining>>,
    pub(crate) views: Arc<Table<Viewing>>,
    pub(crate) resizing: Arc<Turns<DiskId>>,
    pub(crate) observed: Arc<Observed>,
}

/// How far an [`add`](Manager::add) has come at once.
enum Adding<'a> {
    Shared(Mount),
    New(Option<Holder>, Asked<'a, DiskId>),
}

/// What [`Manager::drain`] found.
#[derive(Debug, Clone)]
#[must_use = "what failed is still there"]
#[non_exhaustive]
pub struct Drained {
    /// The errors of the tear-downs that failed once more, and are still pending. One of [`Step::Record`](crate::Step::Record)
    /// is about the journal alone, which could not be told yet of what is torn down.
    pub failed: Vec<Error>,
    /// How many attachments, mounts, views and stacks are up, because callers hold them.
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
        ManagerBuilder::default()
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

    /// Attaches a disk and mounts it, or shares what there is. The further [devices](MountRequest::devices) of its filesystem
    /// are attached with it, all or nothing.
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
        // As in `add_running`, without one more future to go through where the mount is shared.
        match self.begin_add(disk, request)? {
            Adding::Shared(mount) => Ok(mount),
            Adding::New(holder, id) => self.add_new(holder, id, disk, request).await,
        }
    }

    async fn add_running(&self, disk: &Disk, request: &MountRequest) -> Result<Mount, Error> {
        match self.begin_add(disk, request)? {
            Adding::Shared(mount) => Ok(mount),
            Adding::New(holder, id) => self.add_new(holder, id, disk, request).await,
        }
    }

    /// What needs no wait: nearly all that there is to do where the disk is mounted already. No future has to be made for it,
    /// and nothing be moved into one.
    fn begin_add<'a>(
        &'a self,
        disk: &'a Disk,
        request: &MountRequest,
    ) -> Result<Adding<'a>, Error> {
        ensure_writable(disk, request)?;
        let holder = self.mounts.reserve(request)?;
        let asked = self.attachments.ask_id(disk);
        if let Asked::Over(Ok(id)) = &asked
            && let Some(mount) = self.share(id, disk, request, holder.as_ref())
        {
            return Ok(Adding::Shared(mount));
        }
        Ok(Adding::New(holder, asked))
    }

    /// A share of the mount of a disk, if there is one, in place of an attachment first and a mount then.
    fn share(
        &self,
        id: &DiskId,
        disk: &Disk,
        request: &MountRequest,
        holder: Option<&Holder>,
    ) -> Option<Mount> {
        if holder.is_some() || !request.devices().is_empty() {
            return None;
        }
        let find = |locator: &DeviceLocator| self.mounts.find(locator, request.options());
        let found = self.attachments.peek(id, disk, find)??;
        self.mounts.join(found, id)
    }

    async fn add_new(
        &self,
        holder: Option<Holder>,
        id: Asked<'_, DiskId>,
        disk: &Disk,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let has_waited = matches!(id, Asked::Waits(_));
        let id = self.attachments.identified(id, disk).await?;
        if has_waited && let Some(mount) = self.share(&id, disk, request, holder.as_ref()) {
            return Ok(mount);
        }
        let (attachment, devices) = match request.devices() {
            [] => (
                self.attachments.attach_identified(id, disk).await?,
                Vec::new(),
            ),
            // Boxed, since few have any.
            _ => Box::pin(self.attach_together(id, disk, request)).await?,
        };
        self.mounts
            .mount_for(holder, attachment, devices, request)
            .await
    }

    /// Attaches all disks of a mount at once: all or nothing.
    async fn attach_together(
        &self,
        id: DiskId,
        disk: &Disk,
        request: &MountRequest,
    ) -> Result<(Attachment, Vec<Attachment>), Error> {
        let mounted = self.attachments.attach_identified(id, disk);
        let attach = async |device: &ExtraDisk| {
            ensure_writable(&device.disk, request)?;
            let id = self.attachments.identify(&device.disk).await?;
            self.attachments.attach_identified(id, &device.disk).await
        };
        let devices = join_all(request.devices().iter().map(attach));
        // All in this one future: dropping it cancels all of them at once.
        let (mounted, devices) = join(mounted, devices).await;
        let (mut attached, mut first_error) = (Vec::new(), None);
        for device in devices {
            match device {
                Ok(device) => attached.push(device),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        let error = match (mounted, first_error) {
            (Ok(mounted), None) => return Ok((mounted, attached)),
            (Err(error), _) => error,
            (Ok(mounted), Some(error)) => {
                attached.push(mounted);
                error
            }
        };
        for attachment in attached {
            give_back(attachment.releasing_now()).await;
        }
        Err(error)
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
            let mounts = mounts.into_iter().map(Mount::releasing_now);
            give_back(release_all(mounts)).await;
            return Err(error);
        }
        combine(&self.stacks, holder, request, mounts).await
    }

    /// Shows a mount, or the tree of a stack, at a further place, with options of its own, or shares the view that is there.
    ///
    /// The view has a share of what it shows, so whoever has the view needs no share besides. Two requests for the same view
    /// at one target share it; another view there is a `Conflict`.
    ///
    /// # Errors
    ///
    /// What the binder answers, by [kind](crate::ErrorKind): `NotFound` if the mount has no such directory, `Unsuitable` for
    /// what the guest's kernel cannot do. `Conflict` if the target is taken, or lies above or below one that is. After an
    /// error nothing is left for this caller, who has what was to be shown as before.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; what is under way is finished and taken back in the
    /// background.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn view<'a>(
        &self,
        of: impl Into<Viewable<'a>>,
        request: &ViewRequest,
    ) -> Result<View, Error> {
        let of = of.into();
        let _running = self.mounts.enter()?;
        let ask = || view::view(&self.views, of, request);
        self.mounts.tables.clearing(ask).await
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
        let mut failed = self.views.drain().await;
        failed.extend(self.stacks.drain().await);
        let mut in_use = self.views.up(|_| ()).len() + self.stacks.up(|_| ()).len();
        for drained in [self.mounts.drain().await, self.attachments.drain().await] {
            failed.extend(drained.failed);
            in_use += drained.in_use;
        }
        failed.extend(self.holders().records().catch_up().err());
        Drained { failed, in_use }
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
