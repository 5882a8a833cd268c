//! Mounts: devices that are mounted in the guest, shared by all callers that request the same.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::info_span;

use crate::attach::Attachment;
use crate::call::{Answer, call};
use crate::claims::Claims;
use crate::holders::{Holder, Holders, Running};
use crate::inspect::Timed;
use crate::journal::{MountKey, MountKeyParts, MountRecord, Record, RecordKey};
use crate::lease::{Lease, Left, Lingering, Table, Tables, Which};
use crate::named::Named;
use crate::release::{Releasing, give_back};
use crate::{
    BackendError, DEFAULT_TIMEOUT, DeviceLocator, Disk, DiskId, Drained, Error, MountOptions,
    MountRequest, Mounter, Presence, ReleaseError, Step, Usage,
};

mod attachments;
mod driver;
mod further;
mod inspect;

pub(crate) use attachments::Attachments;
pub(crate) use driver::Mounting;
use driver::{MountJob, Mounted};

/// Mounts each device once for each set of options, shares the mount between all callers that request it,
/// and unmounts with the last.
///
/// It knows no transport: a device is a [`DeviceLocator`], and whether the [`Mounter`] works on this
/// machine or sends the request to a guest makes no difference.
///
/// Two requests with equal locator and options are one mount, wherever the first one requested it: the
/// second caller gets the first one's path. A path that is taken, or that lies above or below one
/// that is, is a `Conflict`; so are options that the device cannot have beside those it is mounted with
/// ([`is_compatible_with`](crate::MountOptions::is_compatible_with)). If that may be because of a mount that is on its way
/// down, or whose tear-down is pending, that is torn down first, and the request is tried once more.
///
/// Cloning is cheap, and clones are the same manager.
#[derive(Clone)]
pub struct BlockMountManager {
    table: Arc<Table<Mounting>>,
    /// Its own, and those of what stands on mounts or is below them.
    pub(crate) tables: Tables,
}

/// One share of a mounted device. While a mount exists, so does the attachment under it.
///
/// [`release`](Self::release) it to hear how the tear-down went. Dropping it releases it in the
/// background, where an error can only be logged.
#[must_use = "dropping a mount releases it in the background, where an error is only logged"]
pub struct Mount(Named<Mounting>);

/// Where a device is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MountPoint {
    path: Arc<Path>,
    locator: DeviceLocator,
}

impl MountPoint {
    /// The path in the guest.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device.
    pub fn locator(&self) -> &DeviceLocator {
        &self.locator
    }
}

impl BlockMountManager {
    /// A manager that makes up paths below `root` (an absolute path in the guest) where none is
    /// requested, and waits for one answer at most [`DEFAULT_TIMEOUT`].
    pub fn new(mounter: impl Mounter, root: impl Into<PathBuf>) -> Self {
        let (claims, holders) = (Claims::new(root.into()), Holders::default());
        let lingering = Lingering::default();
        Self::with_claims(
            Timed::new(Box::new(mounter), &Arc::default()),
            claims,
            DEFAULT_TIMEOUT,
            holders,
            lingering,
        )
    }

    pub(crate) fn with_claims(
        mounter: Timed<dyn Mounter>,
        claims: Claims,
        timeout: Duration,
        holders: Holders,
        lingering: Lingering,
    ) -> Self {
        let driver = Mounting {
            mounter,
            claims,
            holders,
        };
        let table = Table::new(driver, lingering, timeout);
        let tables = Tables::one(&table);
        BlockMountManager { table, tables }
    }

