//! One hot-plugged device of a QEMU, made on a block node or on memory: how it comes, how it goes, and what is known
//! of it when an answer is lost.

mod listing;

use blockmount::{BackendError, DiskId, ErrorKind};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::warn;

use crate::open_file::OpenFile;
use crate::qmp::{Event, Events, Passed, Qmp, QmpError};
#[cfg(feature = "launch")]
pub(crate) use listing::of_type;
pub(crate) use listing::{Found, find, left, property, size_of_node};
use listing::{nodes, objects};

/// Where QEMU keeps the devices, and the other objects, that have ids.
const DEVICES: &str = "/machine/peripheral";
const OBJECTS: &str = "/objects";

/// What QEMU says when a device does not fit into the address space that `maxmem` leaves for them
/// (`hw/mem/memory-device.c`). There is no class for it.
const NO_ADDRESS_SPACE: [&str; 2] = ["not enough space", "could not find position"];

/// What QEMU says when something of another name is where a device should be. There is no class for it either.
const OCCUPIED: [&str; 3] = ["already used by", "in use by", " busy"];

/// What QEMU says when it does not get its locks on an image (`block/file-posix.c`). There is no class for it either.
const LOCKED: [&str; 2] = ["Failed to get \"", "Failed to get shared \""];

/// A device of a VM, which may or may not be there.
pub(crate) struct Plug<'a> {
    pub(crate) qmp: &'a Qmp,
    /// The id of the device, and of what it is made on.
    pub(crate) id: String,
    /// What it is, for errors: `a disk at SCSI address 0/3`.
    pub(crate) what: String,
    pub(crate) backend: Backend,
    pub(crate) removal: Removal,
}

/// What a device is made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// A block node.
    Node,
    /// A memory object.
    Memory,
}

/// Who takes a device out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// QEMU, when it is asked to.
    Host,
    /// The guest, which QEMU may refuse to ask.
    Guest,
    /// It stays until QEMU ends.
    Never,
}

/// How far an attachment came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Files,
    Backend,
    Device,
}

/// Events about devices that are on the way out.
struct Deletions {
    deleted: Events,
    refused: Events,
}

/// What there is of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Presence {
    pub(crate) backend: bool,
    pub(crate) device: bool,
}

#[derive(Deserialize)]
struct Node {
    #[serde(rename = "node-name")]
    name: String,
    /// The path by which it was opened.
    #[serde(default)]
    file: String,
    #[serde(default)]
    image: Option<NodeImage>,
}

#[derive(Deserialize)]
struct NodeImage {
    /// In bytes.
    #[serde(rename = "virtual-size")]
    size: u64,
}

#[derive(Deserialize)]
struct Object {
    name: String,
    #[cfg(feature = "launch")]
    #[serde(rename = "type")]
    kind: String,
}

impl Backend {
    fn add(self) -> &'static str {
        match self {
            Backend::Node => "blockdev-add",
            Backend::Memory => "object-add",
        }
    }

    async fn delete(self, qmp: &Qmp, id: &str) -> Result<Value, QmpError> {
        match self {
            Backend::Node => qmp.execute("blockdev-del", json!({"node-name": id})).await,
            Backend::Memory => qmp.execute("object-del", json!({"id": id})).await,
        }
    }

    /// Under which name what is added finds a file that QEMU was passed.
    fn path_of(self, passed: Passed) -> String {
        match self {
            Backend::Node => format!("/dev/fdset/{}", passed.set),
            // Memory knows no sets of descriptors: QEMU opens its own descriptor once more.
            Backend::Memory => format!("/proc/self/fd/{}", passed.number),
        }
    }

    /// The paths by which QEMU has opened what is added under an id.
    async fn paths(self, qmp: &Qmp, id: &str) -> Result<Vec<String>, QmpError> {
        match self {
            Backend::Node => {
                let named = format!("{id}-file");
                let nodes = nodes(qmp).await?.into_iter();
                let ours = nodes.filter(|node| node.name == id || node.name == named);
                Ok(ours.map(|node| node.file).collect())
            }
            Backend::Memory => {
                let arguments = json!({"path": format!("{OBJECTS}/{id}"), "property": "mem-path"});
                match qmp.query("qom-get", arguments).await {
                    Ok(path) => Ok(vec![path]),
                    Err(QmpError::Refused { .. }) => Ok(Vec::new()),
                    Err(error) => Err(error),
                }
            }
        }
    }

    async fn names(self, qmp: &Qmp) -> Result<Vec<String>, QmpError> {
        match self {
            Backend::Node => Ok(nodes(qmp)
                .await?
                .into_iter()
                .map(|node| node.name)
                .collect()),
            Backend::Memory => objects(qmp, OBJECTS).await,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Backend::Node => "node",
            Backend::Memory => "memory",
        }
    }
}

