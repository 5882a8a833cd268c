//! Making and removing views, as the lease table sees it.

use std::path::PathBuf;

use tracing::info_span;

use super::source::Source;
use crate::call::Teardown;
use crate::claims::{Claim, Claims};
use crate::holders::Holders;
use crate::inspect::Timed;
use crate::journal::{MountKey, Progress, Record, RecordKey, ViewRecord};
use crate::lease::{Driver, Left};
use crate::release::{Releasing, nothing_to_release};
use crate::{BackendError, BindMount, Binder, DiskId, Error, MountPoint, Step};

/// Views, as the lease table sees them. Keyed by target.
pub(crate) struct Viewing {
    pub(super) binder: Timed<dyn Binder>,
    claims: Claims,
    pub(super) holders: Holders,
}

pub(crate) struct ViewJob {
    bind: BindMount,
    /// The mount that it shows; none if it shows a stack.
    key: Option<MountKey>,
    /// Held by the entry, not by the leases: what is shown stays for as long as the view. None if a restart has found that
    /// it is not there.
    source: Option<Source>,
    claim: Option<Claim>,
    down: Teardown,
}

pub(crate) struct Viewed {
    pub(super) bind: BindMount,
    pub(super) mount: Option<MountPoint>,
}

impl Viewed {
    /// A target shows one mount in one way.
    pub(super) fn check(&self, wanted: &BindMount) -> Result<(), Error> {
        if self.bind == *wanted {
            return Ok(());
        }
        let source = self.bind.source.display();
        let taken = format!("a view of {source} is there, or one with other options");
        let error = Error::new(Step::Bind, BackendError::conflict(taken));
        Err(error.on_path(&self.bind.target))
    }
}

impl ViewJob {
    pub(super) fn new(bind: BindMount, source: Source) -> Self {
        ViewJob {
            bind,
            key: source.mount_key().cloned(),
            source: Some(source),
            claim: None,
            down: Teardown::default(),
        }
    }

    fn record(&self, progress: Progress) -> Record {
        Record::View(ViewRecord {
            bind: self.bind.clone(),
            mount: self.key.clone(),
            progress,
        })
    }

    fn viewed(&self) -> Option<Viewed> {
        let source = self.source.as_ref()?;
        Some(Viewed {
            bind: self.bind.clone(),
            mount: source.point().cloned(),
        })
    }
}

impl Viewing {
    pub(crate) fn new(binder: Timed<dyn Binder>, claims: Claims, holders: Holders) -> Self {
        Viewing {
            binder,
            claims,
            holders,
        }
    }

    /// The job of a view that a restart has left, and its resource if it is up. Refused with an error if what is recorded
    /// contradicts what was restored before.
    pub(super) fn restore(
        &self,
        record: &ViewRecord,
        source: Option<Source>,
        left: Left,
    ) -> (ViewJob, Option<Viewed>, Option<Error>) {
        let target = &record.bind.target;
        let (claim, left, error) = match self.claims.view(target) {
            Ok(claim) => (Some(claim), left, None),
            Err(cause) => (None, Left::Refused, Some(cause)),
        };
        let job = ViewJob {
            bind: record.bind.clone(),
            key: record.mount.clone(),
            source,
            claim,
            down: Teardown::default(),
        };
        let is_kept = matches!(left, Left::Up | Left::Refused);
        let up = job.viewed().filter(|_| is_kept);
        let error = error.map(|cause| Error::new(Step::Adopt, cause).on_path(target));
        (job, up, error)
    }
}

impl Driver for Viewing {
    type Key = PathBuf;
    type Job = ViewJob;
    type Resource = Viewed;

    async fn setup(&self, target: &PathBuf, job: &mut ViewJob) -> Result<Viewed, Error> {
        let refused = |cause| Error::new(Step::Bind, cause).on_path(target);
        job.claim = Some(self.claims.view(target).map_err(refused)?);
        let records = self.holders.records();
        let begun = records.put(|| job.record(Progress::Begun));
        begun.map_err(|error| error.on_path(target))?;
        let span = info_span!("bind", path = %crate::printable(target.display()));
        let bind = |binder| Binder::bind(binder, &job.bind);
        let outcome = self.binder.call(Step::Bind, &span, bind).await;
        let outcome = records.after_setup(
            outcome,
            || job.record(Progress::Up),
            || RecordKey::View(target.clone()),
        );
        outcome.map_err(|error| error.on_path(target))?;
        Ok(job
            .viewed()
            .expect("only a restart leaves a view of nothing"))
    }

    async fn teardown(&self, target: &PathBuf, job: &mut ViewJob) -> Result<(), Error> {
        if job.claim.is_none() {
            return Ok(());
        }
        let records = self.holders.records();
        records.ending(|| job.record(Progress::Ending));
        let span = info_span!("unbind", path = %crate::printable(target.display()));
        let unbind = |binder| Binder::unbind(binder, target);
        let outcome = self.binder.call_down(Step::Unbind, &span, unbind).await;
        job.down
            .step(outcome.map_err(|error| error.on_path(target)))?;
        records.remove(|| RecordKey::View(target.clone()));
        job.down.end()
    }

    fn release_held(&self, job: ViewJob, was_up: bool) -> Releasing {
        drop(job.claim);
        match job.source {
            Some(source) if was_up => source.releasing(),
            Some(source) => source.releasing_now(),
            None => nothing_to_release(),
        }
    }

    fn abandon(job: ViewJob) {
        job.claim.into_iter().for_each(Claim::keep);
        job.source.into_iter().for_each(Source::abandon);
    }

    fn check(&self, up: &Viewed, wanted: &ViewJob) -> Result<(), Error> {
        up.check(&wanted.bind)
    }

    fn may_linger(&self, _: &PathBuf, _: &Viewed) -> bool {
        // Nobody but its container asks for it.
        false
    }

    fn is_on(&self, _: &PathBuf, _: &Viewed, _: &DiskId) -> bool {
        // Asked of what lingers.
        false
    }

    fn is_frozen(&self) -> bool {
        self.holders.is_frozen()
    }

    fn record(&self, _: &PathBuf, job: &ViewJob, is_up: bool) -> Option<Record> {
        job.claim.as_ref()?;
        Some(job.record(Progress::of(is_up)))
    }

    fn error(&self, target: &PathBuf, up: Option<&Viewed>, cause: BackendError) -> Error {
        let step = if up.is_some() {
            Step::Unbind
        } else {
            Step::Bind
        };
        Error::new(step, cause).on_path(target)
    }
}
