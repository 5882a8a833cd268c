//! Activating a list, in the turn of its name.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use tonic::Status;

use super::super::entry::{Entry, Holding};
use super::super::record::{Info, Progress, Record, holder_of};
use super::super::status::{of_backend, of_invalid, of_perform};
use super::super::vm::{VM_LABEL, Vm};
use super::{Activate, Activations};
use crate::{Mount, Performed, Plan, holders, perform, plan, plan_here};

impl Activations {
    pub(super) async fn activate_in_turn(
        &self,
        mut request: Activate,
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
        let vm = self.choose(&request.labels)?;
        vm.label(&mut request.labels)?;
        let id = vm.next.fetch_add(1, Ordering::Relaxed);
        let list = request.mounts;
        let root = vm.root.join(id.to_string());
        let planned = match vm.here {
            true => plan_here(&list, &root),
            false => plan(&list, &root),
        };
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
            is_writable: plan.is_writable(),
            info: Info {
                namespace: request.namespace,
                name: request.name,
                active: Vec::new(),
                system: Vec::new(),
                labels: request.labels,
            },
            holders: held.map_err(|error| Status::internal(error.to_string()))?,
        };
        let put = vm.store.put(&record).await;
        put.map_err(|error| of_backend(&error))?;
        let performed = match vm.perform(&plan, &list, &mut record).await {
            Ok(performed) => performed,
            Err(status) => {
                vm.store.remove(id).await;
                return Err(status);
            }
        };
        let info = record.info.clone();
        let entry = Entry {
            vm,
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

    /// The virtual machine that the label names; the only one, if it names none. One that is lost takes nothing any more: what is
    /// shared there looks alive to its manager. Nor does one that is to go.
    fn choose(&self, labels: &BTreeMap<String, String>) -> Result<Arc<Vm>, Status> {
        let vm = self.named(labels)?;
        match vm.why_lost() {
            None if vm.is_retired.load(Ordering::Relaxed) => Err(Status::unavailable(format!(
                "the virtual machine {} takes nothing more: it is about to be removed from this service",
                vm.called().unwrap_or_default()
            ))),
            None => Ok(vm),
            Some(why) => Err(Status::unavailable(why)),
        }
    }

    fn named(&self, labels: &BTreeMap<String, String>) -> Result<Arc<Vm>, Status> {
        let vms = self.vms();
        let wanted = labels.get(VM_LABEL);
        let found = match (wanted, &vms[..]) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(wanted), _) => vms.iter().find(|vm| vm.called() == Some(wanted)),
        };
        found.cloned().ok_or_else(|| {
            let names: Vec<&str> = vms.iter().filter_map(|vm| vm.called()).collect();
            let known = match names.is_empty() {
                true => "this service is for one guest, which has no name".to_owned(),
                false => format!("there are: {}", names.join(", ")),
            };
            Status::invalid_argument(match wanted {
                Some(wanted) => format!(
                    "the label {VM_LABEL} names no virtual machine of this service: {}; {known}",
                    blockmount::printable(wanted).shortened(256)
                ),
                None => format!("the label {VM_LABEL} has to name a virtual machine; {known}"),
            })
        })
    }
}

impl Vm {
    /// Performs a plan, and records that it is up.
    async fn perform(
        &self,
        plan: &Plan,
        list: &[Mount],
        record: &mut Record,
    ) -> Result<Performed, Status> {
        let performed = perform(&self.manager, plan, &holder_of(record.id)).await;
        let performed = performed.map_err(|error| of_perform(&error))?;
        let placed = plan.placed(list, performed.points());
        let recorded = match placed {
            Ok(placed) => {
                record.progress = Progress::Up;
                record.info.fill(placed, record.temporary);
                let put = self.store.put(record).await;
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
}
