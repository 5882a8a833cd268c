//! One device: what QEMU has of it, and the way in and out.

use blockmount::{BackendError, ErrorKind};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{Events, Qmp, QmpError};

/// Where QEMU keeps the devices, and the other objects, that have ids.
const DEVICES: &str = "/machine/peripheral";
const OBJECTS: &str = "/objects";

/// What QEMU says when a device does not fit into the address space that `maxmem` leaves for them
/// (`hw/mem/memory-device.c`). There is no class for it.
const NO_ROOM: [&str; 2] = ["not enough space", "could not find position"];

/// One VPMEM device of a VM.
pub(super) struct Plug<'a> {
    pub(super) qmp: &'a Qmp,
    /// The id of the device, and of the memory behind it.
    pub(super) id: String,
    /// The arguments of `device_add`.
    pub(super) device: Value,
    /// Whether the guest can let go of a device of this kind.
    pub(super) can_be_ejected: bool,
}

/// How far an attachment came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Memory,
    Device,
}

/// What there is of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Presence {
    pub(super) memory: bool,
    pub(super) device: bool,
}

#[derive(Deserialize)]
struct Member {
    name: String,
}

impl Plug<'_> {
    /// Makes a file the memory of the device, which the guest can only read. All or nothing.
    pub(super) async fn attach(&self, path: &str, size: u64) -> Result<(), BackendError> {
        let memory = json!({
            "qom-type": "memory-backend-file",
            "id": self.id,
            "mem-path": path,
            "size": size,
            "align": super::ALIGNMENT,
            "share": true,
            "readonly": true,
        });
        if let Err(error) = self.qmp.execute("object-add", memory).await {
            return self.settle(Stage::Memory, error).await;
        }
        match self.qmp.execute("device_add", &self.device).await {
            Ok(_) => Ok(()),
            Err(error) => self.settle(Stage::Device, error).await,
        }
    }

    /// Finds out what a failed attachment has left, and takes it out.
    async fn settle(&self, stage: Stage, failure: QmpError) -> Result<(), BackendError> {
        let tried = format!("cannot plug {}", self.id);
        match failure.kind() {
            ErrorKind::Gone => return Err(failure.while_trying(tried)),
            // It was not sent, and nothing was before.
            ErrorKind::Busy if stage == Stage::Memory => return Err(failure.while_trying(tried)),
            _ => {}
        }
        // QEMU does one command after the other: with these answers, the fate of the last is decided.
        let there = match self.presence().await {
            Ok(there) => there,
            Err(error) => return Err(in_doubt(tried, error)),
        };
        let was_refused = matches!(failure, QmpError::Refused { .. });
        let earlier = there.device || (there.memory && was_refused);
        match stage {
            Stage::Device if there.device && !was_refused => return Ok(()),
            Stage::Memory if earlier => {
                let message = format!(
                    "{tried}: something of an earlier attachment is still there; detach it first"
                );
                return Err(BackendError::uncertain(message).with_source(failure));
            }
            _ => {}
        }
        if there.memory
            && let Err(error) = self.delete_memory().await
        {
            return Err(in_doubt(tried, error));
        }
        Err(BackendError::new(refusal(&failure), tried).with_source(failure))
    }

    /// Takes the device out, from whatever half of the way.
    pub(super) async fn detach(&self) -> Result<(), BackendError> {
        // Before anything is asked for, so that nothing is missed.
        let mut deletions = self.qmp.events("DEVICE_DELETED");
        let there = self.presence().await;
        let there = there.map_err(|error| self.cannot_unplug(error))?;
        if there.device {
            self.remove_device(&mut deletions).await?;
        }
        if !there.memory {
            return Ok(());
        }
        let tried = || format!("cannot close the file of {}", self.id);
        match self.delete_memory().await {
            Ok(()) => Ok(()),
            Err(error @ QmpError::Refused { .. }) => {
                Err(BackendError::busy(tried()).with_source(error))
            }
            Err(error) => Err(error.while_trying(tried())),
        }
    }

    /// QEMU 7.2 takes out neither kind of device by itself, and says so. What the guest ejects goes, though.
    async fn remove_device(&self, deletions: &mut Events) -> Result<(), BackendError> {
        let asked = self.qmp.execute("device_del", json!({"id": self.id})).await;
        let refusal = match asked {
            Ok(_) => None,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error @ QmpError::Refused { .. }) if self.can_be_ejected => Some(error),
            Err(error @ QmpError::Refused { .. }) => {
                let message = format!("{} can never be unplugged from this VM", self.id);
                return Err(BackendError::unsuitable(message).with_source(error));
            }
            Err(error) => return Err(self.cannot_unplug(error)),
        };
        let timeout = self.qmp.deadlines().call;
        let is_ours = |event: &crate::qmp::Event| event.data["device"] == self.id.as_str();
        let late = match deletions.find(timeout, is_ours).await {
            Ok(_) => return Ok(()),
            Err(error @ QmpError::Gone { .. }) => return Err(self.cannot_unplug(error)),
            Err(error) => error,
        };
        // It may have been among the events that were missed, or before the first.
        match self.presence().await {
            Ok(Presence { device: false, .. }) => Ok(()),
            Ok(_) if refusal.is_some() => {
                let message = format!(
                    "cannot unplug {}: the guest has not ejected it within {timeout:?}; \
                     have the guest let go of it first",
                    self.id
                );
                Err(BackendError::busy(message).with_source(refusal.unwrap_or(late)))
            }
            Ok(_) => Err(self.cannot_unplug(late)),
            Err(error) => Err(self.cannot_unplug(error)),
        }
    }

    /// What is not there is deleted.
    async fn delete_memory(&self) -> Result<(), QmpError> {
        let refused = match self.qmp.execute("object-del", json!({"id": self.id})).await {
            Ok(_) => return Ok(()),
            Err(error @ QmpError::Refused { .. }) => error,
            Err(error) => return Err(error),
        };
        match self.presence().await?.memory {
            true => Err(refused),
            false => Ok(()),
        }
    }

    pub(super) async fn presence(&self) -> Result<Presence, QmpError> {
        let has = |names: Vec<String>| names.contains(&self.id);
        Ok(Presence {
            device: has(members(self.qmp, DEVICES).await?),
            memory: has(members(self.qmp, OBJECTS).await?),
        })
    }

    fn cannot_unplug(&self, error: QmpError) -> BackendError {
        error.while_trying(format!("cannot unplug {}", self.id))
    }
}

