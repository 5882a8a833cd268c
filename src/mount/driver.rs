//! Mounting and unmounting, as the lease table sees it.

use std::path::Path;
use std::sync::Arc;

use tracing::info_span;

use super::MountPoint;
use super::attachments::{Attachments, DiskIds, WhichDisks};
use crate::call::Teardown;
use crate::claims::{Claim, Claims};
use crate::holders::Holders;
use crate::inspect::Timed;
use crate::journal::{MountKey, MountRecord, Progress, Record, RecordKey};
use crate::lease::{Driver, Left};
use crate::release::Releasing;
use crate::{BackendError, DeviceLocator, DiskId, Error, Mounter, Step};

/// Mounting, as the lease table sees it.
pub(crate) struct Mounting {
    pub(super) mounter: Timed<dyn Mounter>,
    pub(super) claims: Claims,
    pub(super) holders: Holders,
}

pub(crate) struct MountJob {
    under: Attachments,
    claim: Option<Claim>,
    /// What few mounts have: there are many.
    unusual: Option<Box<Unusual>>,
}

#[derive(Default)]
struct Unusual {
    /// The disks of a mount that a restart has left, which may have been detached under it.
    recorded: Option<DiskIds>,
    /// The target that was requested, until it is claimed.
    target: Option<Box<Path>>,
    down: Teardown,
}

pub(crate) struct Mounted {
    pub(super) point: MountPoint,
    /// The disks that the entry keeps attached; none if they were attached without this manager.
    pub(super) keeps: WhichDisks,
    may_linger: bool,
    /// What a restart has left of it: [`Left::Up`], or more than nothing that no caller can share.
    left: Left,
}

impl Mounted {
    /// A caller with attachments relies on the mount to be of those disks and to keep them attached.
    pub(super) fn check(&self, wanted: &Attachments) -> Result<(), Error> {
        self.ensure_whole()?;
        let wanted = wanted.which();
        let taken = match (&wanted.mounted, &self.keeps.mounted) {
            (None, _) => return Ok(()),
            (Some(_), Some(_)) if wanted == self.keeps => return Ok(()),
            (Some(_), Some(_)) => "another disk with this locator is mounted; locators are unique",
            (Some(_), None) => "the device is mounted for a caller that attached it elsewhere",
        };
        Err(self.point.error(Step::Mount, BackendError::conflict(taken)))
    }

    pub(super) fn ensure_whole(&self) -> Result<(), Error> {
        let whole = self.left.ensure_whole();
        whole.map_err(|cause| self.point.error(Step::Mount, cause))
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
    pub(super) fn new(under: Attachments, target: Option<&Path>) -> Self {
        let unusual = target.map(|target| {
            Box::new(Unusual {
                target: Some(target.into()),
                ..Unusual::default()
            })
        });
        MountJob {
            under,
            claim: None,
            unusual,
        }
    }

    fn unusual(&mut self) -> &mut Unusual {
        self.unusual.get_or_insert_default()
    }

    fn requested(&self) -> Option<&Path> {
        self.unusual.as_ref()?.target.as_deref()
    }

    fn has_claimed(&mut self, claim: Claim) -> Arc<Path> {
        if let Some(unusual) = &mut self.unusual {
            unusual.target = None;
        }
        Arc::clone(self.claim.insert(claim).target())
    }

    /// As [`Teardown::step`].
    fn step(&mut self, outcome: Result<(), Error>) -> Result<(), Error> {
        match outcome {
            Err(error) => self.unusual().down.step(Err(error)),
            done => done,
        }
    }

    /// As [`Teardown::end`].
    fn end(&mut self) -> Result<(), Error> {
        let unusual = self.unusual.as_mut();
        unusual.map_or(Ok(()), |unusual| unusual.down.end())
    }

    fn disks(&self) -> DiskIds {
        let unusual = self.unusual.as_ref();
        let recorded = unusual.and_then(|unusual| unusual.recorded.clone());
        recorded.unwrap_or_else(|| self.under.ids())
    }

    fn record(&self, key: &MountKey, target: &Path, progress: Progress) -> Record {
        let disks = self.disks();
        Record::Mount(MountRecord {
            key: key.clone(),
            disk: disks.mounted,
            devices: disks.devices.into(),
            target: target.to_owned(),
            progress,
        })
    }

    /// The error, with everything that is known about the job.
    fn explain(&self, device: &DeviceLocator, error: Error) -> Error {
        let error = error.on_device(device);
        let error = match &self.under.mounted {
            Some(attachment) => error.on_disk(attachment.disk()),
            None => error,
        };
        let claimed = self.claim.as_ref().map(|claim| &**claim.target());
        match claimed.or(self.requested()) {
            Some(target) => error.on_path(target),
            None => error,
        }
    }
}

impl Mounting {
    /// The job of a mount that a restart has left, and its resource unless it is only to be torn down. Refused with an
    /// error if what is recorded contradicts what was restored before.
    pub(super) fn restore(
        &self,
        record: &MountRecord,
        under: Attachments,
        left: Left,
    ) -> (MountJob, Option<Mounted>, Option<Error>) {
        let MountKey { device, options } = &record.key;
        let claim = self.claims.mount(device, options, Some(&record.target));
        let (claim, left, error) = match claim {
            Ok(claim) => (Some(claim), left, None),
            Err(cause) => (None, Left::Refused, Some(cause)),
        };
        let recorded = DiskIds {
            mounted: record.disk.clone(),
            devices: record.devices.clone().into(),
        };
        let mut job = MountJob::new(under, Some(&record.target));
        job.unusual().recorded = Some(recorded);
        if let Some(claim) = claim {
            job.has_claimed(claim);
        }
        let (path, locator) = (Arc::from(&*record.target), device.clone());
        let resource = (left != Left::Pending).then(|| Mounted {
            point: MountPoint { path, locator },
            keeps: job.under.which(),
            may_linger: false,
            left,
        });
        let error = error.map(|cause| job.explain(device, Error::new(Step::Adopt, cause)));
        (job, resource, error)
    }
}

impl Driver for Mounting {
    type Key = MountKey;
    type Job = MountJob;
    type Resource = Mounted;

