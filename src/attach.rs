//! Attachments: disks that are visible to the VM, shared by all callers that request the same.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use dashmap::mapref::entry::Entry;
use dashmap::{DashMap, DashSet};
use foldhash::fast::RandomState;
use tracing::info_span;

use crate::call::{LostWrites, call, call_down, catch_panic, within};
use crate::lease::{Driver, Lease, Table};
use crate::release::{Releasing, nothing_to_release};
use crate::{
    BackendError, DEFAULT_TIMEOUT, DeviceLocator, Disk, DiskId, Drained, Error, ReleaseError, Step,
    Transport, Unplugger,
};

/// Attaches each disk once, shares it between all callers that request it, and detaches it with the last.
///
/// Two requests are for the same disk if the transport says so ([`Transport::identify`]), whatever
/// names they use. The same disk read-only and read-write at once is a `Conflict`; so is another disk
/// under the name of one that is attached (an image that was replaced).
///
/// Tear-down unplugs the device in the guest ([`Unplugger::unplug`]), then detaches it on the host. The next
/// attempt begins at the step that failed.
///
/// Cloning is cheap, and clones are the same manager.
#[derive(Clone)]
pub struct AttachManager {
    table: Arc<Table<Attach>>,
}

/// One share of an attached disk. An attachment alone mounts nothing and unmounts nothing.
///
/// [`release`](Self::release) it to hear how the tear-down went. Dropping it releases it in the
/// background, where an error can only be logged.
#[must_use = "dropping an attachment releases it in the background, where an error is only logged"]
pub struct Attachment {
    lease: Lease<Attach>,
}

impl AttachManager {
    /// A manager that waits for one answer at most [`DEFAULT_TIMEOUT`].
    pub fn new(transport: impl Transport, unplugger: impl Unplugger) -> Self {
        let unplugger: Box<dyn Unplugger> = Box::new(unplugger);
        Self::with_timeout(Box::new(transport), Some(unplugger), DEFAULT_TIMEOUT)
    }

    /// The same for disks that nothing in the guest has to be told of: a detach is the host's alone. The
    /// caller makes sure that the guest no longer uses a disk before it releases it.
    pub fn without_unplugger(transport: impl Transport) -> Self {
        Self::with_timeout(Box::new(transport), None, DEFAULT_TIMEOUT)
    }

    pub(crate) fn with_timeout(
        transport: Box<dyn Transport>,
        unplugger: Option<Box<dyn Unplugger>>,
        timeout: Duration,
    ) -> Self {
        let driver = Attach {
            transport,
            unplugger,
            sources: DashSet::default(),
            locators: DashMap::default(),
        };
        AttachManager {
            table: Table::new(driver, timeout),
        }
    }

    /// Attaches a disk, or shares it if it is attached already.
    ///
    /// # Errors
    ///
    /// What the transport answers, by [kind](crate::ErrorKind); all callers that waited for one attempt get
    /// its outcome. After an error nothing is attached for this caller; what is `Uncertain`
    /// has been torn down, or is before the disk is attached again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait. An attachment that is under way is finished and, unless
    /// another caller waits for it, torn down in the background.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn attach(&self, disk: &Disk) -> Result<Attachment, Error> {
        let id = self.identify(disk).await?;
        self.attach_identified(id, disk).await
    }

    /// Called for every request, also for disks that are up: no span, no task, no timer unless it waits.
    pub(crate) async fn identify(&self, disk: &Disk) -> Result<DiskId, Error> {
        let identify = catch_panic(self.table.driver().transport.identify(disk));
        let id = within(self.table.timeout(), identify).await;
        let id = id.unwrap_or_else(|| Err(self.table.timed_out()));
        id.map_err(|cause| Error::new(Step::Identify, cause).on_disk(disk))
    }

    pub(crate) async fn attach_identified(
        &self,
        id: DiskId,
        disk: &Disk,
    ) -> Result<Attachment, Error> {
        let lease = match self.table.join(&id, |up| up.check(disk)) {
            Some(joined) => joined?,
            None => {
                let lease = self.table.acquire(id, AttachJob::new(disk)).await;
                lease.map_err(|error| match error.disk() {
                    Some(_) => error,
                    None => error.on_disk(disk),
                })?
            }
        };
        Ok(Attachment { lease })
    }

    /// Where a disk is attached with the access and options of `disk`, if it is; nothing keeps it there.
    pub(crate) fn peek(&self, id: &DiskId, disk: &Disk) -> Option<DeviceLocator> {
        self.table
            .peek(id, |up| up.check(disk).is_ok().then(|| up.locator.clone()))?
    }

    /// Retries all pending tear-downs: failed releases, dropped leases, uncertain attachments.
    ///
    /// Every attachment that was released or dropped, and every [`attach`](Self::attach) that was given
    /// up, before this is called, is down when it returns, or reported.
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

    /// How many disks are attached and in use.
    pub fn in_use(&self) -> usize {
        self.table.up(|_| ()).len()
    }
}

