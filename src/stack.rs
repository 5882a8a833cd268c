//! Stacks: the layers of a container, seen as one tree.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::call::Teardown;
use crate::claims::{Claim, Claims};
use crate::holders::{Holder, Holders};
use crate::inspect::Timed;
use crate::journal::{Progress, Record, RecordKey, StackRecord};
use crate::lease::{Driver, Left, Table};
use crate::named::Named;
use crate::release::{Releasing, both, give_back};
use crate::{
    BackendError, Disk, DiskId, Error, HolderName, LayerCombiner, Mount, MountPoint, MountRequest,
    Overlay, OverlayOptions, Presence, ReleaseError, Step,
};

mod inspect;

pub(crate) use inspect::inspect;

/// A stack to make: layers, perhaps a scratch disk for changes, and where the tree appears.
///
/// ```
/// use blockmount::{Disk, MountOptions, MountRequest, StackRequest};
///
/// let layer = MountRequest::new(MountOptions::read_only());
/// let scratch = MountRequest::new(MountOptions::default());
/// let request = StackRequest::new("/run/containers/c1/rootfs")
///     .layer(Disk::virtual_disk("/images/app.erofs").read_only(), layer.clone())
///     .layer(Disk::virtual_disk("/images/base.erofs").read_only(), layer)
///     .scratch(Disk::virtual_disk("/run/c1.img"), scratch);
/// # let _ = request;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackRequest {
    layers: Vec<(Disk, MountRequest)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scratch: Option<(Disk, MountRequest)>,
    #[serde(default)]
    scratch_directory: PathBuf,
    #[serde(default, skip_serializing_if = "OverlayOptions::is_empty")]
    options: OverlayOptions,
    target: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held_by: Option<HolderName>,
}

impl StackRequest {
    /// A stack that appears at `target`, an absolute path in the guest.
    pub fn new(target: impl Into<PathBuf>) -> Self {
        let (layers, scratch_directory) = (Vec::new(), PathBuf::new());
        StackRequest {
            layers,
            scratch: None,
            scratch_directory,
            options: OverlayOptions::default(),
            target: target.into(),
            held_by: None,
        }
    }

    /// Makes the stack for a holder who comes back for it after a restart
    /// ([`Recovery::claim`](crate::Recovery::claim)). The name is the stack's: its layers have none of their own.
    #[must_use]
    pub fn held_by(mut self, name: HolderName) -> Self {
        self.held_by = Some(name);
        self
    }

    /// Adds a layer below those that are there: the topmost comes first.
    #[must_use]
    pub fn layer(mut self, disk: Disk, request: MountRequest) -> Self {
        self.layers.push((disk, request));
        self
    }

    /// Gives the stack a disk that takes all changes. Without one the tree is read-only.
    #[must_use]
    pub fn scratch(mut self, disk: Disk, request: MountRequest) -> Self {
        self.scratch = Some((disk, request));
        self
    }

    /// Puts the changes into a directory of the scratch disk (a relative path) in place of its root, so
    /// that several stacks can share the disk.
    #[must_use]
    pub fn scratch_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.scratch_directory = directory.into();
        self
    }

    /// Says how the layers are stacked.
    #[must_use]
    pub fn options(mut self, options: OverlayOptions) -> Self {
        self.options = options;
        self
    }

    pub(crate) fn disks(&self) -> impl Iterator<Item = &(Disk, MountRequest)> {
        self.layers.iter().chain(&self.scratch)
    }

    /// Refuses what can be no stack, before anything is set up for it.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let directory = &self.scratch_directory;
        let mut parts = directory.components();
        let inside = parts.all(|part| matches!(part, Component::Normal(_)));
        let why = if self.layers.is_empty() && self.scratch.is_none() {
            "a stack needs at least one layer".to_owned()
        } else if !inside {
            format!(
                "{} is no directory inside the scratch disk",
                directory.display()
            )
        } else if self.scratch.is_none() && self.options.needs_scratch() {
            "volatile is about what is written, and the stack has no scratch disk".to_owned()
        } else if self.disks().any(|(_, mount)| mount.holder().is_some()) {
            "the layers of a stack have no holders of their own; name the holder of the stack"
                .to_owned()
        } else {
            return Ok(());
        };
        let error = Error::new(Step::Combine, BackendError::invalid(why));
        Err(error.on_path(&self.target))
    }
}

/// The layers of a container, mounted and stacked as an overlay.
///
/// It owns its mounts. [`release`](Self::release) takes it apart in reverse order, unless there are views of it; dropping it
/// does so in the background, where an error can only be logged.
#[must_use = "dropping a stack releases it in the background, where an error is only logged"]
pub struct Stack(Named<Combining>);

impl Stack {
    /// Where the tree is.
    pub fn target(&self) -> &Path {
        &self.0.resource().target
    }

    /// Where each layer is mounted, the topmost first.
    pub fn layers(&self) -> &[MountPoint] {
        &self.0.resource().layers
    }

