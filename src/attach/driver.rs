//! Attaching and detaching, as the lease table sees it.

use dashmap::DashSet;
use foldhash::fast::RandomState;
use tracing::info_span;

use crate::call::Teardown;
use crate::holders::Holders;
use crate::inspect::Timed;
use crate::journal::{AttachmentRecord, Progress, Record, RecordKey};
use crate::lease::{Driver, Left};
use crate::release::{Releasing, nothing_to_release};
use crate::{BackendError, DeviceLocator, Disk, DiskId, Error, Step, Transport, Unplugger};

/// Attaching, as the lease table sees it.
pub(crate) struct Attach {
    pub(super) transport: Timed<dyn Transport>,
    /// None if nothing in the guest is to be told.
    unplugger: Option<Timed<dyn Unplugger>>,
    pub(super) holders: Holders,
    /// The disks that are being attached or are attached, as they were named: a transport may rely on
    /// never being given two that are equal.
    sources: DashSet<Disk, RandomState>,
    /// Where disks are. Transports cannot know of each other's locators, and the guest goes by the locator alone.
    locators: DashSet<DeviceLocator, RandomState>,
}

pub(crate) struct AttachJob {
    disk: Disk,
    /// Listed among the sources, until it is detached.
    listed: bool,
    /// Known once the attachment has succeeded.
    locator: Option<DeviceLocator>,
    /// Its locator is listed for it.
    has_locator: bool,
    /// The guest has unplugged the device.
    unplugged: bool,
    down: Teardown,
}

pub(crate) struct Attached {
    pub(super) disk: Disk,
    pub(super) locator: DeviceLocator,
    /// What a restart has left of it: [`Left::Up`], or more than nothing that no caller can share.
    left: Left,
}

impl AttachJob {
    pub(super) fn new(disk: &Disk) -> Self {
        AttachJob {
            disk: disk.clone(),
            listed: false,
            locator: None,
            has_locator: false,
            unplugged: false,
            down: Teardown::default(),
        }
    }

    fn record(&self, id: &DiskId, progress: Progress) -> Record {
        Record::Attachment(AttachmentRecord {
            id: id.clone(),
            disk: self.disk.clone(),
            progress,
            locator: self.locator.clone(),
            unplugged: self.unplugged,
        })
    }
}

