//! Calls of the guest's contracts as requests of GCS, and what undoes them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::{BackendError, ErrorKind, MountOptions, Presence};

use crate::gcs::device::Device;
use crate::gcs::host_requests::{self, guest_path};
use crate::gcs::messages::{
    Capabilities, MappedVirtualDisk, ModificationRequest, RequestType, Resource, ScsiDevice,
};
use crate::{Reply, Request};

/// What a guest says when it is to close an encrypted device that is not open: cryptsetup's words, and its exit status for
/// a device that is not there.
const NOT_OPEN: [&str; 2] = ["is not active", "exit status 4"];

/// Translates calls of the guest's contracts to requests of GCS, for a [`GuestChannel`](crate::GuestChannel) of one's
/// own. What the guest would silently not do is refused.
///
/// The protocol wants a mount described again to undo it, so a ledger keeps what was sent until it is undone. It has no
/// question for what is mounted, so what an earlier process has left is in doubt: its tear-down is asked for.
#[derive(Debug, Default)]
pub struct Translator(Mutex<Ledger>);

#[derive(Debug, Default)]
struct Ledger {
    targets: HashMap<PathBuf, Entry>,
    /// Mounts that were asked for without an answer, by their device. A guest waits without end for a device or a partition
    /// that is not there, and mounts whatever appears in its place.
    unanswered: HashSet<(ScsiDevice, PathBuf)>,
}

#[derive(Debug)]
struct Entry {
    /// What undoes it.
    undo: Resource,
    /// Whether the guest has said that it is there.
    is_up: bool,
}

/// The requests that a call comes to, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Translated {
    requests: Vec<ModificationRequest>,
    /// What it sets up or tears down.
    target: Option<PathBuf>,
}

impl From<ModificationRequest> for Translated {
    /// A request that is about no target.
    fn from(request: ModificationRequest) -> Self {
        Translated {
            requests: vec![request],
            target: None,
        }
    }
}

impl Translated {
    /// The requests, to be sent one after the other, until one fails that is not [optional](Self::is_done_anyway).
    pub fn requests(&self) -> &[ModificationRequest] {
        &self.requests
    }

    /// Whether an error only says that there is nothing to tear down.
    pub fn is_done_anyway(&self, request: &ModificationRequest, error: &BackendError) -> bool {
        let closes =
            matches!(&request.resource, Resource::MappedVirtualDisk(disk) if disk.encrypted);
        // The path was unmounted by the request before.
        let follows = self.requests.first() != Some(request);
        let says_so = NOT_OPEN.iter().any(|words| error.message().contains(words));
        follows && closes && error.kind() == ErrorKind::Other && says_so
    }

    fn adds(&self) -> bool {
        let mut requests = self.requests.iter();
        requests.any(|request| request.request_type == RequestType::Add)
    }

    /// The disk that it mounts, and where.
    fn mounted(&self) -> Option<(ScsiDevice, PathBuf)> {
        match self.requests.first() {
            Some(ModificationRequest {
                request_type: RequestType::Add,
                resource: Resource::MappedVirtualDisk(disk),
            }) => Some((scsi(disk), self.target.clone()?)),
            _ => None,
        }
    }
}

impl Translator {
    /// What the guest has to be asked for. The target of a set-up is booked from now on: whatever happens then can be
    /// undone.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if the guest cannot be asked for it, `Invalid` if a path cannot be one in the guest, `Conflict` if
    /// something else is set up at the target, or may still appear there.
    pub fn translate(
        &self,
        request: &Request,
        guest: &Capabilities,
    ) -> Result<Result<Translated, Reply>, BackendError> {
        let unknown = Err(Reply::Presence(Presence::Unknown));
        match request {
            Request::Mount {
                locator,
                target,
                options,
            } => {
                let device = Device::try_from(locator)?;
                let (add, undo) = mount(device, target, options, guest)?;
                self.set_up(target, add, undo).map(Ok)
            }
            Request::Combine(overlay) => {
                let (add, undo) = host_requests::combine(overlay, guest)?;
                self.set_up(&overlay.target, add, undo).map(Ok)
            }
            Request::Unmount { target } => self.tear_down(target, false),
            Request::Separate { target } => self.tear_down(target, true),
            Request::Unplug { locator } => self.unplug(Device::try_from(locator)?, guest),
            Request::AdoptMount {
                locator,
                target,
                options,
            } => {
                let device = Device::try_from(locator)?;
                let (_, undo) = mount(device, target, options, guest)?;
                self.doubt(target, undo);
                Ok(unknown)
            }
            Request::AdoptOverlay(overlay) => {
                let (_, undo) = host_requests::combine(overlay, guest)?;
                self.doubt(&overlay.target, undo);
                Ok(unknown)
            }
            Request::Usage { .. } | Request::Trim { .. } | Request::Grow { .. } => {
                let message = format!("GCS has no message for the {}", request.describe());
                Err(BackendError::unsuitable(message))
            }
            Request::Bind(_) => Err(BackendError::unsuitable(
                "GCS has no request for a view of a mount",
            )),
            // None was ever made.
            Request::Unbind { .. } => Ok(Err(Reply::Done)),
            Request::AdoptView(_) => Ok(Err(Reply::Presence(Presence::Absent))),
        }
    }

    /// Learns that the requests are about to be sent.
    pub fn begin(&self, translated: &Translated) {
        self.ledger().unanswered.extend(translated.mounted());
    }

