//! Changing a VM: what errors mean, and what is in doubt after them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::{BackendError, ErrorKind};
use blockmount_bridge::gcs::Hresult;
use blockmount_bridge::gcs::messages::{ModificationRequest, RequestType};
use tracing::trace;

use crate::documents::{DiskAddress, ModifySettingRequest, PropertyQuery, ResourcePath, Settings};
use crate::{ComputeSystem, HcsError};

/// The VM, or what was known of it, is no more.
const GONE: [Hresult; 5] = [
    Hresult::SYSTEM_NOT_FOUND,
    Hresult::SYSTEM_ALREADY_STOPPED,
    Hresult::UNEXPECTED_EXIT,
    Hresult::TERMINATED,
    Hresult::INVALID_HANDLE,
];

/// The service does not know what has become of the request.
const DOUBTFUL: [Hresult; 6] = [
    Hresult::TIMEOUT,
    Hresult::OPERATION_TIMEOUT,
    Hresult::OPERATION_PENDING,
    Hresult::CONNECT_FAILED,
    Hresult::CONNECTION_CLOSED,
    Hresult::SERVICE_DISCONNECT,
];

/// A VM, and which of its addresses are in doubt.
pub(crate) struct Vm<S> {
    system: S,
    /// What is not known of addresses. Never locked across an await.
    doubts: Mutex<HashMap<ResourcePath, Doubt>>,
}

/// What is not known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// Whether the last request has come to effect.
    Now,
    /// Whether an earlier one may still do so: it was not answered, and then nothing was there. It was cancelled, but
    /// whether the service had only been late is not for us to know.
    Later,
}

/// The kind of an error.
enum Class {
    /// Exactly this.
    Is(ErrorKind),
    /// Gone if the VM has ended, else this.
    UnlessEnded(ErrorKind),
}

impl<S: ComputeSystem> Vm<S> {
    pub(crate) fn new(system: S) -> Self {
        Vm {
            system,
            doubts: Mutex::default(),
        }
    }

    /// Adds a disk.
    pub(crate) async fn add(
        &self,
        address: DiskAddress,
        settings: Settings,
    ) -> Result<(), BackendError> {
        let path = ResourcePath::try_from(address)?;
        let what = format!("add a disk at {address}");
        let request = ModifySettingRequest::add(path, settings);
        let before = self.doubts().insert(path, Doubt::Now);
        let mut outcome = self.modify(&request, &what, ErrorKind::Other).await;
        if let Err(error) = &outcome
            && error.kind() == ErrorKind::Conflict
            && before == Some(Doubt::Later)
        {
            // The disk there came late. It must be removed, or no other disk could ever be added here.
            let message = format!("cannot {what}: an earlier disk has come after its time-out");
            outcome = Err(BackendError::uncertain(message).with_source(error.clone()));
        }
        let after = match &outcome {
            Ok(()) => None,
            Err(error) if error.kind() == ErrorKind::Uncertain => Some(Doubt::Now),
            Err(error) if error.kind() == ErrorKind::Gone => None,
            Err(_) => before,
        };
        self.record(path, after);
        outcome
    }

