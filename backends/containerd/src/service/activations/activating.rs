//! Activating a list, in the turn of its name.

use std::convert::Infallible;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use tonic::Status;

use super::super::entry::{Entry, Holding};
use super::super::record::{Info, Progress, Record, holder_of};
use super::super::status::{of_backend, of_invalid, of_perform};
use super::{Activate, Activations};
use crate::{Mount, Performed, Plan, holders, perform, plan};

impl Activations {
    pub(super) async fn activate_in_turn(
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
}
