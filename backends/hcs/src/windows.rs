//! The Host Compute Service itself, through its library `computecore.dll` (Windows 10 1809, Windows Server 2019 and later).

mod calls;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::BackendError;
use blockmount_bridge::gcs::Hresult;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use self::calls::{Operation, System, Wide};
use crate::documents::{ModifySettingRequest, Properties, PropertyQuery};
use crate::files;
use crate::vm::cannot_ask;
use crate::{ComputeSystem, HcsError};

/// How long a cancellation may take before the caller is told nevertheless.
const CANCELLATION: Duration = Duration::from_secs(5);

/// How long the service may take to open a VM, and to change the rights to a file.
const SHORT_CALL: Duration = Duration::from_secs(30);

/// How long the service may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HcsDeadlines {
    /// For a change of the VM or in its guest. When it has passed, the change is cancelled and it is not known whether it has
    /// happened. Default: 90 seconds, which is longer than a guest of ours takes to give up.
    pub modify: Duration,
    /// For a question about the VM. Default: 10 seconds.
    pub properties: Duration,
}

impl Default for HcsDeadlines {
    fn default() -> Self {
        HcsDeadlines {
            modify: Duration::from_secs(90),
            properties: Duration::from_secs(10),
        }
    }
}

/// A VM of this machine, by its handle. Clones are the same VM; the handle is closed with the last.
///
/// Calls run at once, and none of them blocks a thread of the runtime. The process needs the rights of an
/// administrator, or of a member of the group Hyper-V Administrators.
#[derive(Debug, Clone)]
pub struct HcsSystem {
    system: Arc<System>,
    deadlines: HcsDeadlines,
}

impl HcsSystem {
    /// Opens a VM that is there, by the id that it was made with.
    ///
    /// # Errors
    ///
    /// `Gone` if there is no such VM, `Invalid` if the id has a NUL in it, `Other` if the service refuses or does not answer
    /// within 30 seconds.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn open(id: &str) -> Result<Self, BackendError> {
        Self::open_with(id, HcsDeadlines::default()).await
    }

    /// The same, with other deadlines for its calls.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn open_with(id: &str, deadlines: HcsDeadlines) -> Result<Self, BackendError> {
        let what = format!("open VM {:?}", id.chars().take(64).collect::<String>());
        let id = Wide::new(id).map_err(|error| cannot_ask(&what, error))?;
        let system = short_call(move || System::open(&id)).await;
        let system = system.map_err(|error| cannot_ask(&what, error))?;
        Ok(HcsSystem {
            system: Arc::new(system),
            deadlines,
        })
    }

    /// Runs an operation to its end, and gives the document that it ends with.
    async fn run(
        &self,
        deadline: Duration,
        start: impl FnOnce(&Operation, &System) -> Hresult + Send + 'static,
    ) -> Result<Option<String>, HcsError> {
        let (operation, done) = Operation::new()?;
        let operation = Arc::new(operation);
        // To start an operation is a call to another process, which may block.
        let starting = spawn_blocking({
            let (operation, system) = (operation.clone(), self.system.clone());
            move || start(&operation, &system)
        });
        let end = async {
            let Ok(started) = starting.await else {
                // The runtime is shutting down. Whether it was started is not known.
                return Err(HcsError::TimedOut(deadline));
            };
            if calls::failed(started) && !started.is(Hresult::OPERATION_PENDING) {
                return Err(HcsError::failed(started, None));
            }
            // The other end is only dropped with the operation, which is here.
            let _ = done.await;
            Ok(())
        };
        match timeout(deadline, end).await {
            Ok(Ok(())) => operation.result(),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // It is closed here too, because that may wait for a callback.
                let cancelling = spawn_blocking(move || operation.cancel());
                let _ = timeout(CANCELLATION, cancelling).await;
                Err(HcsError::TimedOut(deadline))
            }
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ComputeSystem for HcsSystem {
    async fn modify(&self, request: &ModifySettingRequest) -> Result<(), HcsError> {
        let document = Wide::new(request.to_json())?;
        let start =
            move |operation: &Operation, system: &System| operation.modify(system, &document);
        self.run(self.deadlines.modify, start).await.map(drop)
    }

    async fn properties(&self, query: &PropertyQuery) -> Result<Properties, HcsError> {
        let query = Wide::new(query.to_json())?;
        let start = move |operation: &Operation, system: &System| operation.ask(system, &query);
        let answer = self.run(self.deadlines.properties, start).await?;
        Properties::from_json(answer.as_deref().unwrap_or_default())
            .map_err(|error| HcsError::Unreadable(error.to_string()))
    }
}

/// Lets a VM read and write a file, for its disk. Links are resolved first, because the VM needs the file behind
/// them. Granting twice is granting once; it is never revoked.
///
/// An image that many VMs use is better granted to all of them at once ([`grant_vm_group_access`]): the list of rights to a
/// file is limited in size.
///
/// # Errors
///
/// `NotFound` if there is no such file, `Invalid` if id or path have a NUL in them, `Other` if the service refuses.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub async fn grant_vm_access(vm_id: &str, path: &Path) -> Result<(), BackendError> {
    let what = format!(
        "grant VM {:?} access to {}",
        vm_id.chars().take(64).collect::<String>(),
        path.display()
    );
    let vm = Wide::new(vm_id).map_err(|error| cannot_ask(&what, error))?;
    grant(what, path, move |path| calls::grant_vm_access(&vm, path)).await
}

/// Lets every VM of this machine read a file, for its disk; else as [`grant_vm_access`].
///
/// # Errors
///
/// As for [`grant_vm_access`].
///
/// # Panics
///
/// Outside of a tokio runtime.
pub async fn grant_vm_group_access(path: &Path) -> Result<(), BackendError> {
    let what = format!("grant all VMs access to {}", path.display());
    grant(what, path, calls::grant_vm_group_access).await
}

async fn grant(
    what: String,
    path: &Path,
    call: impl FnOnce(&Wide) -> Hresult + Send + 'static,
) -> Result<(), BackendError> {
    let path = path.to_owned();
    let granting = short_call(move || {
        let resolved = files::resolve(&path)?;
        match call(&Wide::new(resolved)?) {
            result if !calls::failed(result) || result.is(Hresult::ALREADY_EXISTS) => Ok(()),
            result => Err(HcsError::failed(result, None)),
        }
    });
    granting.await.map_err(|error| cannot_ask(&what, error))
}

/// Makes a call that blocks, and waits for it for a limited time.
async fn short_call<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, HcsError> + Send + 'static,
) -> Result<T, HcsError> {
    match timeout(SHORT_CALL, spawn_blocking(call)).await {
        Ok(Ok(outcome)) => outcome,
        // In time, or because the runtime is shutting down.
        Ok(Err(_)) | Err(_) => Err(HcsError::TimedOut(SHORT_CALL)),
    }
}