impl Attachment {
    /// Where the device is.
    pub fn locator(&self) -> &DeviceLocator {
        &self.lease.resource().locator
    }

    pub(crate) fn id(&self) -> &DiskId {
        &self.lease.resource().id
    }

    /// The disk, as the first caller named it.
    pub fn disk(&self) -> &Disk {
        &self.lease.resource().disk
    }

    /// Releases this share. The last release unplugs the device in the guest and detaches it on the host.
    ///
    /// The share counts as released when this returns; the future waits for the tear-down.
    ///
    /// # Errors
    ///
    /// The step that failed; see [`ReleaseError`] for how to go on.
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

/// Attaching, as the lease table sees it.
struct Attach {
    transport: Box<dyn Transport>,
    /// None if nothing in the guest is to be told.
    unplugger: Option<Box<dyn Unplugger>>,
    /// The disks that are being attached or are attached, as they were named: a transport may rely on
    /// never being given two that are equal.
    sources: DashSet<Disk, RandomState>,
    /// The disk at each locator. Transports cannot know of each other's locators, and the guest goes by the
    /// locator alone.
    locators: DashMap<DeviceLocator, DiskId, RandomState>,
}

struct AttachJob {
    disk: Disk,
    /// Listed among the sources, until it is detached.
    listed: bool,
    /// Known once the attachment has succeeded.
    locator: Option<DeviceLocator>,
    /// The guest has unplugged the device.
    unplugged: bool,
    lost: LostWrites,
}

struct Attached {
    id: DiskId,
    disk: Disk,
    locator: DeviceLocator,
}

impl AttachJob {
    fn new(disk: &Disk) -> Self {
        AttachJob {
            disk: disk.clone(),
            listed: false,
            locator: None,
            unplugged: false,
            lost: LostWrites::default(),
        }
    }
}

impl Attached {
    /// All leases of a disk have the same access and options.
    fn check(&self, wanted: &Disk) -> Result<(), Error> {
        let (up, locator) = (&self.disk, &self.locator);
        let same_access = (wanted.kind(), wanted.is_read_only()) == (up.kind(), up.is_read_only());
        if same_access && wanted.options() == up.options() {
            return Ok(());
        }
        let taken = match same_access {
            false => format!("from {up}; one disk has one access for all"),
            true => format!(
                "with {:?}; one disk has one set of options for all",
                up.options()
            ),
        };
        let cause = BackendError::conflict(format!("it is attached as {locator} {taken}"));
        Err(Error::new(Step::Attach, cause).on_disk(wanted))
    }
}

impl Attach {
    /// False if another disk is at the locator.
    fn occupy(&self, locator: &DeviceLocator, id: &DiskId) -> bool {
        match self.locators.entry(locator.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(id.clone());
                true
            }
        }
    }

