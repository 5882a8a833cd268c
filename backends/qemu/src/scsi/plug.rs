//! One address: what QEMU has there, and the way in and out.

use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use blockmount_scsi::ScsiAddress;
use serde::Deserialize;
use serde_json::json;

use super::image::Image;
use crate::qmp::{Event, Events, Qmp, QmpError};

/// Where QEMU keeps the devices that have ids.
pub(super) const PERIPHERAL: &str = "/machine/peripheral";

/// One address of a VM.
pub(super) struct Plug<'a> {
    pub(super) qmp: &'a Qmp,
    /// The id of the controller.
    pub(super) controller: &'a str,
    pub(super) address: ScsiAddress,
    /// The id of the device, and the name of its node.
    pub(super) id: String,
}

/// How far an attachment came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Node,
    Device,
}

/// What is at an address.
#[derive(Debug, Clone, Copy)]
struct Presence {
    node: bool,
    device: bool,
}

#[derive(Deserialize)]
pub(super) struct NamedNode {
    #[serde(rename = "node-name")]
    pub(super) name: String,
}

#[derive(Deserialize)]
pub(super) struct Member {
    pub(super) name: String,
}

impl Plug<'_> {
    /// Puts an image at the address. All or nothing.
    pub(super) async fn attach(&self, image: &Image) -> Result<(), BackendError> {
        let node = image.node(&self.id);
        if let Err(error) = self.qmp.execute("blockdev-add", node).await {
            return self.settle(Stage::Node, error).await;
        }
        let device = json!({
            "driver": "scsi-hd",
            "id": self.id,
            "bus": format!("{}.0", self.controller),
            "channel": 0,
            "scsi-id": 0,
            "lun": self.address.lun.get(),
            "drive": self.id,
            "serial": self.id,
            "device_id": self.id,
        });
        match self.qmp.execute("device_add", device).await {
            Ok(_) => Ok(()),
            Err(error) => self.settle(Stage::Device, error).await,
        }
    }

    /// Finds out what a failed attachment has left, and takes it out.
    async fn settle(&self, stage: Stage, failure: QmpError) -> Result<(), BackendError> {
        let tried = format!("cannot attach a disk at SCSI address {}", self.address);
        let was_refused = matches!(failure, QmpError::Refused { .. });
        match failure.kind() {
            ErrorKind::Gone => return Err(failure.while_trying(tried)),
            // It was not sent, and nothing was before.
            ErrorKind::Busy if stage == Stage::Node => return Err(failure.while_trying(tried)),
            _ => {}
        }
        // QEMU does one command after the other: with the answer to this one, the fate of the last is decided.
        let there = match self.presence().await {
            Ok(there) => there,
            Err(error) => return Err(in_doubt(&tried, error)),
        };
        match (stage, there) {
            (Stage::Device, Presence { device: true, .. }) if !was_refused => return Ok(()),
            (Stage::Node, Presence { node, device }) if device || (node && was_refused) => {
                let message = format!(
                    "{tried}: something of an earlier attachment is still there; detach it first"
                );
                return Err(BackendError::uncertain(message).with_source(failure));
            }
            _ => {}
        }
        if there.node
            && let Err(error) = self.remove_node(&mut self.deletions()).await
        {
            return Err(in_doubt(&tried, error));
        }
        let kind = match failure.kind() {
            // Nothing is in doubt any more.
            ErrorKind::Uncertain => ErrorKind::Other,
            kind => kind,
        };
        Err(BackendError::new(kind, tried).with_source(failure))
    }

    /// Takes out what is at the address, from whatever half of the way.
    pub(super) async fn detach(&self) -> Result<(), BackendError> {
        // Before anything is asked for, so that nothing is missed.
        let mut deletions = self.deletions();
        self.remove_device(&mut deletions).await?;
        self.remove_node(&mut deletions).await
    }

    fn deletions(&self) -> Events {
        self.qmp.events("DEVICE_DELETED")
    }

    fn timeout(&self) -> Duration {
        self.qmp.deadlines().call
    }

    fn is_ours(&self, event: &Event) -> bool {
        event.data["device"] == self.id.as_str()
    }

    async fn remove_device(&self, deletions: &mut Events) -> Result<(), BackendError> {
        let tried = || format!("cannot unplug {} from its controller", self.id);
        match self.qmp.execute("device_del", json!({"id": self.id})).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.while_trying(tried())),
        }
        let waited = deletions.find(self.timeout(), |event| self.is_ours(event));
        let error = match waited.await {
            Ok(_) => return Ok(()),
            Err(error @ QmpError::Gone { .. }) => return Err(error.while_trying(tried())),
            Err(error) => error,
        };
        // It may have been among the events that were missed.
        match self.presence().await {
            Ok(Presence { device: false, .. }) => Ok(()),
            Ok(_) => Err(error.while_trying(tried())),
            Err(error) => Err(error.while_trying(tried())),
        }
    }

    async fn remove_node(&self, deletions: &mut Events) -> Result<(), BackendError> {
        let tried = || format!("cannot close the image of {}", self.id);
        let name = json!({"node-name": self.id});
        let refusal = match self.qmp.execute("blockdev-del", &name).await {
            Ok(_) => return Ok(()),
            Err(error @ QmpError::Refused { .. }) => error,
            Err(error) => return Err(error.while_trying(tried())),
        };
        match self.presence().await {
            Ok(Presence { node: false, .. }) => return Ok(()),
            Ok(Presence { device: true, .. }) => return Err(busy(tried(), refusal)),
            Ok(_) => {}
            Err(error) => return Err(error.while_trying(tried())),
        }
        // A device that somebody else has unplugged has lost its name, and holds its node until it is deleted.
        let waited = deletions.find(self.timeout(), |event| self.is_ours(event));
        if let Err(error @ QmpError::Gone { .. }) = waited.await {
            return Err(error.while_trying(tried()));
        }
        // Deleted, missed or late: the node knows.
        match self.qmp.execute("blockdev-del", &name).await {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Refused { .. }) => Err(busy(tried(), error)),
            Err(error) => Err(error.while_trying(tried())),
        }
    }

    async fn presence(&self) -> Result<Presence, QmpError> {
        let devices = devices(self.qmp).await?;
        let nodes = nodes(self.qmp).await?;
        Ok(Presence {
            device: devices.iter().any(|device| device.name == self.id),
            node: nodes.iter().any(|node| node.name == self.id),
        })
    }
}

/// All nodes that QEMU has.
pub(super) async fn nodes(qmp: &Qmp) -> Result<Vec<NamedNode>, QmpError> {
    qmp.query("query-named-block-nodes", json!({"flat": true}))
        .await
}

/// All devices that have ids, and some that are none.
pub(super) async fn devices(qmp: &Qmp) -> Result<Vec<Member>, QmpError> {
    qmp.query("qom-list", json!({"path": PERIPHERAL})).await
}

/// The image has another user in QEMU: a job or an export that somebody has made.
fn busy(tried: String, refusal: QmpError) -> BackendError {
    BackendError::busy(tried).with_source(refusal)
}

/// What is there could not be found out, or not be taken out.
fn in_doubt(tried: &str, error: impl Into<BackendError>) -> BackendError {
    let error = error.into();
    match error.kind() {
        ErrorKind::Gone => BackendError::gone(tried).with_source(error),
        _ => BackendError::uncertain(tried).with_source(error),
    }
}
