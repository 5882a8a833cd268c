//! Recovery: what a journal remembers, compared with what is really there.
//!
//! Everything is adopted from the bottom up. The answers are all there before anything is done with one of them.
//!
//! | recorded | the backend says | then |
//! |---|---|---|
//! | `Up` | present, and so is all below it | up; kept for its holders, or until the recovery is settled |
//! | `Up` | present, and what is below it is not, or in doubt | pending: torn down when the recovery is settled, or before anybody uses its key |
//! | `Begun`, `Ending` | present or unknown | pending |
//! | `Up` | unknown | pending |
//! | any | absent, or the VM is gone | the record goes |
//! | what makes no sense | anything else | refused: it stays as it is, in the VM and in the journal, and so does what it names |
//!
//! What is pending keeps what is below it up until it is torn down, so that no disk is detached while it may be mounted.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;

use crate::holders::Holders;
use crate::journal::{Journal, RecordKey, Recorded, Recorder};
use crate::release::{ReleaseError, Releasing};
use crate::{
    Attachment, BackendError, Drained, Error, ErrorKind, HolderName, Manager, ManagerBuilder,
    Mount, Snapshot, Stack, Step, View,
};

mod adopt;

use adopt::Adopted;

/// What a manager found of the process before, between [`ManagerBuilder::recover`] and [`settle`](Self::settle).
///
/// ```
/// use blockmount::testing::FakeVm;
/// use blockmount::{HolderName, Manager, MountOptions, MountRequest, Disk};
/// # use blockmount::journal::Journal;
/// # use blockmount::testing::MemoryJournal;
///
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
/// # runtime.block_on(async {
/// # let (vm, journal) = (FakeVm::new(), MemoryJournal::new());
/// # let builder = |vm: &FakeVm| {
/// #     Manager::builder().transport(vm.clone()).unplugger(vm.clone()).mounter(vm.clone())
/// # };
/// let web = HolderName::new("web")?;
/// let recovery = builder(&vm).recover(journal.clone()).await?;
/// let request = MountRequest::new(MountOptions::read_only()).held_by(web.clone());
/// let layer = Disk::virtual_disk("/images/base.erofs").read_only();
/// let mount = recovery.manager().add(&layer, &request).await?;
/// let path = mount.path().to_owned();
/// # std::mem::forget(mount);
///
/// // The process is killed; the next one finds the mount again.
/// # let (vm, journal) = (vm.restart(), journal.restart());
/// let recovery = builder(&vm).recover(journal).await?;
/// let mount = recovery.claim(&web)?.into_mount().ok_or("it is a mount")?;
/// assert_eq!(mount.path(), path);
/// let manager = recovery.manager().clone();
/// let settled = recovery.settle().await; // nobody else comes back
/// assert!(settled.failed.is_empty());
/// mount.release().await?;
/// assert!(manager.drain().await.is_clean());
/// # vm.assert_empty();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A recovery that is dropped and not settled leaves everything as it is, for the next one: what was not claimed
/// stays in the VM and in the journal, and counts as in use in this manager.
#[must_use = "settle it once all holders have come back"]
pub struct Recovery {
    manager: Manager,
    holders: Holders,
    report: Report,
    claims: Mutex<HashMap<HolderName, Claim>>,
    /// What is kept up for no holder, until it is settled.
    unclaimed: Vec<Held>,
    settled: bool,
}

/// What waits for a holder.
enum Claim {
    Held(Held),
    /// What it held is not there any more, or not in whole.
    Lost(RecordKey),
    /// What is recorded of it makes no sense, and stays.
    Refused(Error),
}

/// A handle that was found again.
#[derive(Debug)]
#[must_use = "dropping a handle releases it in the background, where an error is only logged"]
#[non_exhaustive]
pub enum Held {
    /// An attachment.
    Attachment(Attachment),
    /// A mount.
    Mount(Mount),
    /// A stack.
    Stack(Stack),
    /// A view.
    View(View),
}

/// What a recovery found.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// Each attachment, mount, stack and view that the journal remembers, from the bottom up.
    pub found: Vec<Found>,
    /// Each holder, and whether its handle can be claimed.
    pub holders: Vec<FoundHolder>,
}