    /// Where the scratch disk is mounted, if there is one.
    pub fn scratch(&self) -> Option<&MountPoint> {
        self.0.resource().scratch.as_ref()
    }

    /// Takes the stack apart: the overlay, the scratch disk, the layers. A layer that others share
    /// stays for them. If the overlay is in use nothing below it is touched. While there are [views](crate::Manager::view) of
    /// the tree it stays, and goes with the last of them.
    ///
    /// # Errors
    ///
    /// Everything that went wrong; see [`ReleaseError`] for how to go on.
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

    /// Leaves the stack as it is, and its holder in the journal, for the next process.
    pub(crate) fn abandon(self) {
        self.0.abandon();
    }

    pub(crate) fn key(&self) -> RecordKey {
        RecordKey::Stack(self.0.key().clone())
    }

    /// One more share of it, for a holder or for a view of it.
    pub(crate) fn share(&self, holder: Option<Holder>) -> Self {
        Stack(self.0.share(holder))
    }
}

/// Combining layers, as the lease table sees it. Keyed by target, and shared by nothing but its views.
pub(crate) struct Combining {
    combiner: Timed<dyn LayerCombiner>,
    claims: Claims,
    holders: Holders,
}

pub(crate) struct CombineJob {
    /// What is recorded of it, also of layers that a restart has not found again.
    record: StackRecord,
    layers: Vec<Mount>,
    scratch: Option<Mount>,
    claim: Option<Claim>,
    down: Teardown,
}

pub(crate) struct Combined {
    target: PathBuf,
    layers: Vec<MountPoint>,
    scratch: Option<MountPoint>,
}

impl Combining {
    pub(crate) fn new(
        combiner: Timed<dyn LayerCombiner>,
        claims: Claims,
        holders: Holders,
    ) -> Self {
        Combining {
            combiner,
            claims,
            holders,
        }
    }
}

/// Takes the name that a request has.
pub(crate) fn reserve(
    table: &Table<Combining>,
    request: &StackRequest,
) -> Result<Option<Holder>, Error> {
    let holders = &table.driver().holders;
    let reserved = request.held_by.as_ref().map(|name| holders.reserve(name));
    let refused = |cause| Error::new(Step::Combine, cause).on_path(&request.target);
    reserved.transpose().map_err(refused)
}

/// Asks the combiner whether an overlay is there that the journal remembers.
pub(crate) async fn adopt(
    table: &Table<Combining>,
    record: &StackRecord,
) -> Result<Presence, Error> {
    let target = &record.overlay.target;
    let span = info_span!("adopt", path = %crate::printable(target.display()));
    let adopt = || table.driver().combiner.adopt(&record.overlay);
    let answer = table.adopt(&span, adopt).await;
    answer.map_err(|error| error.on_path(target))
}

/// Puts what a restart has left into the table; a share of it unless it is only to be torn down. `layers` and `scratch` are
/// those that were found again. With an error if it is refused, since it contradicts what was restored before.
pub(crate) fn restore(
    table: &Arc<Table<Combining>>,
    record: &StackRecord,
    layers: Vec<Mount>,
    scratch: Option<Mount>,
    left: Left,
) -> (Option<Stack>, Option<Error>) {
    let target = &record.overlay.target;
    let below = scratch.as_ref().map(Mount::path);
    let (claim, left, error) = match table.driver().claims.overlay(target, below) {
        Ok(claim) => (Some(claim), left, None),
        Err(cause) => (None, Left::Refused, Some(cause)),
    };
    let job = CombineJob {
        record: record.clone(),
        claim,
        layers,
        scratch,
        down: Teardown::default(),
    };
    let resource = (left != Left::Pending).then(|| job.combined());
    let lease = table.restore(target.clone(), job, resource);
    let stack = lease.map(|lease| Stack(lease.into()));
    (
        stack,
        error.map(|cause| Error::new(Step::Adopt, cause).on_path(target)),
    )
}

/// Combines what is mounted. `mounts` are those of [`StackRequest::disks`], in that order.
pub(crate) async fn combine(
    table: &Arc<Table<Combining>>,
    holder: Option<Holder>,
    request: &StackRequest,
    mut layers: Vec<Mount>,
) -> Result<Stack, Error> {
    let scratch = match request.scratch {
        Some(_) => layers.pop(),
        None => None,
    };
    let directory = |mount: &Mount| mount.path().join(&request.scratch_directory);
    let overlay = Overlay {
        layers: layers.iter().map(|layer| layer.path().to_owned()).collect(),
        scratch: scratch.as_ref().map(directory),
        target: request.target.clone(),
        options: request.options.clone(),
    };
    let key = |mount: &Mount| mount.mount_key().clone();
    let record = StackRecord {
        overlay,
        layers: layers.iter().map(key).collect(),
        scratch: scratch.as_ref().map(key),
        progress: Progress::Begun,
    };
    let job = CombineJob {
        record,
        layers,
        scratch,
        claim: None,
        down: Teardown::default(),
    };
    let mut job = Some(job);
    let give = || job.take().expect("a job is asked for once");
    let lease = table.acquire(&request.target, Combined::refuse, give).await;
    if let Some(unused) = job {
        give_back(table.driver().release_held(unused, false)).await;
    }
    let lease = lease?;
    let key = |stack: &Named<Combining>| RecordKey::Stack(stack.key().clone());
    let explain = |_: &Named<Combining>, error: Error| error.on_path(&request.target);
    let stack = Named::from(lease).held_by(holder, key, explain).await;
    stack.map(Stack)
}