    /// Removes the disk at an address, whichever it is. If there is none, that is a success.
    pub(crate) async fn remove(&self, address: DiskAddress) -> Result<(), BackendError> {
        let path = ResourcePath::try_from(address)?;
        let what = format!("remove the disk at {address}");
        let before = self.doubts().get(&path).copied();
        if before == Some(Doubt::Now) {
            // The last request for this address was not answered. A VM that has ended needs no other, and one that
            // cannot even be asked about would not answer it either.
            if let Err(error) = self.must_live(&what).await {
                if error.kind() == ErrorKind::Gone {
                    self.record(path, None);
                }
                return Err(error);
            }
        }
        let request = ModifySettingRequest::remove(path);
        self.record(path, Some(Doubt::Now));
        let outcome = self.modify(&request, &what, ErrorKind::Other).await;
        let (outcome, after) = match outcome {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                (Ok(()), before.map(|_| Doubt::Later))
            }
            Err(error) if error.kind() == ErrorKind::Uncertain => (Err(error), Some(Doubt::Now)),
            Err(error) if error.kind() != ErrorKind::Gone => (Err(error), before),
            outcome => (outcome, None),
        };
        self.record(path, after);
        outcome
    }

    /// Has the guest do something.
    pub(crate) async fn ask_guest(&self, request: ModificationRequest) -> Result<(), BackendError> {
        let name = request.request_type.name();
        let what = format!("have the guest {name} {}", request.resource.name());
        // A guest that fails to set something up, and says no more than that, may have left half of it behind.
        let otherwise = match request.request_type {
            RequestType::Add => ErrorKind::Uncertain,
            _ => ErrorKind::Other,
        };
        let request = ModifySettingRequest::guest(request);
        self.modify(&request, &what, otherwise).await
    }

    pub(crate) fn system(&self) -> &S {
        &self.system
    }

    async fn modify(
        &self,
        request: &ModifySettingRequest,
        what: &str,
        otherwise: ErrorKind,
    ) -> Result<(), BackendError> {
        let outcome = self.system.modify(request).await;
        trace!(document = request.to_json(), ?outcome, "modified");
        match outcome {
            Ok(()) => Ok(()),
            Err(error) => Err(self.classify(what, error, otherwise).await),
        }
    }

    /// Makes an error of what the service says; where that leaves open whether the VM still lives, asks.
    async fn classify(&self, what: &str, error: HcsError, otherwise: ErrorKind) -> BackendError {
        let kind = match class_of(&error, otherwise) {
            Class::Is(kind) => kind,
            Class::UnlessEnded(kind) => match self.has_ended().await {
                Ok(true) => ErrorKind::Gone,
                // Whether it has is unknown too.
                Ok(false) | Err(_) => kind,
            },
        };
        BackendError::new(kind, format!("cannot {what}{}", advice(&error))).with_source(error)
    }

    /// Why the disks of the VM cannot be listed: no property of a VM shows them.
    pub(crate) async fn cannot_list(&self) -> BackendError {
        let what = "list the disks of the VM";
        match self.must_live(what).await {
            Ok(()) => BackendError::unsuitable(format!(
                "cannot {what}: the host compute service does not show them"
            )),
            Err(error) => error,
        }
    }

    async fn must_live(&self, what: &str) -> Result<(), BackendError> {
        match self.has_ended().await {
            Ok(false) => Ok(()),
            Ok(true) => Err(BackendError::gone(format!(
                "cannot {what}: the VM has ended"
            ))),
            Err(error) => {
                let message = format!("cannot {what}: it is not known whether the VM lives");
                Err(BackendError::uncertain(message).with_source(error))
            }
        }
    }

    /// Whether nothing is left of the VM.
    async fn has_ended(&self) -> Result<bool, HcsError> {
        match self.system.properties(&PropertyQuery::basic()).await {
            Ok(properties) => Ok(properties.has_ended()),
            Err(error) => match class_of(&error, ErrorKind::Other) {
                Class::Is(ErrorKind::Gone) => Ok(true),
                _ => Err(error),
            },
        }
    }

    fn record(&self, path: ResourcePath, doubt: Option<Doubt>) {
        match doubt {
            Some(doubt) => self.doubts().insert(path, doubt),
            None => self.doubts().remove(&path),
        };
    }

    fn doubts(&self) -> MutexGuard<'_, HashMap<ResourcePath, Doubt>> {
        // Nothing under the lock panics.
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an error means; `otherwise` where its number says nothing.
fn class_of(error: &HcsError, otherwise: ErrorKind) -> Class {
    let HcsError::Failed { result, .. } = error else {
        return match error {
            HcsError::Unsendable(_) => Class::Is(ErrorKind::Invalid),
            _ => Class::UnlessEnded(ErrorKind::Uncertain),
        };
    };
    let is_one_of = |numbers: &[Hresult]| numbers.iter().any(|number| number.is(*result));
    if is_one_of(&GONE) {
        Class::Is(ErrorKind::Gone)
    } else if is_one_of(&DOUBTFUL) {
        Class::UnlessEnded(ErrorKind::Uncertain)
    } else if result.is(Hresult::INVALID_STATE) {
        // It is paused, saved or not yet started; nothing has changed, and it may work later.
        Class::UnlessEnded(ErrorKind::Busy)
    } else {
        Class::Is(result.kind().unwrap_or(otherwise))
    }
}

/// What to do about an error whose number alone says it.
fn advice(error: &HcsError) -> &'static str {
    match error {
        HcsError::Failed { result, .. } if result.is(Hresult::ACCESS_DENIED) => {
            "; grant the VM access to its file"
        }
        HcsError::Failed { result, .. } if result.is(Hresult::ALREADY_EXISTS) => {
            "; if it was there when the VM was made, reserve its address"
        }
        _ => "",
    }
}

/// What the service says of a VM, as an error of a backend.
pub(crate) fn cannot_ask(what: &str, error: HcsError) -> BackendError {
    let (Class::Is(kind) | Class::UnlessEnded(kind)) = class_of(&error, ErrorKind::Other);
    // Asking changes nothing, so there is nothing to be uncertain about.
    let kind = match kind {
        ErrorKind::Uncertain => ErrorKind::Other,
        kind => kind,
    };
    BackendError::new(kind, format!("cannot {what}")).with_source(error)
}
