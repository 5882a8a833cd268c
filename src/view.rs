//! Views: one mount, or the tree of one stack, seen at many places.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::holders::Holder;
use crate::journal::{RecordKey, ViewRecord};
use crate::lease::{Left, Table};
use crate::mount::Mount;
use crate::named::Named;
use crate::release::Releasing;
use crate::stack::Stack;
use crate::{
    BackendError, BindMount, Error, Expose, HolderName, MountPoint, Presence, ReleaseError, Step,
    ViewOptions,
};

mod driver;
mod inspect;
mod source;

pub(crate) use driver::Viewing;
use driver::{ViewJob, Viewed};
pub(crate) use inspect::inspect;
pub(crate) use source::Source;

/// What can be shown at further places: a `&Mount`, or a `&Stack`, whose tree is shown.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Viewable<'a> {
    /// A mount.
    Mount(&'a Mount),
    /// The tree of a stack.
    Stack(&'a Stack),
}

impl<'a> From<&'a Mount> for Viewable<'a> {
    fn from(mount: &'a Mount) -> Self {
        Viewable::Mount(mount)
    }
}

impl<'a> From<&'a Stack> for Viewable<'a> {
    fn from(stack: &'a Stack) -> Self {
        Viewable::Stack(stack)
    }
}

/// A view to make: where a mount or the tree of a stack appears as well, and how.
///
/// ```
/// use blockmount::{ViewOptions, ViewRequest};
///
/// let options = ViewOptions::new(["ro", "noexec"])?.with_subpath("db")?;
/// let request = ViewRequest::new("/run/containers/c1/data", options);
/// # let _ = request;
/// # Ok::<(), blockmount::InvalidOptions>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewRequest {
    target: PathBuf,
    #[serde(default)]
    options: ViewOptions,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held_by: Option<HolderName>,
}

impl ViewRequest {
    /// A view at `target`, an absolute path in the guest.
    pub fn new(target: impl Into<PathBuf>, options: ViewOptions) -> Self {
        ViewRequest {
            target: target.into(),
            options,
            held_by: None,
        }
    }

    /// Makes the view for a holder who comes back for it after a restart ([`Recovery::claim`](crate::Recovery::claim)).
    #[must_use]
    pub fn held_by(mut self, name: HolderName) -> Self {
        self.held_by = Some(name);
        self
    }

    /// Where the mount appears.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// How it appears.
    pub fn options(&self) -> &ViewOptions {
        &self.options
    }

    pub(crate) fn holder(&self) -> Option<&HolderName> {
        self.held_by.as_ref()
    }
}

/// One share of a view: a mount, or the tree of a stack, that is seen at a further place. While a view exists, so does what it
/// shows.
///
/// [`release`](Self::release) it to hear how the tear-down went. Dropping it releases it in the
/// background, where an error can only be logged.
#[must_use = "dropping a view releases it in the background, where an error is only logged"]
pub struct View(Named<Viewing>);

impl View {
    /// Where the mount appears.
    pub fn target(&self) -> &Path {
        &self.0.resource().bind.target
    }

    /// How it appears.
    pub fn options(&self) -> &ViewOptions {
        &self.0.resource().bind.options
    }

    /// The path of what it shows.
    pub fn source(&self) -> &Path {
        &self.0.resource().bind.source
    }

    /// The mount that it shows; none if that is the tree of a stack.
    pub fn mount(&self) -> Option<&MountPoint> {
        self.0.resource().mount.as_ref()
    }

    /// Releases this share. The last release removes the view, and then its share of what it shows.
    ///
    /// The share counts as released when this returns; the future waits for the tear-down.
    ///
    /// # Errors
    ///
    /// Everything that went wrong; see [`ReleaseError`] for how to go on. A view that is `Busy` stays usable, and nothing
    /// below it is touched.
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

    /// Leaves the view as it is, and its holder in the journal, for the next process.
    pub(crate) fn abandon(self) {
        self.0.abandon();
    }

    /// One more share of it, for a holder.
    pub(crate) fn share(&self, holder: Option<Holder>) -> Self {
        View(self.0.share(holder))
    }
}

/// Makes a view of something, or shares the one that is there.
pub(crate) async fn view(
    table: &Arc<Table<Viewing>>,
    of: Viewable<'_>,
    request: &ViewRequest,
) -> Result<View, Error> {
    let refused = |cause| Error::new(Step::Bind, cause).on_path(&request.target);
    if let Viewable::Mount(mount) = of
        && mount.mount_key().options.expose() != Expose::Filesystem
    {
        let what = "a block device that is exposed has no views; expose it once more";
        return Err(refused(BackendError::invalid(what)));
    }
    let holders = &table.driver().holders;
    let holder = request.holder().map(|name| holders.reserve(name));
    let holder = holder.transpose().map_err(refused)?;
    let bind = BindMount::new(of.path(), &request.target, request.options.clone());
    let (check, job) = (
        |up: &Viewed| up.check(&bind),
        || ViewJob::new(bind.clone(), of.share()),
    );
    let lease = table.acquire(&request.target, check, job).await?;
    let key = |view: &Named<Viewing>| RecordKey::View(view.key().clone());
    let explain = |_: &Named<Viewing>, error: Error| error.on_path(&request.target);
    let view = Named::from(lease).held_by(holder, key, explain).await;
    view.map(View)
}

/// Asks the binder whether a view is there that the journal remembers.
pub(crate) async fn adopt(table: &Table<Viewing>, record: &ViewRecord) -> Result<Presence, Error> {
    let target = &record.bind.target;
    let span = info_span!("adopt", path = %crate::printable(target.display()));
    let adopt = || table.driver().binder.adopt(&record.bind);
    let answer = table.adopt(&span, adopt).await;
    answer.map_err(|error| error.on_path(target))
}

/// Puts what a restart has left into the table; a share of it unless it is only to be torn down. With an error if it is
/// refused, since it contradicts what was restored before.
pub(crate) fn restore(
    table: &Arc<Table<Viewing>>,
    record: &ViewRecord,
    source: Option<Source>,
    left: Left,
) -> (Option<View>, Option<Error>) {
    let (job, resource, error) = table.driver().restore(record, source, left);
    if resource.is_none() && (left == Left::Refused || error.is_some()) {
        // In the table it would be torn down.
        return (None, error);
    }
    let lease = table.restore(record.bind.target.clone(), job, resource);
    (lease.map(|lease| View(lease.into())), error)
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bind = &self.0.resource().bind;
        f.debug_struct("View")
            .field("source", &bind.source)
            .field("target", &bind.target)
            .field("options", &bind.options)
            .finish()
    }
}