    async fn setup(&self, key: &MountKey, job: &mut MountJob) -> Result<Mounted, Error> {
        let MountKey { device, options } = key;
        let claim = self.claims.mount(device, options, job.requested());
        let claim = claim.map_err(|cause| job.explain(device, Error::new(Step::Mount, cause)))?;
        let path = job.has_claimed(claim);
        let records = self.holders.records();
        let begun = records.put(|| job.record(key, &path, Progress::Begun));
        begun.map_err(|error| job.explain(device, error))?;
        let span = info_span!("mount", locator = %device, path = %crate::printable(path.display()));
        let mount = |mounter| Mounter::mount(mounter, device, &path, options);
        let outcome = self.mounter.call(Step::Mount, &span, mount).await;
        let outcome = records.after_setup(
            outcome,
            || job.record(key, &path, Progress::Up),
            || RecordKey::Mount(key.clone()),
        );
        outcome.map_err(|error| job.explain(device, error))?;
        let locator = device.clone();
        Ok(Mounted {
            point: MountPoint { path, locator },
            keeps: job.under.which(),
            may_linger: options.is_read_only() && job.under.may_linger(),
            left: Left::Up,
        })
    }

    async fn teardown(&self, key: &MountKey, job: &mut MountJob) -> Result<(), Error> {
        let Some(claim) = &job.claim else {
            return Ok(());
        };
        let (device, target) = (&key.device, Arc::clone(claim.target()));
        let records = self.holders.records();
        records.ending(|| job.record(key, &target, Progress::Ending));
        let span =
            info_span!("unmount", locator = %device, path = %crate::printable(target.display()));
        let unmount = |mounter| Mounter::unmount(mounter, &target);
        let outcome = self.mounter.call_down(Step::Unmount, &span, unmount).await;
        let outcome = outcome.map_err(|error| job.explain(device, error));
        job.step(outcome)?;
        records.remove(|| RecordKey::Mount(key.clone()));
        job.end()
    }

    fn release_held(&self, job: MountJob, _: bool) -> Releasing {
        drop(job.claim);
        job.under.releasing()
    }

    fn abandon(job: MountJob) {
        job.claim.into_iter().for_each(Claim::keep);
        job.under.abandon();
    }

    fn check(&self, up: &Mounted, wanted: &MountJob) -> Result<(), Error> {
        up.check(&wanted.under)
    }

    fn may_linger(&self, _: &MountKey, up: &Mounted) -> bool {
        up.may_linger
    }

    fn is_on(&self, _: &MountKey, up: &Mounted, disk: &DiskId) -> bool {
        up.keeps.ids().any(|id| id == disk)
    }

    fn is_frozen(&self) -> bool {
        self.holders.is_frozen()
    }

    fn record(&self, key: &MountKey, job: &MountJob, is_up: bool) -> Option<Record> {
        let claim = job.claim.as_ref()?;
        Some(job.record(key, claim.target(), Progress::of(is_up)))
    }

    fn error(&self, key: &MountKey, up: Option<&Mounted>, cause: BackendError) -> Error {
        match up {
            Some(up) => up.point.error(Step::Unmount, cause),
            None => Error::new(Step::Mount, cause).on_device(&key.device),
        }
    }
}