    /// Learns that the guest has answered the requests, whatever the answer, or was sent none.
    pub fn answered(&self, translated: &Translated) {
        if let Some(mounted) = translated.mounted() {
            self.ledger().unanswered.remove(&mounted);
        }
    }

    /// Learns how a call has ended. One whose outcome is never known keeps its target.
    pub fn settle(&self, translated: &Translated, outcome: &Result<Reply, BackendError>) {
        let Some(target) = &translated.target else {
            return;
        };
        let adds = translated.adds();
        let kind = outcome.as_ref().map_err(BackendError::kind);
        let mut ledger = self.ledger();
        let is_absent = match kind {
            Ok(_) => !adds,
            Err(ErrorKind::Uncertain) => false,
            Err(kind) => adds || matches!(kind, ErrorKind::Gone | ErrorKind::LostWrites),
        };
        if is_absent {
            ledger.targets.remove(target);
        } else if let Some(entry) = ledger.targets.get_mut(target) {
            entry.is_up = match kind {
                Ok(_) => true,
                Err(ErrorKind::Uncertain) => false,
                Err(_) => entry.is_up,
            };
        }
        drop(ledger);
        if !matches!(kind, Err(ErrorKind::Uncertain)) {
            self.answered(translated);
        }
    }

    fn set_up(
        &self,
        target: &Path,
        add: Resource,
        undo: Resource,
    ) -> Result<Translated, BackendError> {
        let mut ledger = self.ledger();
        let refuse = |why: &str| {
            let target = target.display();
            Err(BackendError::conflict(format!(
                "{why} at {target} in the guest"
            )))
        };
        if ledger.targets.contains_key(target) {
            return refuse("something is mounted already");
        }
        let device = match &add {
            Resource::MappedVirtualDisk(disk) => Some(scsi(disk)),
            _ => None,
        };
        let mut unanswered = ledger.unanswered.iter();
        if unanswered.any(|(other, at)| at == target && Some(*other) != device) {
            return refuse(
                "the guest never answered an earlier mount of another disk, which may still appear",
            );
        }
        let is_up = false;
        let entry = Entry { undo, is_up };
        ledger.targets.insert(target.to_owned(), entry);
        Ok(Translated {
            requests: vec![ModificationRequest::add(add)],
            target: Some(target.to_owned()),
        })
    }

    /// Books what may be at a target, of which only a tear-down says whether it is.
    fn doubt(&self, target: &Path, undo: Resource) {
        let is_up = false;
        let entry = Entry { undo, is_up };
        self.ledger().targets.insert(target.to_owned(), entry);
    }

    fn tear_down(
        &self,
        target: &Path,
        overlay: bool,
    ) -> Result<Result<Translated, Reply>, BackendError> {
        let ledger = self.ledger();
        let Some(Entry { undo, is_up }) = ledger.targets.get(target) else {
            return Ok(Err(Reply::Done));
        };
        let is_overlay = matches!(undo, Resource::CombinedLayers(_));
        if is_overlay != overlay {
            let found = match is_overlay {
                true => "an overlay, not the mount of a device",
                false => "the mount of a device, no overlay",
            };
            let message = format!("{} is {found}", target.display());
            return Err(BackendError::conflict(message));
        }
        let undo = match undo {
            Resource::MappedVirtualDisk(disk) if !is_up => without_device(disk),
            other => vec![other.clone()],
        };
        Ok(Ok(Translated {
            requests: undo.into_iter().map(ModificationRequest::remove).collect(),
            target: Some(target.to_owned()),
        }))
    }

    /// Before a disk is removed, what a mount without an answer may have made of it is unmounted.
    fn unplug(
        &self,
        device: Device,
        guest: &Capabilities,
    ) -> Result<Result<Translated, Reply>, BackendError> {
        let Some(remove) = host_requests::unplug(device, guest)? else {
            return Ok(Err(Reply::Done));
        };
        let ledger = self.ledger();
        let late = ledger.unanswered.iter().filter(|(other, target)| {
            matches!(remove, Resource::ScsiDevice(device) if device == *other)
                && !ledger.targets.contains_key(target)
        });
        let late = late.map(|(_, target)| target.to_string_lossy().into_owned());
        let unmounts = late.map(host_requests::separate);
        let resources = unmounts.chain(std::iter::once(remove.clone()));
        Ok(Ok(Translated {
            requests: resources.map(ModificationRequest::remove).collect(),
            target: None,
        }))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mount(
    device: Device,
    target: &Path,
    options: &MountOptions,
    guest: &Capabilities,
) -> Result<(Resource, Resource), BackendError> {
    let path = guest_path(target, guest)?;
    host_requests::mount(device, path, options, guest)
}

fn scsi(disk: &MappedVirtualDisk) -> ScsiDevice {
    ScsiDevice {
        controller: disk.controller,
        lun: disk.lun,
    }
}

/// What undoes a mount in doubt. A guest looks for the device before it unmounts it, and waits without end if it is not
/// there; the removal of an overlay unmounts whatever is at a path, and needs no device.
fn without_device(disk: &MappedVirtualDisk) -> Vec<Resource> {
    let unmount = host_requests::separate(disk.mount_path.clone());
    let close = Resource::MappedVirtualDisk(disk.clone());
    let close = disk.encrypted.then_some(close);
    std::iter::once(unmount).chain(close).collect()
}