impl Plug<'_> {
    /// Plugs the device: passes QEMU the files, adds what the device is made on, then the device. All or nothing.
    ///
    /// The first file is that of the disk, whose `id` QEMU shows for as long as the device is there, if there is one.
    /// `backend` makes the arguments of `blockdev-add` or `object-add` from the paths by which QEMU opens the files.
    pub(crate) async fn attach(
        &self,
        files: &[OpenFile],
        id: Option<&DiskId>,
        backend: impl FnOnce(&[String]) -> Value,
        device: Value,
    ) -> Result<(), BackendError> {
        let (mut paths, mut passed) = (Vec::new(), Vec::new());
        for (number, file) in files.iter().enumerate() {
            let (shared, id) = (file.share()?, id.filter(|_| number == 0));
            match self.qmp.pass(shared, &self.id, id).await {
                Ok(Some(given)) => {
                    paths.push(self.backend.path_of(given));
                    passed.push(given);
                }
                Ok(None) => paths.push(file.path().to_owned()),
                Err(failure) => return self.settle(Stage::Files, failure, files, &paths).await,
            }
        }
        let added = self.qmp.execute(self.backend.add(), backend(&paths)).await;
        if let Err(failure) = added {
            return self.settle(Stage::Backend, failure, files, &paths).await;
        }
        if passed.len() < files.len() {
            self.prove(files).await?;
        }
        let (closed, plugged) = tokio::join!(
            self.qmp
                .close_passed(&passed[usize::from(id.is_some()).min(passed.len())..]),
            self.qmp.execute("device_add", device)
        );
        if let Err(error) = closed {
            warn!(%error, id = self.id, "QEMU keeps descriptors until the device is detached");
        }
        match plugged {
            Ok(_) => Ok(()),
            Err(failure) => self.settle(Stage::Device, failure, files, &paths).await,
        }
    }

    /// Proves that QEMU, which was given paths, has opened the files that are meant; closes them if not.
    async fn prove(&self, files: &[OpenFile]) -> Result<(), BackendError> {
        let timeout = self.qmp.deadlines().call;
        for file in files {
            let Err(replaced) = file.is_still_at_its_path(timeout).await else {
                continue;
            };
            return match self.remove_backend(&mut self.deletions()).await {
                Ok(()) => Err(replaced),
                Err(error) => Err(in_doubt(self.tried(), error)),
            };
        }
        Ok(())
    }

    /// Finds out what a failed attachment has left, and takes it out. What others have put there is left alone, also by the
    /// detach that follows a doubt.
    async fn settle(
        &self,
        stage: Stage,
        failure: QmpError,
        files: &[OpenFile],
        paths: &[String],
    ) -> Result<(), BackendError> {
        let is_locked = self.is_locked(&failure);
        let mut settled = self.settle_now(stage, failure, paths).await;
        if let Err(error) = &settled
            && error.kind() == ErrorKind::Other
            && is_locked
            && let Some(in_use) = OpenFile::in_use(files, self.qmp.deadlines().call).await
        {
            settled = settled.map_err(|error| in_use.with_source(error));
        }
        let in_doubt = settled.as_ref().map_err(BackendError::kind) == Err(ErrorKind::Uncertain);
        let in_doubt = in_doubt && stage != Stage::Device;
        self.qmp
            .note_doubt(&self.id, in_doubt.then(|| paths.to_owned()));
        settled
    }

    async fn settle_now(
        &self,
        stage: Stage,
        failure: QmpError,
        paths: &[String],
    ) -> Result<(), BackendError> {
        let tried = self.tried();
        if failure.kind() == ErrorKind::Gone {
            return Err(failure.while_trying(tried));
        }
        let was_refused = matches!(failure, QmpError::Refused { .. });
        // What is there, if anything, was there before.
        let is_foreign = |there: Presence| match stage {
            Stage::Files => there.device || there.backend,
            Stage::Backend => there.device || (there.backend && was_refused),
            Stage::Device => there.device && was_refused,
        };
        if let Err(error) = self.qmp.close_passed_for(&self.id).await {
            match was_refused && stage == Stage::Backend {
                true => warn!(%error, id = self.id, "QEMU keeps descriptors"),
                false => return Err(in_doubt(tried, error)),
            }
        }
        // It was not sent, and nothing was before.
        if failure.kind() == ErrorKind::Busy && stage != Stage::Device {
            return Err(failure.while_trying(tried));
        }
        // QEMU does one command after the other: with these answers, the fate of the last is decided.
        let mut there = match self.presence().await {
            Ok(there) => there,
            // A detach, which follows a doubt, would take out what is foreign.
            Err(_) if was_refused && stage == Stage::Backend => Presence::default(),
            Err(error) => return Err(in_doubt(tried, error)),
        };
        let mut foreign = is_foreign(there);
        if stage == Stage::Device && there.device && !was_refused {
            return Ok(());
        }
        if stage == Stage::Backend && there.backend && !foreign {
            let opened = self.backend.paths(self.qmp, &self.id).await;
            let opened = opened.map_err(|error| in_doubt(tried.clone(), error))?;
            foreign = !opened.iter().any(|path| paths.contains(path));
        }
        if stage != Stage::Device && foreign {
            there.backend = false;
        }
        if there.backend
            && let Err(error) = self.remove_backend(&mut self.deletions()).await
        {
            return Err(in_doubt(tried, error));
        }
        let kind = match foreign {
            true => ErrorKind::Conflict,
            false => self.refusal(&failure),
        };
        let tried = match kind {
            ErrorKind::Conflict => format!("{tried}: something that is not ours is there"),
            _ => tried,
        };
        Err(BackendError::new(kind, tried).with_source(failure))
    }

    /// Whether QEMU refuses an image that somebody else has locked.
    fn is_locked(&self, failure: &QmpError) -> bool {
        matches!(failure, QmpError::Refused { desc, .. }
            if self.backend == Backend::Node && LOCKED.iter().any(|said| desc.starts_with(said)))
    }

    /// What a failure means when it is certain that nothing is left of the attempt.
    fn refusal(&self, failure: &QmpError) -> ErrorKind {
        match failure {
            QmpError::Refused { desc, .. }
                if self.backend == Backend::Memory
                    && NO_ADDRESS_SPACE.iter().any(|said| desc.contains(said)) =>
            {
                ErrorKind::Full
            }
            // The memory of a disk cannot be had; another transport needs none.
            QmpError::Refused { command, .. }
                if self.backend == Backend::Memory && command == "object-add" =>
            {
                ErrorKind::Unsuitable
            }
            QmpError::Refused { desc, command, .. }
                if command == "device_add" && OCCUPIED.iter().any(|said| desc.contains(said)) =>
            {
                ErrorKind::Conflict
            }
            _ => match failure.kind() {
                ErrorKind::Uncertain => ErrorKind::Other,
                kind => kind,
            },
        }
    }

    /// Takes out what there is of the device, wherever an earlier detachment has stopped.
    pub(crate) async fn detach(&self) -> Result<(), BackendError> {
        if self.is_ours().await? {
            // Before anything is asked for, so that nothing is missed.
            let mut deletions = self.deletions();
            self.remove_device(&mut deletions).await?;
            self.remove_backend(&mut deletions).await?;
        }
        self.qmp.note_doubt(&self.id, None);
        let closed = self.qmp.close_passed_for(&self.id).await;
        closed.map_err(|error| error.while_trying(format!("cannot close the image of {}", self.id)))
    }

    /// Whether what is there may be taken out. After an attach that was in doubt it may be of others: then it was opened by
    /// another path.
    async fn is_ours(&self) -> Result<bool, BackendError> {
        let Some(paths) = self.qmp.doubt(&self.id) else {
            return Ok(true);
        };
        let opened = self.backend.paths(self.qmp, &self.id).await;
        let opened = opened
            .map_err(|error| error.while_trying(format!("cannot find out whose {} is", self.id)))?;
        Ok(opened.iter().any(|path| paths.contains(path)))
    }

    fn deletions(&self) -> Deletions {
        Deletions {
            deleted: self.qmp.events("DEVICE_DELETED"),
            refused: self.qmp.events("DEVICE_UNPLUG_GUEST_ERROR"),
        }
    }

    /// Whether the device is out, once QEMU says so, or that the guest has refused.
    async fn deleted(&self, pending: &mut Deletions) -> Result<bool, QmpError> {
        let is_ours = |event: &Event| event.data["device"] == self.id.as_str();
        let timeout = self.qmp.deadlines().call;
        tokio::select! {
            deleted = pending.deleted.find(timeout, is_ours) => deleted.map(|_| true),
            refused = pending.refused.find(timeout, is_ours) => refused.map(|_| false),
        }
    }

    async fn remove_device(&self, deletions: &mut Deletions) -> Result<(), BackendError> {
        let tried = || self.qmp.explain(format!("cannot unplug {}", self.id));
        let asked = self.qmp.execute("device_del", json!({"id": self.id})).await;
        let refusal = match asked {
            Ok(_) => None,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error @ QmpError::Refused { .. }) if self.removal == Removal::Guest => Some(error),
            Err(error @ QmpError::Refused { .. }) if self.removal == Removal::Never => {
                let message = format!("{} can never be unplugged from this VM", self.id);
                return Err(BackendError::unsuitable(message).with_source(error));
            }
            Err(error) => return Err(error.while_trying(tried())),
        };
        let late = match self.deleted(deletions).await {
            Ok(true) => return Ok(()),
            Ok(false) => {
                let message = format!("{}: the guest refuses to eject it", tried());
                return Err(BackendError::busy(message));
            }
            Err(error @ QmpError::Gone { .. }) => return Err(error.while_trying(tried())),
            Err(error) => error,
        };
        // It may have been among the events that were missed, or before the first.
        match (self.presence().await, refusal) {
            (Ok(Presence { device: false, .. }), _) => Ok(()),
            (Ok(_), Some(refusal)) => {
                let timeout = self.qmp.deadlines().call;
                let message = format!(
                    "{}: the guest has not ejected it within {timeout:?}; \
                     have the guest release it first",
                    tried()
                );
                Err(BackendError::busy(message).with_source(refusal))
            }
            (Ok(_), None) => Err(late.while_trying(tried())),
            (Err(error), _) => Err(error.while_trying(tried())),
        }
    }

    async fn remove_backend(&self, deletions: &mut Deletions) -> Result<(), BackendError> {
        let tried = || {
            self.qmp
                .explain(format!("cannot close the image of {}", self.id))
        };
        let busy = |refusal| BackendError::busy(tried()).with_source(refusal);
        let refusal = match self.backend.delete(self.qmp, &self.id).await {
            Ok(_) => return Ok(()),
            Err(error @ QmpError::Refused { .. }) => error,
            Err(error) => return Err(error.while_trying(tried())),
        };
        match self.presence().await {
            Ok(Presence { backend: false, .. }) => return Ok(()),
            Ok(Presence { device: true, .. }) => return Err(busy(refusal)),
            Ok(_) => {}
            Err(error) => return Err(error.while_trying(tried())),
        }
        // A device that another client has unplugged has lost its id, and holds its backend until it is deleted.
        if let Err(error @ QmpError::Gone { .. }) = self.deleted(deletions).await {
            return Err(error.while_trying(tried()));
        }
        // Deleted, missed or late: whether the backend can go tells.
        match self.backend.delete(self.qmp, &self.id).await {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Refused { .. }) => Err(busy(error)),
            Err(error) => Err(error.while_trying(tried())),
        }
    }

    pub(crate) async fn presence(&self) -> Result<Presence, QmpError> {
        let has = |names: Vec<String>| names.contains(&self.id);
        Ok(Presence {
            device: has(objects(self.qmp, DEVICES).await?),
            backend: has(self.backend.names(self.qmp).await?),
        })
    }

    fn tried(&self) -> String {
        self.qmp.explain(format!("cannot attach {}", self.what))
    }
}

/// Refuses ids of a list that are no ids of QEMU's, or named twice; `what` says what they are of.
pub(crate) fn ensure_ids(ids: &[String], what: &str) -> Result<(), BackendError> {
    for (at, id) in ids.iter().enumerate() {
        if !is_id(id) {
            let message = format!("{id:?} is no id of a {what} in QEMU");
            return Err(BackendError::invalid(message));
        }
        if ids[..at].contains(id) {
            let message = format!("{what} {id} is named twice");
            return Err(BackendError::invalid(message));
        }
    }
    Ok(())
}

/// Whether QEMU takes it as an id (`id_wellformed`), which it must be to be part of the name of a bus.
fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    id.starts_with(|first: char| first.is_ascii_alphabetic()) && id.bytes().all(allowed)
}

/// What is there could not be found out, or not be taken out.
fn in_doubt(tried: String, error: impl Into<BackendError>) -> BackendError {
    let error = error.into();
    match error.kind() {
        ErrorKind::Gone => BackendError::gone(tried),
        _ => BackendError::uncertain(tried),
    }
    .with_source(error)
}