impl Attached {
    /// All leases of a disk have the same access and options.
    pub(super) fn check(&self, wanted: &Disk) -> Result<(), Error> {
        let whole = self.left.ensure_whole();
        whole.map_err(|cause| Error::new(Step::Attach, cause).on_disk(wanted))?;
        let (up, locator) = (&self.disk, &self.locator);
        if wanted.is_attached_like(up) {
            return Ok(());
        }
        let same_access = (wanted.kind(), wanted.is_read_only()) == (up.kind(), up.is_read_only());
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
    pub(super) fn new(
        transport: Timed<dyn Transport>,
        unplugger: Option<Timed<dyn Unplugger>>,
        holders: Holders,
    ) -> Self {
        Attach {
            transport,
            unplugger,
            holders,
            sources: DashSet::default(),
            locators: DashSet::default(),
        }
    }

    /// The job of an attachment that a restart has left, and its resource unless it is only to be torn down. Refused with
    /// an error if what is recorded contradicts what was restored before.
    pub(super) fn restore(
        &self,
        record: &AttachmentRecord,
        left: Left,
    ) -> (AttachJob, Option<Attached>, Option<Error>) {
        let disk = &record.disk;
        let listed = self.sources.insert(disk.clone());
        // What the guest has unplugged has no more need of its locator, which the next disk may have.
        let locator = record.locator.as_ref().filter(|_| !record.unplugged);
        let has_locator = listed && locator.is_some_and(|locator| self.occupy(locator));
        let contradiction = if !listed {
            Some("two disks of this name are recorded")
        } else if locator.is_some() && !has_locator {
            Some("its locator is recorded of another disk too")
        } else {
            None
        };
        let left = contradiction.map_or(left, |_| Left::Refused);
        let job = AttachJob {
            listed,
            locator: locator.cloned(),
            has_locator,
            unplugged: record.unplugged,
            ..AttachJob::new(disk)
        };
        let attached = |locator: &DeviceLocator| Attached {
            disk: disk.clone(),
            locator: locator.clone(),
            left,
        };
        let resource = locator.filter(|_| left != Left::Pending).map(attached);
        let error = contradiction
            .map(|why| Error::new(Step::Adopt, BackendError::invalid(why)).on_disk(disk));
        (job, resource, error)
    }

    /// False if another disk is at the locator.
    fn occupy(&self, locator: &DeviceLocator) -> bool {
        self.locators.insert(locator.clone())
    }

    async fn attach(&self, id: &DiskId, job: &mut AttachJob) -> Result<Attached, Error> {
        let disk = &job.disk;
        let span = info_span!("attach", disk = %crate::printable(disk.source().display()));
        let attach = |transport| Transport::attach(transport, disk, id);
        let locator = self.transport.call(Step::Attach, &span, attach).await;
        let locator = locator.map_err(|error| error.on_disk(disk))?;
        if !self.occupy(&locator) {
            return Err(self.undo_second_at(&locator, disk).await);
        }
        job.has_locator = true;
        job.locator = Some(locator.clone());
        Ok(Attached {
            disk: disk.clone(),
            locator,
            left: Left::Up,
        })
    }

    /// Has the guest unplug the device, unless it has done so or was never told of it.
    async fn unplug(&self, id: &DiskId, job: &mut AttachJob) -> Result<(), Error> {
        // Without a locator the attachment was uncertain, and the guest was never told of it.
        let (Some(unplugger), Some(locator), false) =
            (&self.unplugger, &job.locator, job.unplugged)
        else {
            return Ok(());
        };
        let disk = &job.disk;
        let span =
            info_span!("unplug", disk = %crate::printable(disk.source().display()), %locator);
        let unplug = |unplugger| Unplugger::unplug(unplugger, locator);
        let outcome = unplugger.call_down(Step::Unplug, &span, unplug).await;
        let outcome = outcome.map_err(|error| error.on_disk(disk).on_device(locator));
        job.down.step(outcome)?;
        job.unplugged = true;
        self.record_end(id, job);
        Ok(())
    }

    async fn detach_job(&self, job: &mut AttachJob) -> Result<(), Error> {
        // Before the detach: the transport may give the locator to the next disk as soon as it answers.
        if let Some(locator) = &job.locator
            && std::mem::take(&mut job.has_locator)
        {
            self.locators.remove(locator);
        }
        let outcome = job.down.step(self.detach(&job.disk).await);
        outcome.map_err(|error| match &job.locator {
            Some(locator) => {
                job.has_locator = self.occupy(locator);
                error.on_device(locator)
            }
            None => error,
        })
    }

    fn record_end(&self, id: &DiskId, job: &AttachJob) {
        let records = self.holders.records();
        records.ending(|| job.record(id, Progress::Ending));
    }

    async fn detach(&self, disk: &Disk) -> Result<(), Error> {
        let span = info_span!("detach", disk = %crate::printable(disk.source().display()));
        let detach = |transport| Transport::detach(transport, disk);
        let outcome = self.transport.call_down(Step::Detach, &span, detach).await;
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
        let records = self.holders.records();
        let begun = records.put(|| job.record(id, Progress::Begun));
        begun.map_err(|error| error.on_disk(&job.disk))?;
        let outcome = self.attach(id, job).await;
        records.after_setup(
            outcome,
            || job.record(id, Progress::Up),
            || RecordKey::Attachment(id.clone()),
        )
    }

    async fn teardown(&self, id: &DiskId, job: &mut AttachJob) -> Result<(), Error> {
        self.record_end(id, job);
        self.unplug(id, job).await?;
        self.detach_job(job).await?;
        let records = self.holders.records();
        records.remove(|| RecordKey::Attachment(id.clone()));
        job.down.end()
    }

    fn release_held(&self, job: AttachJob, _: bool) -> Releasing {
        if job.listed {
            self.sources.remove(&job.disk);
        }
        nothing_to_release()
    }

    fn abandon(job: AttachJob) {
        // It stands on nothing.
        drop(job);
    }

    fn check(&self, up: &Attached, wanted: &AttachJob) -> Result<(), Error> {
        up.check(&wanted.disk)
    }

    fn may_linger(&self, id: &DiskId, up: &Attached) -> bool {
        up.left == Left::Up && up.disk.is_read_only() && id.version().is_some()
    }

    fn is_on(&self, id: &DiskId, _: &Attached, disk: &DiskId) -> bool {
        id == disk
    }

    fn is_frozen(&self) -> bool {
        self.holders.is_frozen()
    }

    fn record(&self, id: &DiskId, job: &AttachJob, is_up: bool) -> Option<Record> {
        job.listed.then(|| job.record(id, Progress::of(is_up)))
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
