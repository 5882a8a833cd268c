//! What the service does: lists are activated under names, and found again by the next process.

mod activating;
mod deactivating;
mod inspect;
mod labels;
mod recover;
mod vms;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::Turns;
use tokio::sync::{Notify, RwLock, oneshot};
use tonic::Status;

use super::entry::Entry;
use super::filter::Filter;
use super::identifiers::{check_labels, check_name, check_namespace};
use super::record::{Info, Key};
use super::status::of_backend;
use super::vm::Vm;
use crate::Mount;

pub use inspect::{ActivationState, ActivationStatus};

/// Lists that are activated. Cloning is cheap, and clones are the same.
///
/// Each runs in a task of its own, those of one name in their order.
#[derive(Debug, Clone)]
pub struct Activations(Arc<Shared>);

/// Where activations are, and how long they wait for their owners.
#[derive(Debug, Clone)]
pub struct Options {
    pub(super) root: PathBuf,
    pub(super) records: PathBuf,
    grace: Option<Duration>,
    pub(super) here: bool,
}

/// A list to activate.
#[derive(Debug, Clone, Default)]
pub struct Activate {
    /// The namespace in which the name is to be its own.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The list.
    pub mounts: Vec<Mount>,
    /// Labels, which are kept as they are. [`VM_LABEL`](super::VM_LABEL) says in which virtual machine it is to be, and may be left out
    /// where there is one.
    pub labels: BTreeMap<String, String>,
    /// Whether it is released when the server ends ([`Activations::leave`]), or by the next one.
    pub temporary: bool,
}

#[derive(Debug)]
struct Shared {
    /// At least one; those with names in the order of these.
    vms: Mutex<Vec<Arc<Vm>>>,
    turns: Turns<Key>,
    /// Whether everything is left to the next process. Each call that changes something reads it for as long as it runs.
    is_left: Arc<RwLock<bool>>,
    /// Held for no I/O.
    table: Mutex<HashMap<Key, Entry>>,
    /// After each call that may have left a machine with nothing in it, and has been told so.
    ended: Notify,
}

impl Options {
    /// Mount points below `root`, an absolute path in the guest; records in the directory `records` of this host, whose parent
    /// is there. An activation of an earlier process is kept for as long as it takes.
    pub fn new(root: impl Into<PathBuf>, records: impl Into<PathBuf>) -> Self {
        Options {
            root: root.into(),
            records: records.into(),
            grace: None,
            here: false,
        }
    }

    /// For a guest that is this host: see [`plan_here`](crate::plan_here).
    #[must_use]
    pub fn here(mut self) -> Self {
        self.here = true;
        self
    }

    /// Releases what earlier processes have activated and no client asks for within this time: by Info, by Update, or by Activate,
    /// which says that it is there.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = Some(grace);
        self
    }
}

impl Activations {
    /// Activates a list, all or nothing.
    ///
    /// # Errors
    ///
    /// By the codes of [the service](super).
    ///
    /// # Cancel safety
    ///
    /// What was activated for a caller who has gone is taken back.
    pub async fn activate(&self, request: Activate) -> Result<Info, Status> {
        check_namespace(&request.namespace)?;
        check_name(&request.name)?;
        check_labels(&request.labels)?;
        let key = (request.namespace.clone(), request.name.clone());
        // Dropped with this future.
        let (_waiting, gone) = oneshot::channel();
        let this = self.clone();
        let call = async move { this.activate_in_turn(request, gone).await };
        self.in_turn(key, call).await
    }

    /// Runs a call after all earlier ones for its name, to its end even if the caller gives up, unless everything was left.
    async fn in_turn<T, F>(&self, key: Key, call: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let shared = self.0.clone();
        let call = async move {
            let is_left = shared.is_left.clone().read_owned().await;
            let done = match *is_left {
                false => call.await,
                true => Err(Status::unavailable("the server is ending")),
            };
            shared.ended.notify_waiters();
            Ok(done)
        };
        let answer = self.0.turns.run(key, call).await;
        answer.map_err(|error| of_backend(&error))?
    }

    /// Tells of one.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`.
    pub fn info(&self, namespace: &str, name: &str) -> Result<Info, Status> {
        check_namespace(namespace)?;
        let mut table = self.table();
        let entry = table.get_mut(&(namespace.to_owned(), name.to_owned()));
        let entry = entry.ok_or_else(|| not_found(name))?;
        entry.unclaimed = false;
        Ok(entry.record.info.clone())
    }

    /// Tells of all in a namespace that pass, by their names.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT` for what is no namespace.
    pub fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<Info>, Status> {
        check_namespace(namespace)?;
        let table = self.table();
        let infos = table.values().map(|entry| &entry.record.info);
        let infos = infos.filter(|info| info.namespace == namespace && filter.passes(info));
        let mut infos: Vec<Info> = infos.cloned().collect();
        infos.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(infos)
    }

    /// How many lists are activated, in all namespaces.
    pub fn count(&self) -> usize {
        self.table().len()
    }

    /// Leaves all that is activated to the next process, once the calls under way have ended, and tells what that is. What is
    /// temporary is released; if it cannot be, the next process does it. Later calls are `UNAVAILABLE`.
    pub async fn leave(&self) -> Vec<ActivationStatus> {
        *self.0.is_left.write().await = true;
        self.release_temporary().await;
        let left = self.inspect();
        let table = std::mem::take(&mut *self.table());
        // Released, they would be torn down.
        std::mem::forget(table);
        left
    }

    /// Held for no I/O.
    fn vms(&self) -> MutexGuard<'_, Vec<Arc<Vm>>> {
        self.0.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(name: &str) -> Status {
    let name = blockmount::printable(name).shortened(256);
    Status::not_found(format!("there is no mount {name}"))
}