impl Combined {
    /// A target has one stack, which only its views share.
    fn refuse(&self) -> Result<(), Error> {
        let taken = BackendError::conflict("another stack is there");
        Err(Error::new(Step::Combine, taken).on_path(&self.target))
    }
}

impl CombineJob {
    fn combined(&self) -> Combined {
        let point = |mount: &Mount| mount.point().clone();
        Combined {
            target: self.record.overlay.target.clone(),
            layers: self.layers.iter().map(point).collect(),
            scratch: self.scratch.as_ref().map(point),
        }
    }

    fn record(&self, progress: Progress) -> Record {
        Record::Stack(StackRecord {
            progress,
            ..self.record.clone()
        })
    }
}

impl Driver for Combining {
    type Key = PathBuf;
    type Job = CombineJob;
    type Resource = Combined;

    async fn setup(&self, target: &PathBuf, job: &mut CombineJob) -> Result<Combined, Error> {
        let refused = |cause| Error::new(Step::Combine, cause).on_path(target);
        let scratch = job.scratch.as_ref().map(Mount::path);
        job.claim = Some(self.claims.overlay(target, scratch).map_err(refused)?);
        let records = self.holders.records();
        let begun = records.put(|| job.record(Progress::Begun));
        begun.map_err(|error| error.on_path(target))?;
        let overlay = &job.record.overlay;
        let layers = overlay.layers.len();
        let span = info_span!("combine", path = %crate::printable(target.display()), layers);
        let combine = |combiner| LayerCombiner::combine(combiner, overlay);
        let outcome = self.combiner.call(Step::Combine, &span, combine).await;
        let outcome = records.after_setup(
            outcome,
            || job.record(Progress::Up),
            || RecordKey::Stack(target.clone()),
        );
        outcome.map_err(|error| error.on_path(target))?;
        Ok(job.combined())
    }

    async fn teardown(&self, target: &PathBuf, job: &mut CombineJob) -> Result<(), Error> {
        let records = self.holders.records();
        records.ending(|| job.record(Progress::Ending));
        let span = info_span!("separate", path = %crate::printable(target.display()));
        let separate = |combiner| LayerCombiner::separate(combiner, target);
        let outcome = self
            .combiner
            .call_down(Step::Separate, &span, separate)
            .await;
        job.down
            .step(outcome.map_err(|error| error.on_path(target)))?;
        records.remove(|| RecordKey::Stack(target.clone()));
        job.down.end()
    }

    fn release_held(&self, job: CombineJob, was_up: bool) -> Releasing {
        drop(job.claim);
        let mounts = job.scratch.into_iter().chain(job.layers);
        match was_up {
            true => release_all(mounts.map(Mount::releasing)),
            false => release_all(mounts.map(Mount::releasing_now)),
        }
    }

    fn abandon(job: CombineJob) {
        job.claim.into_iter().for_each(Claim::keep);
        let mounts = job.scratch.into_iter().chain(job.layers);
        mounts.for_each(Mount::abandon);
    }

    fn check(&self, up: &Combined, _: &CombineJob) -> Result<(), Error> {
        up.refuse()
    }

    fn may_linger(&self, _: &PathBuf, _: &Combined) -> bool {
        // Nobody but its container asks for it.
        false
    }

    fn is_on(&self, _: &PathBuf, _: &Combined, _: &DiskId) -> bool {
        // Asked of what lingers.
        false
    }

    fn is_frozen(&self) -> bool {
        self.holders.is_frozen()
    }

    fn record(&self, _: &PathBuf, job: &CombineJob, is_up: bool) -> Option<Record> {
        job.claim.as_ref()?;
        Some(job.record(Progress::of(is_up)))
    }

    fn error(&self, target: &PathBuf, up: Option<&Combined>, cause: BackendError) -> Error {
        let step = if up.is_some() {
            Step::Separate
        } else {
            Step::Combine
        };
        Error::new(step, cause).on_path(target)
    }
}

/// Releases all at once, and reports all errors.
pub(crate) fn release_all(releases: impl Iterator<Item = Releasing>) -> Releasing {
    // All are counted back before the first one is waited for.
    let releases: Vec<_> = releases.collect();
    Releasing::waits(async move {
        let mut outcome = Ok(());
        for release in releases {
            outcome = both(outcome, release.await);
        }
        outcome
    })
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Combined {
            target,
            layers,
            scratch,
        } = self.0.resource();
        f.debug_struct("Stack")
            .field("target", target)
            .field("layers", layers)
            .field("scratch", scratch)
            .finish()
    }
}
