//! Calls of the guest's contracts as requests of GCS, and what undoes them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::{BackendError, ErrorKind};

use crate::Request;
use crate::gcs::device::Device;
use crate::gcs::host_requests::{self, guest_path};
use crate::gcs::messages::{Capabilities, ModificationRequest, RequestType, Resource};

/// Translates calls of the guest's contracts to requests of GCS, for a [`GuestChannel`](crate::GuestChannel) of one's
/// own. What the guest would silently not do is refused.
///
/// The protocol wants a mount described again to undo it, so a ledger keeps what was sent until it is undone.
#[derive(Debug, Default)]
pub struct Translator(Mutex<HashMap<PathBuf, Resource>>);

/// A request, and the target that it sets up or tears down.
#[derive(Debug, Clone, PartialEq)]
pub struct Translated {
    /// What the guest is asked for.
    pub request: ModificationRequest,
    target: Option<PathBuf>,
}

impl From<ModificationRequest> for Translated {
    /// A request that is about no target.
    fn from(request: ModificationRequest) -> Self {
        let target = None;
        Translated { request, target }
    }
}

impl Translator {
    /// What the guest has to be asked for; nothing if that is nothing. The target of a set-up is booked from now on:
    /// whatever happens then can be undone.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if the guest cannot be asked for it, `Invalid` if a path cannot be one in the guest, `Conflict` if
    /// something else is set up at the target.
    pub fn translate(
        &self,
        request: &Request,
        guest: &Capabilities,
    ) -> Result<Option<Translated>, BackendError> {
        match request {
            Request::Mount {
                locator,
                target,
                options,
            } => {
                let path = guest_path(target, guest)?;
                let device = Device::try_from(locator)?;
                let (add, undo) = host_requests::mount(device, path, options, guest)?;
                self.set_up(target, add, undo)
            }
            Request::Combine(overlay) => {
                let (add, undo) = host_requests::combine(overlay, guest)?;
                self.set_up(&overlay.target, add, undo)
            }
            Request::Unmount { target } => self.tear_down(target, false),
            Request::Separate { target } => self.tear_down(target, true),
            Request::Unplug { locator } => {
                let device = host_requests::unplug(Device::try_from(locator)?, guest)?;
                Ok(device.map(|device| ModificationRequest::remove(device).into()))
            }
        }
    }

    /// Learns how a request has ended. One whose outcome is never known keeps its target.
    pub fn settle(&self, translated: &Translated, outcome: &Result<(), BackendError>) {
        let Some(target) = &translated.target else {
            return;
        };
        let adds = translated.request.request_type == RequestType::Add;
        let is_absent = match outcome.as_ref().map_err(BackendError::kind) {
            Ok(()) => !adds,
            Err(ErrorKind::Uncertain) => false,
            Err(kind) => adds || matches!(kind, ErrorKind::Gone | ErrorKind::LostWrites),
        };
        if is_absent {
            self.entries().remove(target);
        }
    }

    fn set_up(
        &self,
        target: &Path,
        add: Resource,
        undo: Resource,
    ) -> Result<Option<Translated>, BackendError> {
        let mut entries = self.entries();
        if entries.contains_key(target) {
            let message = format!(
                "something is mounted at {} in the guest already",
                target.display()
            );
            return Err(BackendError::conflict(message));
        }
        entries.insert(target.to_owned(), undo);
        Ok(Some(Translated {
            request: ModificationRequest::add(add),
            target: Some(target.to_owned()),
        }))
    }

    fn tear_down(&self, target: &Path, overlay: bool) -> Result<Option<Translated>, BackendError> {
        let Some(undo) = self.entries().get(target).cloned() else {
            return Ok(None);
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
        Ok(Some(Translated {
            request: ModificationRequest::remove(undo),
            target: Some(target.to_owned()),
        }))
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<PathBuf, Resource>> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