/// One thing that the journal remembers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Found {
    /// What it is.
    pub what: RecordKey,
    /// What is there of it.
    pub state: FoundState,
    /// Why the backend could not say, or why the record is refused, if so.
    pub error: Option<Error>,
}

/// What is there of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FoundState {
    /// It is up.
    Up,
    /// It may be there, in whole or in part, and is torn down when the recovery is settled.
    Pending,
    /// It is not there.
    Gone,
    /// No manager can have written its record, or it contradicts another, such as two disks in one place. It stays as it is,
    /// in the VM and in the journal, and so does what it names; nobody can share it.
    Refused,
}

/// A holder that the journal remembers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FoundHolder {
    /// The name.
    pub name: HolderName,
    /// What it holds.
    pub of: RecordKey,
    /// Whether that is up, so that it can be claimed.
    pub is_up: bool,
}

impl ManagerBuilder {
    /// The manager of what a journal remembers, which writes to that journal from now on. An empty journal makes a manager
    /// that has nothing to recover. This is the only way to give a manager a journal.
    ///
    /// It asks the backends what is really there of it, and removes the records of what is not; in the VM it changes nothing.
    /// Dropping the future, or ending the process, leaves everything to the next recovery.
    ///
    /// # Errors
    ///
    /// What the journal answers when it is read. A record that makes no sense is no error of the whole: the
    /// [report](Recovery::report) has it as [`FoundState::Refused`].
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn recover(self, journal: impl Journal) -> Result<Recovery, Error> {
        let journal: Arc<dyn Journal> = Arc::new(journal);
        let records = journal.load();
        let records = records.map_err(|cause| Error::new(Step::Recover, cause))?;
        let recorded = Recorded::sort(records);
        let holders = Holders::new(Recorder::new(journal));
        let manager = self.build_with(holders.clone());
        let adopted = Adopted::ask(&manager, recorded).await;
        Ok(adopted.restore(manager, holders))
    }

    /// The manager of what was frozen elsewhere, such as on the host that a VM has migrated from: a recovery from these
    /// records, which are written to `journal` if one is given. That must be empty.
    ///
    /// The disks are identified anew, since a file has another id on each host; their names can be
    /// [rewritten](Snapshot::rewrite_sources) before.
    ///
    /// # Errors
    ///
    /// What the transport answers when it identifies a disk, and what the journal answers; `Conflict` if that has records.
    /// Nothing is then adopted.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn restore(
        self,
        mut snapshot: Snapshot,
        journal: Option<Arc<dyn Journal>>,
    ) -> Result<Recovery, Error> {
        let recorder = journal.clone().map(Recorder::new).unwrap_or_default();
        let holders = Holders::new(recorder);
        let manager = self.build_with(holders.clone());
        let mut ids = Vec::new();
        for disk in snapshot.disks() {
            ids.push(manager.attachments().identify(&disk).await?);
        }
        snapshot.reidentify(ids);
        let recorded = snapshot.recorded()?;
        if let Some(journal) = journal {
            write(&*journal, &snapshot).map_err(|cause| Error::new(Step::Record, cause))?;
        }
        let adopted = Adopted::ask(&manager, recorded).await;
        Ok(adopted.restore(manager, holders))
    }
}

/// Writes a snapshot to a journal that has nothing else.
fn write(journal: &dyn Journal, snapshot: &Snapshot) -> Result<(), BackendError> {
    if !journal.load()?.is_empty() {
        return Err(BackendError::conflict(
            "the journal has records of another manager; recover from that, or give an empty one",
        ));
    }
    let mut records = snapshot.records().iter();
    records.try_for_each(|record| journal.put(record))
}