    /// Mounts an attached disk, or shares the mount if there is one.
    ///
    /// The attachment is kept for as long as the mount lives, and is released after it: no disk is
    /// detached while it is mounted.
    ///
    /// # Errors
    ///
    /// What the mounter answers, by [kind](crate::ErrorKind); `Conflict` and `Invalid` for what this
    /// manager refuses itself. After an error nothing is mounted for this caller, and its attachment
    /// has been released.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait. A mount that is under way is finished and,
    /// unless another caller waits for it, torn down in the background, and the attachment with it.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn mount(
        &self,
        attachment: Attachment,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let _running = self.enter()?;
        let holder = self.reserve(request)?;
        self.mount_for(holder, attachment, Vec::new(), request)
            .await
    }

    /// Mounts an attached disk whose filesystem has further [devices](MountRequest::devices), or shares the mount if there
    /// is one. `devices` are the attachments of those, in the order of the request; all of them are kept for as long as
    /// the mount lives.
    ///
    /// # Errors
    ///
    /// As for [`mount`](Self::mount); `Invalid` if there are not as many attachments as the request has devices.
    ///
    /// # Cancel safety
    ///
    /// As for [`mount`](Self::mount).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn mount_with(
        &self,
        attachment: Attachment,
        devices: Vec<Attachment>,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let _running = self.enter()?;
        let holder = self.reserve(request)?;
        self.mount_for(holder, attachment, devices, request).await
    }

    /// The same for a holder that has its name already.
    pub(crate) async fn mount_for(
        &self,
        holder: Option<Holder>,
        attachment: Attachment,
        devices: Vec<Attachment>,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let locator = attachment.locator().clone();
        let under = Attachments::new(attachment, devices);
        self.acquire(holder, locator, under, request).await
    }

    /// Begins work that a freeze waits for.
    pub(crate) fn enter(&self) -> Result<Running<'_>, Error> {
        let running = self.holders().enter();
        running.map_err(|cause| Error::new(Step::Mount, cause))
    }

    pub(crate) fn holders(&self) -> &Holders {
        &self.table.driver().holders
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        self.table.records()
    }

    /// Takes the name that a request has.
    pub(crate) fn reserve(&self, request: &MountRequest) -> Result<Option<Holder>, Error> {
        let holders = &self.table.driver().holders;
        let reserved = request.holder().map(|name| holders.reserve(name));
        reserved
            .transpose()
            .map_err(|cause| Error::new(Step::Mount, cause))
    }

    /// Mounts a device that is attached without this manager and stays so, or shares the mount if there is
    /// one.
    ///
    /// # Errors
    ///
    /// As for [`mount`](Self::mount).
    ///
    /// # Cancel safety
    ///
    /// As for [`mount`](Self::mount).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn mount_device(
        &self,
        device: &DeviceLocator,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let _running = self.enter()?;
        let holder = self.reserve(request)?;
        let under = Attachments::default();
        self.acquire(holder, device.clone(), under, request).await
    }

    async fn acquire(
        &self,
        holder: Option<Holder>,
        device: DeviceLocator,
        mut under: Attachments,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        let lease = match self.lease(device, &mut under, request).await {
            Ok(lease) => {
                // The mount has a share of each, so none of these is the last.
                drop(under);
                lease
            }
            Err(error) => {
                give_back(under.releasing()).await;
                return Err(error);
            }
        };
        let key = |mount: &Named<Mounting>| RecordKey::Mount(mount.key().clone());
        let explain = |mount: &Named<Mounting>, error: Error| {
            let point = &mount.resource().point;
            error.on_device(point.locator()).on_path(point.path())
        };
        let mount = Named::from(lease).held_by(holder, key, explain).await;
        mount.map(Mount)
    }

    async fn lease(
        &self,
        device: DeviceLocator,
        under: &mut Attachments,
        request: &MountRequest,
    ) -> Result<Lease<Mounting>, Error> {
        under.ensure_writable(request)?;
        if request.devices().len() != under.devices.len() {
            let cause = BackendError::invalid(format!(
                "the request has {} further devices, and {} are attached for it",
                request.devices().len(),
                under.devices.len()
            ));
            return Err(Error::new(Step::Mount, cause).on_device(&device));
        }
        let options = under.place(request);
        let options = options.map_err(|error| error.on_device(&device))?;
        let key = MountKey::new(device, options);
        let ask = || self.mount_once(&key, under, request);
        self.tables.clearing(ask).await
    }

    async fn mount_once(
        &self,
        key: &MountKey,
        under: &Attachments,
        request: &MountRequest,
    ) -> Result<Lease<Mounting>, Error> {
        let check = |up: &Mounted| up.check(under);
        let job = || MountJob::new(under.again(), request.target());
        self.table.acquire(key, check, job).await
    }

    /// Asks the mounter whether a mount is there that the journal remembers.
    pub(crate) async fn adopt(&self, record: &MountRecord) -> Result<Presence, Error> {
        let (MountKey { device, options }, target) = (&record.key, &record.target);
        let span =
            info_span!("adopt", locator = %device, path = %crate::printable(target.display()));
        let adopt = || self.table.driver().mounter.adopt(device, target, options);
        let answer = self.table.adopt(&span, adopt).await;
        answer.map_err(|error| error.on_device(device).on_path(target))
    }

    /// Puts what a restart has left into the table; a share of it unless it is only to be torn down. With an error if it
    /// is refused, since it contradicts what was restored before.
    pub(crate) fn restore(
        &self,
        record: &MountRecord,
        under: Attachments,
        left: Left,
    ) -> (Option<Mount>, Option<Error>) {
        let (job, resource, error) = self.table.driver().restore(record, under, left);
        let lease = self.table.restore(record.key.clone(), job, resource);
        (lease.map(|lease| Mount(lease.into())), error)
    }

    /// The mount of a device that is or was up a moment ago.
    pub(crate) fn find(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
    ) -> Option<Which<Mounting>> {
        self.table.find(&MountKeyParts { device, options })
    }

    /// Shares a mount, if it is up and of a disk.
    pub(crate) fn join(&self, mount: Which<Mounting>, id: &DiskId) -> Option<Mount> {
        let up = mount.resource()?;
        // Another disk may have its locator by now; the mount says which disk it is of.
        let of = up.keeps.mounted.as_ref()?.key();
        let is_of_it = of == id && of.is_unchanged(id) && up.ensure_whole().is_ok();
        let lease = is_of_it.then(|| self.table.join(mount))??;
        Some(Mount(lease.into()))
    }

    /// A share of each mount of a device.
    pub(crate) fn shares_of(&self, device: &DeviceLocator) -> Vec<Mount> {
        let leases = self.table.shares(|up| up.point.locator() == device);
        let mount = |lease| Mount(Named::from(lease));
        leases.into_iter().map(mount).collect()
    }

    /// Grows what is mounted after its disk has grown.
    pub(crate) async fn grow(&self, mount: &Mount, bytes: u64) -> Result<(), Error> {
        let grow = || self.table.driver().mounter.grow(mount.path(), bytes);
        self.ask(Step::Grow, mount, grow).await
    }

    pub(crate) async fn usage(&self, mount: &Mount) -> Result<Usage, Error> {
        let usage = || self.table.driver().mounter.usage(mount.path());
        self.ask(Step::Usage, mount, usage).await
    }

    pub(crate) async fn trim(&self, mount: &Mount) -> Result<u64, Error> {
        let trim = || self.table.driver().mounter.trim(mount.path());
        self.ask(Step::Trim, mount, trim).await
    }

    /// A call about a mount that its caller has a share of.
    async fn ask<'a, T>(
        &self,
        step: Step,
        mount: &Mount,
        ask: impl FnOnce() -> Answer<'a, T>,
    ) -> Result<T, Error> {
        let span = info_span!("ask", %step, path = %crate::printable(mount.path().display()));
        let answer = call(step, &span, ask).await;
        answer.map_err(|error| error.on_device(mount.locator()).on_path(mount.path()))
    }

    /// Retries all pending tear-downs: failed releases, dropped leases, uncertain mounts, and the
    /// attachments under them.
    ///
    /// Every mount that was released or dropped, and every [`mount`](Self::mount) that was given up,
    /// before this is called, is down when it returns, or reported.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-downs.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn drain(&self) -> Drained {
        let failed = self.table.drain().await;
        Drained {
            failed,
            in_use: self.in_use(),
        }
    }

    /// Where devices are mounted and in use, in no particular order.
    pub fn mounts(&self) -> Vec<MountPoint> {
        self.table.up(|up| up.point.clone())
    }

    /// How many mounts are in use.
    pub fn in_use(&self) -> usize {
        self.table.up(|_| ()).len()
    }
}

