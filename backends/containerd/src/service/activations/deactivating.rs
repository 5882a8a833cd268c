//! Taking activations back: for a client, for one that does not come, and all at once.

use std::sync::Weak;
use std::time::Duration;

use blockmount::ErrorKind;
use tonic::Status;

use super::super::entry::{Entry, Holding};
use super::super::identifiers::check_namespace;
use super::super::record::{Key, Progress};
use super::super::status::of_release;
use super::super::vm::VmName;
use super::{Activations, Shared, not_found};

impl Activations {
    /// Takes an activation back.
    ///
    /// # Errors
    ///
    /// By the codes of [the service](crate::service). Unless that is `DATA_LOSS`, it is there still, and can be deactivated again.
    /// `DATA_LOSS` also tells that its virtual machine is lost, and something in its list could be written to.
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

    pub(super) async fn deactivate_in_turn(&self, key: &Key) -> Result<(), Status> {
        let (held, vm, mut record) = {
            let mut table = self.table();
            let entry = table.get_mut(key).ok_or_else(|| not_found(&key.1))?;
            let held = std::mem::replace(&mut entry.held, Holding::Taken);
            (held, entry.vm.clone(), entry.record.clone())
        };
        let released = match held {
            Holding::Up(performed) => {
                record.progress = Progress::Ending;
                if let Err(error) = vm.store.put(&record).await {
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
                vm.store.remove(record.id).await;
                released.map_err(|error| of_release(&error))?;
                // To its manager, nothing is left to release where there is no machine any more.
                match vm.why_lost() {
                    Some(why) if record.is_writable => Err(Status::data_loss(format!(
                        "it is deactivated, and what was written there is in the images as far as it was synced: {why}"
                    ))),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Deactivates what ends with the service, once no call is under way. What is lost is left alone: the next process says so.
    pub(super) async fn release_temporary(&self) {
        let keys: Vec<Key> = {
            let table = self.table();
            let is_temporary =
                |entry: &Entry| entry.record.temporary && entry.vm.lost.get().is_none();
            let temporary = table.iter().filter(|(_, entry)| is_temporary(entry));
            temporary.map(|(key, _)| key.clone()).collect()
        };
        let releasing = keys.iter().map(async |key| {
            if let Err(status) = self.deactivate_in_turn(key).await {
                let ((namespace, name), error) = (key, status.message());
                tracing::warn!(
                    namespace,
                    name,
                    error,
                    "a temporary activation is not released as it should be"
                );
            }
        });
        futures_util::future::join_all(releasing).await;
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
}

/// Deactivates what is in a virtual machine and no client has asked for in this time.
pub(super) async fn release_unclaimed(shared: Weak<Shared>, vm: Option<VmName>, grace: Duration) {
    tokio::time::sleep(grace).await;
    let Some(shared) = shared.upgrade() else {
        return;
    };
    let activations = Activations(shared);
    let unclaimed: Vec<Key> = {
        let table = activations.table();
        let unclaimed = table
            .iter()
            .filter(|(_, entry)| entry.unclaimed && entry.vm.name == vm);
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