impl Recovery {
    /// The manager. It can be used at once, also for what is waiting to be claimed: that is shared.
    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    /// What was found.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The handle that a holder had, as it had it.
    ///
    /// # Errors
    ///
    /// `NotFound` if the journal does not know the name, or if what it held is not there any more; that is said once.
    /// `Conflict` if the handle has been claimed, or the name is in use. `Invalid` if what is recorded of it makes no sense;
    /// that stays as it is.
    pub fn claim(&self, name: &HolderName) -> Result<Held, Error> {
        let refused = |cause| Err(Error::new(Step::Recover, cause));
        let mut claims = self.claims.lock();
        match claims.remove(name) {
            Some(Claim::Held(held)) => Ok(held),
            Some(Claim::Refused(why)) => {
                claims.insert(name.clone(), Claim::Refused(why.clone()));
                Err(why)
            }
            Some(Claim::Lost(of)) => {
                forget(&self.holders, name);
                refused(BackendError::not_found(format!(
                    "holder {name} has lost {of}: the restart has left nothing of it, or not all"
                )))
            }
            None if self.holders.is_taken(name) => refused(BackendError::conflict(format!(
                "holder {name} has its handle already"
            ))),
            None => refused(BackendError::not_found(format!(
                "the journal knows no holder {name}"
            ))),
        }
    }

    /// Releases what was not claimed, from the top down, and runs all pending tear-downs.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-downs.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn settle(mut self) -> Drained {
        self.settled = true;
        let mut releasing = Vec::new();
        for (name, claim) in self.claims.get_mut().drain() {
            match claim {
                Claim::Held(held) => {
                    warn!(holder = %name, "a holder has not come back; what it held is released");
                    releasing.push(held.releasing());
                }
                Claim::Lost(_) => forget(&self.holders, &name),
                Claim::Refused(error) => {
                    warn!(holder = %name, %error, "what a holder held is left as it is");
                }
            }
        }
        let unclaimed = std::mem::take(&mut self.unclaimed);
        releasing.extend(unclaimed.into_iter().map(Held::releasing));
        let mut lost = Vec::new();
        for release in releasing {
            if let Err(error) = release.await {
                let errors = error.into_errors();
                // Anything else is tried once more by the drain, and reported by it.
                lost.extend(errors.filter(|error| error.kind() == ErrorKind::LostWrites));
            }
        }
        let mut drained = self.manager.drain().await;
        drained.failed.extend(lost);
        drained
    }
}

/// Removes the record of a holder that has lost what it held.
fn forget(holders: &Holders, name: &HolderName) {
    holders.records().remove(|| RecordKey::Holder(name.clone()));
}

impl Drop for Recovery {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        // Released, they would tear down what a next recovery can find.
        for (_, claim) in self.claims.get_mut().drain() {
            if let Claim::Held(held) = claim {
                held.abandon();
            }
        }
        std::mem::take(&mut self.unclaimed)
            .into_iter()
            .for_each(Held::abandon);
    }
}

impl Held {
    /// The attachment, if it is one; anything else is released in the background.
    pub fn into_attachment(self) -> Option<Attachment> {
        match self {
            Held::Attachment(attachment) => Some(attachment),
            _ => None,
        }
    }

    /// The mount, if it is one; anything else is released in the background.
    pub fn into_mount(self) -> Option<Mount> {
        match self {
            Held::Mount(mount) => Some(mount),
            _ => None,
        }
    }

    /// The stack, if it is one; anything else is released in the background.
    pub fn into_stack(self) -> Option<Stack> {
        match self {
            Held::Stack(stack) => Some(stack),
            _ => None,
        }
    }

    /// The view, if it is one; anything else is released in the background.
    pub fn into_view(self) -> Option<View> {
        match self {
            Held::View(view) => Some(view),
            _ => None,
        }
    }

    /// Releases it, whatever it is.
    ///
    /// # Errors
    ///
    /// What went wrong; see [`ReleaseError`] for how to go on.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the tear-down; an error is then logged.
    pub fn release(self) -> impl Future<Output = Result<(), ReleaseError>> + Send + 'static {
        self.releasing()
    }

    /// Leaves it as it is, for the next recovery.
    fn abandon(self) {
        match self {
            Held::Attachment(attachment) => attachment.abandon(),
            Held::Mount(mount) => mount.abandon(),
            Held::Stack(stack) => stack.abandon(),
            Held::View(view) => view.abandon(),
        }
    }

    fn releasing(self) -> Releasing {
        match self {
            Held::Attachment(attachment) => attachment.releasing(),
            Held::Mount(mount) => mount.releasing(),
            Held::Stack(stack) => stack.releasing(),
            Held::View(view) => view.releasing(),
        }
    }
}

impl fmt::Debug for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recovery")
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}