impl Mount {
    /// The path in the guest. It differs from the requested one if the mount was there already.
    pub fn path(&self) -> &Path {
        self.point().path()
    }

    /// The device.
    pub fn locator(&self) -> &DeviceLocator {
        self.point().locator()
    }

    /// The path and the device.
    pub fn point(&self) -> &MountPoint {
        &self.0.resource().point
    }

    /// Releases this share. The last release unmounts the device and releases its attachment.
    ///
    /// The share counts as released when this returns; the future waits for the tear-down.
    ///
    /// # Errors
    ///
    /// The step that failed; see [`ReleaseError`] for how to go on. A mount that is `Busy` stays
    /// mounted and usable.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-down; an error is then logged.
    pub fn release(self) -> impl Future<Output = Result<(), ReleaseError>> + Send + 'static {
        self.releasing()
    }

    pub(crate) fn releasing(self) -> Releasing {
        self.0.releasing()
    }

    /// The same for one that must not linger.
    pub(crate) fn releasing_now(self) -> Releasing {
        self.0.releasing_now()
    }

    /// Leaves the device mounted, and its holder in the journal, for the next process.
    pub(crate) fn abandon(self) {
        self.0.abandon();
    }

    pub(crate) fn mount_key(&self) -> &MountKey {
        self.0.key()
    }

    pub(crate) fn key(&self) -> RecordKey {
        RecordKey::Mount(self.mount_key().clone())
    }

    /// One more share of it, for a holder or for what is above it.
    pub(crate) fn share(&self, holder: Option<Holder>) -> Self {
        Mount(self.0.share(holder))
    }
}

/// Refuses to mount for writing what the VM cannot write to.
pub(crate) fn ensure_writable(disk: &Disk, request: &MountRequest) -> Result<(), Error> {
    if request.options().is_read_only() || !disk.is_read_only() {
        return Ok(());
    }
    let cause =
        BackendError::invalid("a disk that is attached read-only can only be mounted read-only");
    Err(Error::new(Step::Mount, cause).on_disk(disk))
}

impl fmt::Debug for BlockMountManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockMountManager")
            .field("in_use", &self.in_use())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MountPoint { path, locator } = self.point();
        f.debug_struct("Mount")
            .field("path", path)
            .field("locator", locator)
            .finish()
    }
}
