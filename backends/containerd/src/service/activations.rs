//! What the service does: lists are activated under names, and found again by the next process.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use blockmount::{BackendError, ErrorKind, Manager, Recovery, Turns, blocking};
use tokio::sync::{RwLock, oneshot};
use tonic::Status;

use super::entry::{Entry, Holding, take_over};
use super::filter::Filter;
use super::identifiers::{check_labels, check_name, check_namespace};
use super::record::{Info, Key, Progress, Record, holder_of, id_of};
use super::status::{of_backend, of_invalid, of_perform, of_release};
use super::store::Store;
use crate::{Mount, Performed, Plan, holders, perform, plan};

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

    async fn activate_in_turn(
        &self,
        request: Activate,
        mut gone: oneshot::Receiver<Infallible>,
    ) -> Result<Info, Status> {
        let key = (request.namespace.clone(), request.name.clone());
        if let Some(entry) = self.table().get_mut(&key) {
            entry.unclaimed = false;
            return Err(Status::already_exists(format!(
                "mount {:?} is there already",
                key.1
            )));
        }
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let list = request.mounts;
        let planned = plan(&list, &self.0.root.join(id.to_string()));
        let plan = planned.map_err(|error| of_invalid(&error))?;
        if plan.steps.is_empty() {
            return Err(Status::unimplemented(
                "nothing in the list is for block devices",
            ));
        }
        let held = holders(&plan, &holder_of(id));
        let mut record = Record {
            id,
            progress: Progress::Begun,
            temporary: request.temporary,
            info: Info {
                namespace: request.namespace,
                name: request.name,
                active: Vec::new(),
                system: Vec::new(),
                labels: request.labels,
            },
            holders: held.map_err(|error| Status::internal(error.to_string()))?,
        };
        let put = self.0.store.put(&record).await;
        put.map_err(|error| of_backend(&error))?;
        let performed = match self.perform(&plan, &list, &mut record).await {
            Ok(performed) => performed,
            Err(status) => {
                self.0.store.remove(id).await;
                return Err(status);
            }
        };
        let info = record.info.clone();
        let entry = Entry {
            record,
            held: Holding::Up(performed),
            unclaimed: false,
        };
        self.table().insert(key.clone(), entry);
        if matches!(gone.try_recv(), Err(oneshot::error::TryRecvError::Closed)) {
            tracing::info!(
                namespace = key.0,
                name = key.1,
                "the client has gone; what it has activated is taken back"
            );
            self.deactivate_in_turn(&key).await?;
        }
        Ok(info)
    }

    /// Performs a plan, and records that it is up.
    async fn perform(
        &self,
        plan: &Plan,
        list: &[Mount],
        record: &mut Record,
    ) -> Result<Performed, Status> {
        let performed = perform(&self.0.manager, plan, &holder_of(record.id)).await;
        let performed = performed.map_err(|error| of_perform(&error))?;
        let placed = plan.placed(list, performed.points());
        let recorded = match placed {
            Ok(placed) => {
                record.progress = Progress::Up;
                record.info.fill(placed, record.temporary);
                let put = self.0.store.put(record).await;
                put.map_err(|error| of_backend(&error))
            }
            Err(error) => Err(of_invalid(&error)),
        };
        let Err(status) = recorded else {
            return Ok(performed);
        };
        if let Err(error) = performed.release().await {
            tracing::error!(%error, "an activation that has failed is not all taken back");
        }
        Err(status)
    }

    /// Takes an activation back.
    ///
    /// # Errors
    ///
    /// By the codes of [the service](super). Unless that is `DATA_LOSS`, it is there still, and can be deactivated again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, and changes nothing else.
    pub async fn deactivate(&self, namespace: &str, name: &str) -> Result<(), Status> {
        check_namespace(namespace)?;
        let key: Key = (namespace.to_owned(), name.to_owned());
        let (this, of) = (self.clone(), key.clone());
        let call = async move { this.deactivate_in_turn(&of).await };
        self.in_turn(key, call).await
    }

    async fn deactivate_in_turn(&self, key: &Key) -> Result<(), Status> {
        let (held, mut record) = {
            let mut table = self.table();
            let entry = table.get_mut(key).ok_or_else(|| not_found(&key.1))?;
            let held = std::mem::replace(&mut entry.held, Holding::Taken);
            (held, entry.record.clone())
        };
        let released = match held {
            Holding::Up(performed) => {
                record.progress = Progress::Ending;
                if let Err(error) = self.0.store.put(&record).await {
                    // After a restart it is found out that it is not all there.
                    tracing::warn!(%error, "an activation that ends cannot be recorded as ending");
                }
                performed.release().await
            }
            Holding::Unreleased(unreleased) => unreleased.retry().await,
            Holding::Taken => {
                return Err(Status::internal(
                    "a task that had this activation has ended",
                ));
            }
        };
        match released {
            Err(error) if error.kind() != ErrorKind::LostWrites => {
                let status = of_release(&error);
                if let Some(entry) = self.table().get_mut(key) {
                    entry.record = record;
                    entry.held = Holding::Unreleased(error);
                }
                Err(status)
            }
            released => {
                self.table().remove(key);
                self.0.store.remove(record.id).await;
                released.map_err(|error| of_release(&error))
            }
        }
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

    /// Changes the labels of one. Of `fields`, `labels` replaces all, and `labels.KEY` the one that `labels` has, or removes it; no
    /// field at all means all labels.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`; `INVALID_ARGUMENT` for other fields, which cannot be changed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, and changes nothing else.
    pub async fn update(
        &self,
        namespace: &str,
        name: &str,
        labels: BTreeMap<String, String>,
        fields: Vec<String>,
    ) -> Result<Info, Status> {
        check_namespace(namespace)?;
        check_labels(&labels)?;
        let key: Key = (namespace.to_owned(), name.to_owned());
        let (this, of) = (self.clone(), key.clone());
        let call = async move { this.update_in_turn(&of, labels, fields).await };
        self.in_turn(key, call).await
    }

    async fn update_in_turn(
        &self,
        key: &Key,
        labels: BTreeMap<String, String>,
        fields: Vec<String>,
    ) -> Result<Info, Status> {
        let mut record = {
            let mut table = self.table();
            let entry = table.get_mut(key).ok_or_else(|| not_found(&key.1))?;
            entry.unclaimed = false;
            entry.record.clone()
        };
        record.info.update_labels(labels, &fields)?;
        let put = self.0.store.put(&record).await;
        put.map_err(|error| of_backend(&error))?;
        let info = record.info.clone();
        if let Some(entry) = self.table().get_mut(key) {
            entry.record = record;
        }
        Ok(info)
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

    /// Deactivates everything, for a guest that ends with this process.
    ///
    /// # Errors
    ///
    /// The first that could not be deactivated; the others are, as far as possible.
    pub async fn deactivate_all(&self) -> Result<(), Status> {
        let keys: Vec<Key> = self.table().keys().cloned().collect();
        let ending = keys
            .iter()
            .map(|(namespace, name)| self.deactivate(namespace, name));
        let mut outcome = Ok(());
        for ended in futures_util::future::join_all(ending).await {
            outcome = outcome.and(ended);
        }
        outcome
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(name: &str) -> Status {
    let name = blockmount::printable(name).shortened(256);
    Status::not_found(format!("there is no mount {name}"))
}

/// Deactivates what no client has asked for in this time.
async fn release_unclaimed(shared: Weak<Shared>, grace: Duration) {
    tokio::time::sleep(grace).await;
    let Some(shared) = shared.upgrade() else {
        return;
    };
    let activations = Activations(shared);
    let unclaimed: Vec<Key> = {
        let table = activations.table();
        let unclaimed = table.iter().filter(|(_, entry)| entry.unclaimed);
        unclaimed.map(|(key, _)| key.clone()).collect()
    };
    for key in unclaimed {
        let (this, of) = (activations.clone(), key.clone());
        let release = async move {
            // Somebody may have come while others were released.
            let unclaimed = this.table().get(&of).is_some_and(|entry| entry.unclaimed);
            match unclaimed {
                true => this.deactivate_in_turn(&of).await,
                false => Ok(()),
            }
        };
        let (namespace, name) = &key;
        tracing::warn!(
            namespace,
            name,
            "no client has asked for an activation of an earlier process; it is released"
        );
        if let Err(status) = activations.in_turn(key.clone(), release).await {
            tracing::warn!(
                namespace,
                name,
                error = status.message(),
                "it cannot be released yet"
            );
        }
    }
}
