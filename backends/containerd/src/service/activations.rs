//! What the service does: lists are activated under names, and found again by the next process.

mod activating;
mod deactivating;
mod inspect;
mod labels;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::{BackendError, Manager, Recovery, Turns, blocking};
use tokio::sync::{RwLock, oneshot};
use tonic::Status;

use super::entry::{Entry, take_over};
use super::filter::Filter;
use super::identifiers::{check_labels, check_name, check_namespace};
use super::record::{Info, Key, id_of};
use super::status::of_backend;
use super::store::Store;
use crate::Mount;
use deactivating::release_unclaimed;

pub use inspect::{ActivationState, ActivationStatus};

/// Lists that are activated. Cloning is cheap, and clones are the same.
///
/// Each runs in a task of its own, those of one name in their order.
#[derive(Debug, Clone)]
pub struct Activations(Arc<Shared>);

/// Where activations are, and how long they wait for their owners.
#[derive(Debug, Clone)]
pub struct Options {
    root: PathBuf,
    records: PathBuf,
    grace: Option<Duration>,
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
    /// Labels, which are kept as they are.
    pub labels: BTreeMap<String, String>,
    /// Whether it ends with the server.
    pub temporary: bool,
}

#[derive(Debug)]
struct Shared {
    manager: Manager,
    root: PathBuf,
    store: Store,
    next: AtomicU64,
    turns: Turns<Key>,
    /// Whether everything is left to the next process. Each call that changes something reads it for as long as it runs.
    is_left: Arc<RwLock<bool>>,
    /// Held for no I/O.
    table: Mutex<HashMap<Key, Entry>>,
}

impl Options {
    /// Mount points below `root`, an absolute path in the guest; records in the directory `records` of this host, whose parent
    /// is there. An activation of an earlier process is kept for as long as it takes.
    pub fn new(root: impl Into<PathBuf>, records: impl Into<PathBuf>) -> Self {
        Options {
            root: root.into(),
            records: records.into(),
            grace: None,
        }
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
    /// Takes over what an earlier process has activated, and releases all else that it has left: what was half done, what was
    /// temporary, and what is not there in whole any more.
    ///
    /// # Errors
    ///
    /// If the records cannot be read.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn recover(recovery: Recovery, options: Options) -> Result<Self, BackendError> {
        let directory = options.records;
        let loaded = blocking(move || {
            let store = Store::open(&directory)?;
            let records = store.load()?;
            Ok((store, records))
        });
        let (store, records) = loaded.await?;
        let held = recovery.report().holders.iter();
        let held = held.filter_map(|holder| id_of(&holder.name));
        let last = held.chain(records.iter().map(|record| record.id)).max();
        let mut table = HashMap::new();
        for record in records {
            let (id, key) = (record.id, record.info.key());
            match take_over(&recovery, record).await {
                Some(entry) => drop(table.insert(key, entry)),
                None => store.remove(id).await,
            }
        }
        let manager = recovery.manager().clone();
        let settled = recovery.settle().await;
        for error in &settled.failed {
            tracing::warn!(%error, "what an earlier process has left is not all released");
        }
        let shared = Arc::new(Shared {
            manager,
            root: options.root,
            store,
            next: AtomicU64::new(last.map_or(0, |last| last + 1)),
            turns: Turns::default(),
            is_left: Arc::default(),
            table: Mutex::new(table),
        });
        if let Some(grace) = options.grace {
            tokio::spawn(release_unclaimed(Arc::downgrade(&shared), grace));
        }
        Ok(Activations(shared))
    }

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
        let is_left = self.0.is_left.clone();
        let call = async move {
            let is_left = is_left.read_owned().await;
            Ok(match *is_left {
                false => call.await,
                true => Err(Status::unavailable("the server is ending")),
            })
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

    /// Leaves all that is activated to the next process, once the calls under way have ended, and says how many that are. Later
    /// calls are `UNAVAILABLE`.
    pub async fn leave(&self) -> usize {
        *self.0.is_left.write().await = true;
        let count = self.count();
        let table = std::mem::take(&mut *self.table());
        // Released, they would be torn down.
        std::mem::forget(table);
        count
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(name: &str) -> Status {
    let name = blockmount::printable(name).shortened(256);
    Status::not_found(format!("there is no mount {name}"))
}
