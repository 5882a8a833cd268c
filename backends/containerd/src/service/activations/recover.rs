//! Taking over what an earlier process has activated.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use blockmount::{BackendError, Recovery, Turns};
use tokio::sync::Notify;

use super::super::entry::{Entry, Holding, take_over};
use super::super::record::{Key, Progress, Record};
use super::super::vm::{Vm, VmName};
use super::deactivating::release_unclaimed;
use super::{Activations, Options, Shared};

/// What an earlier process has left in a virtual machine.
pub(super) struct Left {
    pub(super) vm: Arc<Vm>,
    pub(super) recovery: Recovery,
    pub(super) records: Vec<Record>,
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
        Self::recover_all([(None, recovery, options)]).await
    }

    /// The same for several virtual machines, whose names differ. In which of them a list is activated its label
    /// [`VM_LABEL`](crate::service::VM_LABEL) says; all else is done wherever an activation is. Each has records of its own.
    ///
    /// # Errors
    ///
    /// If the records cannot be read, or an activation with the same name is in two virtual machines.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, or for no virtual machine at all.
    pub async fn recover_in_vms(
        vms: impl IntoIterator<Item = (VmName, Recovery, Options)>,
    ) -> Result<Self, BackendError> {
        let vms = vms.into_iter();
        Self::recover_all(vms.map(|(name, recovery, options)| (Some(name), recovery, options)))
            .await
    }

    async fn recover_all(
        vms: impl IntoIterator<Item = (Option<VmName>, Recovery, Options)>,
    ) -> Result<Self, BackendError> {
        let (mut left, mut graces) = (Vec::new(), Vec::new());
        for (name, recovery, options) in vms {
            let (vm, records) = Vm::load(name, &recovery, &options).await?;
            let vm = Arc::new(vm);
            graces.extend(options.grace.map(|grace| (vm.name.clone(), grace)));
            left.push(Left {
                vm,
                recovery,
                records,
            });
        }
        assert!(!left.is_empty(), "a service is for some virtual machine");
        left.sort_by(|one, other| one.vm.name.cmp(&other.vm.name));
        // Nothing is released before all of it is known to make sense.
        ensure_unique(&left)?;
        let vms = left.iter().map(|left| left.vm.clone()).collect();
        let mut table = HashMap::new();
        for left in left {
            left.take_over(&mut table).await;
        }
        let shared = Arc::new(Shared {
            vms: Mutex::new(vms),
            turns: Turns::default(),
            is_left: Arc::default(),
            table: Mutex::new(table),
            ended: Notify::new(),
        });
        for (name, grace) in graces {
            tokio::spawn(release_unclaimed(Arc::downgrade(&shared), name, grace));
        }
        Ok(Activations(shared))
    }
}

impl Left {
    /// Has what is whole in the table, and releases the rest.
    pub(super) async fn take_over(self, table: &mut HashMap<Key, Entry>) {
        let Left {
            vm,
            recovery,
            records,
        } = self;
        for record in records {
            let (id, key) = (record.id, record.info.key());
            match take_over(&recovery, &vm, record).await {
                // What could not be released has its name only as long as nothing else has it.
                Some(entry) if matches!(entry.held, Holding::Unreleased(_)) => {
                    table.entry(key).or_insert(entry);
                }
                Some(entry) => drop(table.insert(key, entry)),
                None => vm.store.remove(id).await,
            }
        }
        let settled = recovery.settle().await;
        for error in &settled.failed {
            tracing::warn!(%error, "what an earlier process has left is not all released");
        }
    }
}

/// Whether an activation is there after a restart, if it is whole.
pub(super) fn is_kept(record: &Record) -> bool {
    record.progress == Progress::Up && !record.temporary
}

/// Refuses two activations with one name, of which one was made while the other's virtual machine was not served.
fn ensure_unique(left: &[Left]) -> Result<(), BackendError> {
    let mut seen: HashMap<Key, &Vm> = HashMap::new();
    for Left { vm, records, .. } in left {
        for record in records.iter().filter(|record| is_kept(record)) {
            let Some(other) = seen.insert(record.info.key(), vm) else {
                continue;
            };
            return Err(in_both(record, other, vm));
        }
    }
    Ok(())
}

/// The error of a name that is activated in two virtual machines.
pub(super) fn in_both(record: &Record, one: &Vm, other: &Vm) -> BackendError {
    let (namespace, name) = record.info.key();
    let [one, other] = [one, other].map(|vm| vm.called().unwrap_or_default());
    BackendError::conflict(format!(
        "{name:?} is activated in namespace {namespace} of both virtual machines {one} and {other}"
    ))
}
