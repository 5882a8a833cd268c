//! Mounts: devices that are mounted in the guest, shared by all callers that request the same.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::info_span;

use crate::attach::Attachment;
use crate::call::{call, call_down};
use crate::lease::{Driver, Lease, Table};
use crate::release::{Releasing, nothing_to_release};
use crate::target::{Claim, Claims};
use crate::{
    BackendError, DEFAULT_TIMEOUT, DeviceLocator, Disk, DiskId, Drained, Error, MountOptions,
    MountRequest, Mounter, ReleaseError, Step,
};

/// Mounts each device once for each set of options, shares the mount between all callers that request it,
/// and unmounts with the last.
///
/// It knows no transport: a device is a [`DeviceLocator`], and whether the [`Mounter`] works on this
/// machine or sends the request to a guest makes no difference.
///
/// Two requests with equal locator and options are one mount, wherever the first one requested it: the
/// second caller gets the first one's path. A path that is taken, or that lies above or below one
/// that is, is a `Conflict`; so are options that the device cannot have beside those it is mounted with
/// ([`MountOptions::is_compatible_with`]).
///
/// Cloning is cheap, and clones are the same manager.
#[derive(Clone)]
pub struct BlockMountManager {
    table: Arc<Table<Mounting>>,
}

/// One share of a mounted device. While a mount exists, so does the attachment under it.
///
/// [`release`](Self::release) it to hear how the tear-down went. Dropping it releases it in the
/// background, where an error can only be logged.
#[must_use = "dropping a mount releases it in the background, where an error is only logged"]
pub struct Mount {
    lease: Lease<Mounting>,
}

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
        Self::with_claims(Box::new(mounter), Claims::new(root.into()), DEFAULT_TIMEOUT)
    }

    pub(crate) fn with_claims(
        mounter: Box<dyn Mounter>,
        claims: Claims,
        timeout: Duration,
    ) -> Self {
        let driver = Mounting { mounter, claims };
        BlockMountManager {
            table: Table::new(driver, timeout),
        }
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
        let locator = attachment.locator().clone();
        self.acquire(locator, Some(attachment), request).await
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
        self.acquire(device.clone(), None, request).await
    }

    async fn acquire(
        &self,
        locator: DeviceLocator,
        attachment: Option<Attachment>,
        request: &MountRequest,
    ) -> Result<Mount, Error> {
        if let Some(attachment) = &attachment {
            ensure_writable(attachment.disk(), request)?;
        }
        let options = request.options().clone();
        let key = Key { locator, options };
        let lease = match self.table.join(&key, |up| up.check(attachment.as_ref())) {
            Some(joined) => joined?,
            None => {
                let job = MountJob {
                    attachment,
                    target: request.target().map(Box::from),
                    claim: None,
                };
                self.table.acquire(key, job).await?
            }
        };
        Ok(Mount { lease })
    }

    /// Shares the mount of a disk that is attached, if there is one, in place of an attachment first
    /// and a mount then.
    pub(crate) fn join(
        &self,
        id: &DiskId,
        locator: DeviceLocator,
        request: &MountRequest,
    ) -> Option<Mount> {
        let options = request.options().clone();
        let lease = self
            .table
            .join(&Key { locator, options }, |_| Ok(()))?
            .ok()?;
        // Another disk may have this locator by now; the mount says which disk it is of.
        (lease.resource().keeps.as_ref() == Some(id)).then_some(Mount { lease })
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
        &self.lease.resource().point
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
        self.lease.release()
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

/// Mounting, as the lease table sees it.
struct Mounting {
    mounter: Box<dyn Mounter>,
    claims: Claims,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    locator: DeviceLocator,
    options: MountOptions,
}

struct MountJob {
    /// Held by the entry, not by the leases: whatever happens to them, the disk stays attached until
    /// it is unmounted.
    attachment: Option<Attachment>,
    target: Option<Box<Path>>,
    claim: Option<Claim>,
}

struct Mounted {
    point: MountPoint,
    /// The disk that the entry keeps attached; none if it was attached without this manager.
    keeps: Option<DiskId>,
}

impl Mounted {
    /// A caller with an attachment relies on the mount to be of that disk and to keep it attached.
    fn check(&self, attachment: Option<&Attachment>) -> Result<(), Error> {
        let taken = match (attachment, &self.keeps) {
            (None, _) => return Ok(()),
            (Some(attachment), Some(kept)) if attachment.id() == kept => return Ok(()),
            (Some(_), Some(_)) => "another disk with this locator is mounted; locators are unique",
            (Some(_), None) => "the device is mounted for a caller that attached it elsewhere",
        };
        Err(self.point.error(Step::Mount, BackendError::conflict(taken)))
    }
}

impl MountPoint {
    fn error(&self, step: Step, cause: BackendError) -> Error {
        Error::new(step, cause)
            .on_device(&self.locator)
            .on_path(&self.path)
    }
}

impl MountJob {
    /// The error, with everything that is known about the job.
    fn explain(&self, device: &DeviceLocator, error: Error) -> Error {
        let error = error.on_device(device);
        let error = match &self.attachment {
            Some(attachment) => error.on_disk(attachment.disk()),
            None => error,
        };
        let claimed = self.claim.as_ref().map(|claim| &**claim.target());
        match claimed.or(self.target.as_deref()) {
            Some(target) => error.on_path(target),
            None => error,
        }
    }
}

impl Driver for Mounting {
    type Key = Key;
    type Job = MountJob;
    type Resource = Mounted;

    async fn setup(&self, key: &Key, job: &mut MountJob) -> Result<Mounted, Error> {
        let Key { locator, options } = key;
        let claim = self.claims.mount(locator, options, job.target.as_deref());
        let claim = claim.map_err(|cause| job.explain(locator, Error::new(Step::Mount, cause)))?;
        let path = Arc::clone(job.claim.insert(claim).target());
        let span = info_span!("mount", %locator, path = %path.display());
        let outcome = call(
            Step::Mount,
            span,
            self.mounter.mount(locator, &path, options),
        )
        .await;
        outcome.map_err(|error| job.explain(locator, error))?;
        let locator = locator.clone();
        Ok(Mounted {
            point: MountPoint { path, locator },
            keeps: job
                .attachment
                .as_ref()
                .map(|attachment| attachment.id().clone()),
        })
    }

    async fn teardown(&self, key: &Key, job: &mut MountJob) -> Result<(), Error> {
        let Some(claim) = &job.claim else {
            return Ok(());
        };
        let (locator, target) = (&key.locator, claim.target());
        let span = info_span!("unmount", %locator, path = %target.display());
        let outcome = call_down(Step::Unmount, span, self.mounter.unmount(target)).await;
        outcome.map_err(|error| job.explain(locator, error))
    }

    fn release_held(&self, job: MountJob) -> Releasing {
        drop(job.claim);
        match job.attachment {
            Some(attachment) => attachment.releasing(),
            None => nothing_to_release(),
        }
    }

    fn check(&self, up: &Mounted, wanted: &MountJob) -> Result<(), Error> {
        up.check(wanted.attachment.as_ref())
    }

    fn error(&self, key: &Key, up: Option<&Mounted>, cause: BackendError) -> Error {
        match up {
            Some(up) => up.point.error(Step::Unmount, cause),
            None => Error::new(Step::Mount, cause).on_device(&key.locator),
        }
    }
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