/// Everything that is in QEMU and has an id, as `device bm-vpmem-3` or `memory bm-vpmem-3`.
pub(super) async fn everything(qmp: &Qmp) -> Result<Vec<(&'static str, String)>, QmpError> {
    let devices = members(qmp, DEVICES).await?;
    let objects = members(qmp, OBJECTS).await?;
    let devices = devices.into_iter().map(|name| ("device", name));
    let objects = objects.into_iter().map(|name| ("memory", name));
    Ok(devices.chain(objects).collect())
}

async fn members(qmp: &Qmp, path: &str) -> Result<Vec<String>, QmpError> {
    let members: Vec<Member> = qmp.query("qom-list", json!({"path": path})).await?;
    Ok(members.into_iter().map(|member| member.name).collect())
}

/// What a failure means when it is certain that nothing is left of the attempt.
fn refusal(failure: &QmpError) -> ErrorKind {
    match failure {
        QmpError::Refused { desc, .. } if NO_ROOM.iter().any(|said| desc.contains(said)) => {
            ErrorKind::Full
        }
        _ => match failure.kind() {
            ErrorKind::Uncertain => ErrorKind::Other,
            kind => kind,
        },
    }
}

/// What is there could not be found out, or not be taken out.
fn in_doubt(tried: String, error: QmpError) -> BackendError {
    match error.kind() {
        ErrorKind::Gone => BackendError::gone(tried),
        _ => BackendError::uncertain(tried),
    }
    .with_source(error)
}