    async fn detach(&self, disk: &Disk) -> Result<(), Error> {
        let span = info_span!("detach", disk = %disk.source().display());
        let outcome = call_down(Step::Detach, span, self.transport.detach(disk)).await;
        outcome.map_err(|error| error.on_disk(disk))
    }

    /// Takes out a disk whose locator is another disk's. The guest was never told of it.
    async fn undo_second_at(&self, locator: &DeviceLocator, disk: &Disk) -> Error {
        let cause = match self.detach(disk).await {
            Ok(()) => BackendError::conflict(
                "its transport has given it the locator of another disk; the transports of one \
                 manager must not share locators",
            ),
            Err(left) => BackendError::uncertain(
                "its transport has given it the locator of another disk and cannot detach it",
            )
            .with_source(left),
        };
        let error = Error::new(Step::Attach, cause);
        error.on_disk(disk).on_device(locator)
    }
}

impl Driver for Attach {
    type Key = DiskId;
    type Job = AttachJob;
    type Resource = Attached;

    async fn setup(&self, id: &DiskId, job: &mut AttachJob) -> Result<Attached, Error> {
        let disk = &job.disk;
        if !self.sources.insert(disk.clone()) {
            let replaced = "another disk of that name is attached, so the image was replaced; \
                            release the old one first, or give the new one another name";
            let error = Error::new(Step::Attach, BackendError::conflict(replaced));
            return Err(error.on_disk(disk));
        }
        job.listed = true;
        let span = info_span!("attach", disk = %disk.source().display());
        let locator = call(Step::Attach, span, self.transport.attach(disk, id)).await;
        let locator = locator.map_err(|error| error.on_disk(disk))?;
        if !self.occupy(&locator, id) {
            return Err(self.undo_second_at(&locator, disk).await);
        }
        job.locator = Some(locator.clone());
        Ok(Attached {
            id: id.clone(),
            disk: disk.clone(),
            locator,
        })
    }

    async fn teardown(&self, id: &DiskId, job: &mut AttachJob) -> Result<(), Error> {
        let AttachJob {
            disk,
            locator,
            unplugged,
            lost,
            ..
        } = job;
        // Without a locator the attachment was uncertain, and the guest was never told of it.
        if let (Some(unplugger), Some(locator), false) = (&self.unplugger, &*locator, *unplugged) {
            let span = info_span!("unplug", disk = %disk.source().display(), %locator);
            let outcome = call_down(Step::Unplug, span, unplugger.unplug(locator)).await;
            lost.note(outcome.map_err(|error| error.on_disk(disk).on_device(locator)))?;
            *unplugged = true;
        }
        // Before the detach: the transport may give the locator to the next disk as soon as it answers.
        if let Some(locator) = locator {
            self.locators.remove_if(locator, |_, disk| disk == id);
        }
        let outcome = lost.note(self.detach(disk).await);
        outcome.map_err(|error| match locator {
            Some(locator) => {
                self.occupy(locator, id);
                error.on_device(locator)
            }
            None => error,
        })?;
        lost.report()
    }

    fn release_held(&self, job: AttachJob) -> Releasing {
        if job.listed {
            self.sources.remove(&job.disk);
        }
        nothing_to_release()
    }

    fn check(&self, up: &Attached, wanted: &AttachJob) -> Result<(), Error> {
        up.check(&wanted.disk)
    }

    fn error(&self, _: &DiskId, up: Option<&Attached>, cause: BackendError) -> Error {
        match up {
            Some(up) => Error::new(Step::Detach, cause)
                .on_disk(&up.disk)
                .on_device(&up.locator),
            None => Error::new(Step::Attach, cause),
        }
    }
}

impl fmt::Debug for AttachManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachManager")
            .field("in_use", &self.in_use())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Attached { disk, locator, .. } = self.lease.resource();
        f.debug_struct("Attachment")
            .field("disk", disk)
            .field("locator", locator)
            .finish()
    }
}
