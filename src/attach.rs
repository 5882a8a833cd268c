//! Attachments: disks that are visible to the VM, shared by all callers that request the same.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tracing::info_span;

use crate::call::{Asked, ask, call};
use crate::holders::{Holder, Holders};
use crate::inspect::{Latencies, Timed};
use crate::journal::{AttachmentRecord, Record, RecordKey};
use crate::lease::{Left, Lingering, Table, Tables, Which};
use crate::named::Named;
use crate::release::Releasing;
use crate::{
    DEFAULT_TIMEOUT, DeviceLocator, Disk, DiskId, Drained, Error, HolderName, Presence,
    ReleaseError, Step, Transport, Unplugger,
};

mod driver;
mod inspect;

pub(crate) use driver::Attach;
use driver::{AttachJob, Attached};

/// Attaches each disk once, shares it between all callers that request it, and detaches it with the last.
///
/// Two requests are for the same disk if the transport says so ([`Transport::identify`]), whatever
/// names they use. The same disk read-only and read-write at once is a `Conflict`; so is another disk
/// under the name of one that is attached (an image that was replaced).
///
/// Tear-down unplugs the device in the guest ([`Unplugger::unplug`]), then detaches it on the host. The next
/// attempt begins at the step that failed. A disk that meets no free slot, or a `Conflict`, waits for the tear-downs that
/// are under way or pending, and is tried once more.
///
/// Cloning is cheap, and clones are the same manager.
#[derive(Clone)]
pub struct AttachManager {
    table: Arc<Table<Attach>>,
    /// Its own, and those of what stands on attachments.
    pub(crate) tables: Tables,
}

/// One share of an attached disk. An attachment alone mounts nothing and unmounts nothing.
///
/// [`release`](Self::release) it to hear how the tear-down went. Dropping it releases it in the
/// background, where an error can only be logged.
#[must_use = "dropping an attachment releases it in the background, where an error is only logged"]
pub struct Attachment(Named<Attach>);

impl AttachManager {
    /// A manager that waits for one answer at most [`DEFAULT_TIMEOUT`].
    pub fn new(transport: impl Transport, unplugger: impl Unplugger) -> Self {
        Self::alone(Box::new(transport), Some(Box::new(unplugger)))
    }

    /// The same for disks that nothing in the guest has to be told of: a detach is the host's alone. The
    /// caller makes sure that the guest no longer uses a disk before it releases it.
    pub fn without_unplugger(transport: impl Transport) -> Self {
        Self::alone(Box::new(transport), None)
    }

    fn alone(transport: Box<dyn Transport>, unplugger: Option<Box<dyn Unplugger>>) -> Self {
        let latencies = Arc::<Latencies>::default();
        Self::with_holders(
            Timed::new(transport, &latencies),
            unplugger.map(|unplugger| Timed::new(unplugger, &latencies)),
            DEFAULT_TIMEOUT,
            Holders::default(),
            Lingering::default(),
        )
    }

    pub(crate) fn with_holders(
        transport: Timed<dyn Transport>,
        unplugger: Option<Timed<dyn Unplugger>>,
        timeout: Duration,
        holders: Holders,
        lingering: Lingering,
    ) -> Self {
        let driver = Attach::new(transport, unplugger, holders);
        let table = Table::new(driver, lingering, timeout);
        let tables = Tables::one(&table);
        AttachManager { table, tables }
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
        let running = self.table.driver().holders.enter();
        let _running = running.map_err(|cause| Error::new(Step::Attach, cause).on_disk(disk))?;
        let id = self.identify(disk).await?;
        self.attach_identified(id, disk).await
    }

