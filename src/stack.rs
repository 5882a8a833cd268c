//! Stacks: the layers of a container, seen as one tree.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::call::{call, call_down};
use crate::lease::{Driver, Lease, Table};
use crate::release::{Releasing, both};
use crate::target::{Claim, Claims};
use crate::{
    BackendError, Disk, Error, LayerCombiner, Mount, MountPoint, MountRequest, Overlay,
    ReleaseError, Step,
};

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
    target: PathBuf,
}

impl StackRequest {
    /// A stack that appears at `target`, an absolute path in the guest.
    pub fn new(target: impl Into<PathBuf>) -> Self {
        let (layers, scratch_directory) = (Vec::new(), PathBuf::new());
        StackRequest {
            layers,
            scratch: None,
            scratch_directory,
            target: target.into(),
        }
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

    pub(crate) fn disks(&self) -> impl Iterator<Item = &(Disk, MountRequest)> {
        self.layers.iter().chain(&self.scratch)
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }
}

/// The layers of a container, mounted and stacked as an overlay.
///
/// It owns its mounts. [`release`](Self::release) takes it apart in reverse order; dropping it does so
/// in the background, where an error can only be logged.
#[must_use = "dropping a stack releases it in the background, where an error is only logged"]
pub struct Stack {
    lease: Lease<Combining>,
}

impl Stack {
    /// Where the tree is.
    pub fn target(&self) -> &Path {
        &self.lease.resource().target
    }

    /// Where each layer is mounted, the topmost first.
    pub fn layers(&self) -> &[MountPoint] {
        &self.lease.resource().layers
    }

    /// Where the scratch disk is mounted, if there is one.
    pub fn scratch(&self) -> Option<&MountPoint> {
        self.lease.resource().scratch.as_ref()
    }

    /// Takes the stack apart: the overlay, the scratch disk, the layers. A layer that others share
    /// stays for them. If the overlay is in use nothing below it is touched.
    ///
    /// # Errors
    ///
    /// Everything that went wrong; see [`ReleaseError`] for how to go on.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-down; an error is then logged.
    pub fn release(self) -> impl Future<Output = Result<(), ReleaseError>> + Send + 'static {
        self.lease.release()
    }
}

/// Combining layers, as the lease table sees it. Keyed by target, and never shared.
pub(crate) struct Combining {
    combiner: Box<dyn LayerCombiner>,
    claims: Claims,
}

pub(crate) struct CombineJob {
    request: StackRequest,
    layers: Vec<Mount>,
    scratch: Option<Mount>,
    claim: Option<Claim>,
}

pub(crate) struct Combined {
    target: PathBuf,
    layers: Vec<MountPoint>,
    scratch: Option<MountPoint>,
}

impl Combining {
    pub(crate) fn new(combiner: Box<dyn LayerCombiner>, claims: Claims) -> Self {
        Combining { combiner, claims }
    }
}

/// Combines what is mounted. `mounts` are those of [`StackRequest::disks`], in that order.
pub(crate) async fn combine(
    table: &Arc<Table<Combining>>,
    request: StackRequest,
    mut mounts: Vec<Mount>,
) -> Result<Stack, Error> {
    let scratch = if request.scratch.is_some() {
        mounts.pop()
    } else {
        None
    };
    let target = request.target.clone();
    let job = CombineJob {
        request,
        layers: mounts,
        scratch,
        claim: None,
    };
    let lease = table.acquire(target, job).await?;
    Ok(Stack { lease })
}

impl CombineJob {
    fn overlay(&self) -> Overlay {
        let scratch = self.scratch.as_ref();
        Overlay {
            layers: self
                .layers
                .iter()
                .map(|layer| layer.path().to_owned())
                .collect(),
            scratch: scratch.map(|mount| mount.path().join(&self.request.scratch_directory)),
            target: self.request.target.clone(),
        }
    }
}

impl Driver for Combining {
    type Key = PathBuf;
    type Job = CombineJob;
    type Resource = Combined;

    async fn setup(&self, target: &PathBuf, job: &mut CombineJob) -> Result<Combined, Error> {
        let refused = |cause| Error::new(Step::Combine, cause).on_path(target);
        let directory = &job.request.scratch_directory;
        if !directory
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)))
        {
            let why = format!(
                "{} is no directory inside the scratch disk",
                directory.display()
            );
            return Err(refused(BackendError::invalid(why)));
        }
        let scratch = job.scratch.as_ref().map(Mount::path);
        job.claim = Some(self.claims.overlay(target, scratch).map_err(refused)?);
        let overlay = job.overlay();
        let span = info_span!("combine", path = %target.display(), layers = overlay.layers.len());
        let outcome = call(Step::Combine, span, self.combiner.combine(&overlay)).await;
        outcome.map_err(|error| error.on_path(target))?;
        Ok(Combined {
            target: target.clone(),
            layers: job
                .layers
                .iter()
                .map(|layer| layer.point().clone())
                .collect(),
            scratch: job.scratch.as_ref().map(|scratch| scratch.point().clone()),
        })
    }

    async fn teardown(&self, target: &PathBuf, _: &mut CombineJob) -> Result<(), Error> {
        let span = info_span!("separate", path = %target.display());
        let outcome = call_down(Step::Separate, span, self.combiner.separate(target)).await;
        outcome.map_err(|error| error.on_path(target))
    }

    fn release_held(&self, job: CombineJob) -> Releasing {
        drop(job.claim);
        let mounts = job.scratch.into_iter().chain(job.layers);
        release_all(mounts)
    }

    fn check(&self, up: &Combined, _: &CombineJob) -> Result<(), Error> {
        let taken = BackendError::conflict("another stack is there");
        Err(Error::new(Step::Combine, taken).on_path(&up.target))
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

/// Releases all mounts at once, and reports all errors.
pub(crate) fn release_all(mounts: impl IntoIterator<Item = Mount>) -> Releasing {
    let releases: Vec<_> = mounts.into_iter().map(Mount::releasing).collect();
    Box::pin(async move {
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
        } = self.lease.resource();
        f.debug_struct("Stack")
            .field("target", target)
            .field("layers", layers)
            .field("scratch", scratch)
            .finish()
    }
}
