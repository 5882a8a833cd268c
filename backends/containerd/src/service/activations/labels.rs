//! Changing the labels of an activation.

use std::collections::BTreeMap;

use tonic::Status;

use super::super::identifiers::{check_labels, check_namespace};
use super::super::record::{Info, Key};
use super::super::status::of_backend;
use super::{Activations, not_found};

impl Activations {
    /// Changes the labels of one. Of `fields`, `labels` replaces all, and `labels.KEY` the one that `labels` has, or removes it; no
    /// field at all means all labels.
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`; `INVALID_ARGUMENT` for other fields, which cannot be changed, and for another
    /// [`VM_LABEL`](crate::service::VM_LABEL), which stays where it is left out.
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
        let (vm, mut record) = {
            let mut table = self.table();
            let entry = table.get_mut(key).ok_or_else(|| not_found(&key.1))?;
            entry.unclaimed = false;
            (entry.vm.clone(), entry.record.clone())
        };
        record.info.update_labels(labels, &fields)?;
        check_labels(&record.info.labels)?;
        vm.label(&mut record.info.labels)?;
        let put = vm.store.put(&record).await;
        put.map_err(|error| of_backend(&error))?;
        let info = record.info.clone();
        if let Some(entry) = self.table().get_mut(key) {
            entry.record = record;
        }
        Ok(info)
    }
}