    /// As [`attach`](Self::attach), for a holder who comes back for it after a restart
    /// ([`Recovery::claim`](crate::Recovery::claim)).
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach); `Conflict` if the name has a handle already.
    ///
    /// # Cancel safety
    ///
    /// As for [`attach`](Self::attach).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn attach_held_by(
        &self,
        disk: &Disk,
        name: &HolderName,
    ) -> Result<Attachment, Error> {
        let holder = self.table.driver().holders.reserve(name);
        let holder = holder.map_err(|cause| Error::new(Step::Attach, cause).on_disk(disk))?;
        let Attachment(attached) = self.attach(disk).await?;
        let key = |attached: &Named<Attach>| RecordKey::Attachment(attached.key().clone());
        let explain = |_: &Named<Attach>, error: Error| error.on_disk(disk);
        let held = attached.held_by(Some(holder), key, explain).await;
        held.map(Attachment)
    }

    /// Asks the transport whether a disk is there that the journal remembers.
    pub(crate) async fn adopt(
        &self,
        record: &AttachmentRecord,
    ) -> Result<Presence<DeviceLocator>, Error> {
        let AttachmentRecord {
            id, disk, locator, ..
        } = record;
        let span = info_span!("adopt", disk = %crate::printable(disk.source().display()));
        let transport = &self.table.driver().transport;
        let adopt = || transport.adopt(disk, id, locator.as_ref());
        let answer = self.table.adopt(&span, adopt).await;
        answer.map_err(|error| error.on_disk(disk))
    }

    /// Puts what a restart has left into the table; a share of it unless it is only to be torn down. With an error if it
    /// is refused, since it contradicts what was restored before.
    pub(crate) fn restore(
        &self,
        record: &AttachmentRecord,
        left: Left,
    ) -> (Option<Attachment>, Option<Error>) {
        let (job, resource, error) = self.table.driver().restore(record, left);
        if resource.is_none() && (left == Left::Refused || error.is_some()) {
            // In the table it would be torn down. Its name stays taken.
            return (None, error);
        }
        let lease = self
            .table
            .restore(record.id.without_version(), job, resource);
        (lease.map(|lease| Attachment(lease.into())), error)
    }

    pub(crate) async fn identify(&self, disk: &Disk) -> Result<DiskId, Error> {
        self.identified(self.ask_id(disk), disk).await
    }

    /// Called for every request, also for disks that are up: no span, no task, no timer unless it waits.
    pub(crate) fn ask_id<'a>(&'a self, disk: &'a Disk) -> Asked<'a, DiskId> {
        ask(|| self.table.driver().transport.identify(disk))
    }

    /// Waits for the answer.
    pub(crate) async fn identified(
        &self,
        asked: Asked<'_, DiskId>,
        disk: &Disk,
    ) -> Result<DiskId, Error> {
        let id = asked.within(self.table.timeout()).await;
        let id = id.unwrap_or_else(|| Err(self.table.timed_out()));
        id.map_err(|cause| Error::new(Step::Identify, cause).on_disk(disk))
    }

    pub(crate) async fn attach_identified(
        &self,
        id: DiskId,
        disk: &Disk,
    ) -> Result<Attachment, Error> {
        let is_changed = |known: &DiskId| !known.is_unchanged(&id);
        if self.tables.let_linger() && self.table.key(&id, is_changed) == Some(true) {
            // What somebody holds is shared as it is.
            let cleared = Box::pin(self.tables.clear_disk(&id)).await;
            cleared.map_err(|error| error.on_disk(disk))?;
        }
        let ask = || self.attach_once(&id, disk);
        self.tables.clearing(ask).await
    }

    async fn attach_once(&self, id: &DiskId, disk: &Disk) -> Result<Attachment, Error> {
        let (check, job) = (|up: &Attached| up.check(disk), || AttachJob::new(disk));
        let lease = self.table.acquire(id, check, job).await;
        let lease = lease.map_err(|error| match error.disk() {
            Some(_) => error,
            None => error.on_disk(disk),
        })?;
        Ok(Attachment(lease.into()))
    }

    /// Reads where a disk is attached with the access and options of `disk`, if it is and has not changed since; nothing keeps
    /// it there.
    pub(crate) fn peek<T>(
        &self,
        id: &DiskId,
        disk: &Disk,
        read: impl FnOnce(&DeviceLocator) -> T,
    ) -> Option<T> {
        self.table.peek(id, |known, up| {
            let is_same = known.is_unchanged(id) && up.check(disk).is_ok();
            is_same.then(|| read(&up.locator))
        })?
    }

    /// Grows an attached disk.
    pub(crate) async fn resize(&self, attachment: &Attachment, bytes: u64) -> Result<(), Error> {
        let disk = attachment.disk();
        let span = info_span!("resize", disk = %crate::printable(disk.source().display()), bytes);
        let resize = || self.table.driver().transport.resize(disk, bytes);
        let resized = call(Step::Resize, &span, resize).await;
        resized.map_err(|error| error.on_device(attachment.locator()).on_disk(disk))
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

    pub(crate) fn records(&self) -> Vec<Record> {
        self.table.records()
    }

    /// How many disks are attached and in use.
    pub fn in_use(&self) -> usize {
        self.table.up(|_| ()).len()
    }
}

impl Attachment {
    /// Where the device is.
    pub fn locator(&self) -> &DeviceLocator {
        &self.0.resource().locator
    }

    pub(crate) fn id(&self) -> &DiskId {
        self.0.key()
    }

    /// Which attachment it is.
    pub(crate) fn which(&self) -> Which<Attach> {
        self.0.which()
    }

    /// The disk, as the first caller named it.
    pub fn disk(&self) -> &Disk {
        &self.0.resource().disk
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
        self.0.releasing()
    }

    /// The same for one that must not linger.
    pub(crate) fn releasing_now(self) -> Releasing {
        self.0.releasing_now()
    }

    /// Leaves the disk attached, and its holder in the journal, for the next process.
    pub(crate) fn abandon(self) {
        self.0.abandon();
    }

    pub(crate) fn key(&self) -> RecordKey {
        RecordKey::Attachment(self.id().clone())
    }

    /// One more share of it, for a holder or for what is above it.
    pub(crate) fn share(&self, holder: Option<Holder>) -> Self {
        Attachment(self.0.share(holder))
    }

    /// One more share of it for the same holder, who has it until both are released.
    pub(crate) fn again(&self) -> Self {
        Attachment(self.0.again())
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
        let Attached { disk, locator, .. } = self.0.resource();
        f.debug_struct("Attachment")
            .field("disk", disk)
            .field("locator", locator)
            .finish()
    }
}
