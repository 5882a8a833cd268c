//! The functions of `computecore.dll`, and owners for what they hand out.
#![allow(unsafe_code)] // each call is argued for where it stands

use std::collections::BTreeMap;
use std::ffi::{OsStr, c_void};
use std::os::windows::ffi::OsStrExt;
use std::ptr::{null_mut, without_provenance};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount_bridge::gcs::Hresult;
use tokio::sync::oneshot;
use windows_sys::Win32::Foundation::{GENERIC_ALL, LocalFree};
use windows_sys::Win32::System::HostComputeSystem::{
    HCS_OPERATION, HCS_SYSTEM, HcsCancelOperation, HcsCloseComputeSystem, HcsCloseOperation,
    HcsCreateOperation, HcsGetComputeSystemProperties, HcsGetOperationResult, HcsGrantVmAccess,
    HcsGrantVmGroupAccess, HcsModifyComputeSystem, HcsOpenComputeSystem,
};

use crate::HcsError;

/// Text as the service takes it: UTF-16 with a NUL at its end and none before.
#[derive(Debug)]
pub(super) struct Wide(Vec<u16>);

impl Wide {
    pub(super) fn new(text: impl AsRef<OsStr>) -> Result<Self, HcsError> {
        let mut units: Vec<u16> = text.as_ref().encode_wide().collect();
        if units.contains(&0) {
            let message = "a text with a NUL character in it cannot be passed on";
            return Err(HcsError::Unsendable(message.to_owned()));
        }
        units.push(0);
        Ok(Wide(units))
    }
}

/// Whether a result is an error: its highest bit is set.
pub(super) fn failed(result: Hresult) -> bool {
    result.bits() >> 31 == 1
}

/// The handle of a VM.
#[derive(Debug)]
pub(super) struct System(HCS_SYSTEM);

// SAFETY: the handle is a name for something in the service; its functions take it from any thread, any number at once.
unsafe impl Send for System {}
// SAFETY: as above.
unsafe impl Sync for System {}

impl System {
    pub(super) fn open(id: &Wide) -> Result<Self, HcsError> {
        let mut handle = null_mut();
        // SAFETY: the id ends with a NUL and outlives the call, which writes a handle to memory that is ours.
        let result = unsafe { HcsOpenComputeSystem(id.0.as_ptr(), GENERIC_ALL, &mut handle) };
        match Hresult::from(result) {
            result if failed(result) || handle.is_null() => Err(HcsError::failed(result, None)),
            _ => Ok(System(handle)),
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // SAFETY: the handle was opened by us and is closed once. Operations borrow it while they are started, and
        // the service lets one be closed while others run.
        unsafe { HcsCloseComputeSystem(self.0) }
    }
}

/// Who waits for which operation. The service is given a number, no pointer: whenever its callback comes, also after
/// the operation was given up, there is nothing that it could touch too late.
static WAITING: Mutex<BTreeMap<usize, oneshot::Sender<()>>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicUsize = AtomicUsize::new(1);

fn waiting() -> MutexGuard<'static, BTreeMap<usize, oneshot::Sender<()>>> {
    // Nothing under the lock panics half-way through a change.
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service calls this from a thread of its own when an operation is done.
unsafe extern "system" fn completed(_: HCS_OPERATION, context: *const c_void) {
    let waiter = waiting().remove(&context.addr());
    if let Some(waiter) = waiter {
        // Whoever waited may have left.
        let _ = waiter.send(());
    }
}

/// Something that the service does. It is cancelled when it is dropped before its end.
#[derive(Debug)]
pub(super) struct Operation {
    handle: HCS_OPERATION,
    number: usize,
}

// SAFETY: as for the handle of a VM.
unsafe impl Send for Operation {}
// SAFETY: as above.
unsafe impl Sync for Operation {}

impl Operation {
    /// A new one, and what is told of its end.
    pub(super) fn new() -> Result<(Self, oneshot::Receiver<()>), HcsError> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (waiter, done) = oneshot::channel();
        waiting().insert(number, waiter);
        // SAFETY: the context is a number that the callback looks up; neither follows it as a pointer.
        let handle = unsafe { HcsCreateOperation(without_provenance(number), Some(completed)) };
        if handle.is_null() {
            waiting().remove(&number);
            let message = "the host compute service cannot make another operation";
            return Err(HcsError::Unsendable(message.to_owned()));
        }
        Ok((Operation { handle, number }, done))
    }

    /// Starts to change a VM.
    pub(super) fn modify(&self, system: &System, document: &Wide) -> Hresult {
        // SAFETY: both handles are open while they are borrowed, the document ends with a NUL and is copied by the call, and
        // no other identity is given.
        let result = unsafe {
            HcsModifyComputeSystem(system.0, self.handle, document.0.as_ptr(), null_mut())
        };
        result.into()
    }

    /// Starts to ask for properties of a VM.
    pub(super) fn ask(&self, system: &System, query: &Wide) -> Hresult {
        // SAFETY: as for a change.
        let result =
            unsafe { HcsGetComputeSystemProperties(system.0, self.handle, query.0.as_ptr()) };
        result.into()
    }

    /// The result of an operation that is done: its document, or why it has failed.
    pub(super) fn result(&self) -> Result<Option<String>, HcsError> {
        let mut document = null_mut();
        // SAFETY: the handle is open, and the call writes a string to memory that is ours.
        let result = unsafe { HcsGetOperationResult(self.handle, &mut document) };
        let document = LocalString(document).read();
        match Hresult::from(result) {
            result if failed(result) => Err(HcsError::failed(result, document.as_deref())),
            _ => Ok(document),
        }
    }

    pub(super) fn cancel(&self) {
        // SAFETY: the handle is open.
        let result = Hresult::from(unsafe { HcsCancelOperation(self.handle) });
        if failed(result) {
            tracing::debug!(%result, "an operation could not be cancelled");
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        waiting().remove(&self.number);
        // SAFETY: the handle is ours and closed once. The lock is free again, so that a callback which this waits for can end.
        unsafe { HcsCloseOperation(self.handle) }
    }
}

/// A string that the service has made for us.
struct LocalString(*mut u16);

impl LocalString {
    fn read(&self) -> Option<String> {
        if self.0.is_null() {
            return None;
        }
        let mut length = 0;
        // SAFETY: the string ends with a NUL, and nothing is read behind the first.
        while unsafe { *self.0.add(length) } != 0 {
            length += 1;
        }
        // SAFETY: so many units were just read, and the string is ours alone.
        let units = unsafe { std::slice::from_raw_parts(self.0, length) };
        Some(String::from_utf16_lossy(units))
    }
}

impl Drop for LocalString {
    fn drop(&mut self) {
        // SAFETY: the service says that it is freed so, and it is freed once. A null pointer is none.
        unsafe { LocalFree(self.0.cast()) };
    }
}

pub(super) fn grant_vm_access(vm: &Wide, path: &Wide) -> Hresult {
    // SAFETY: both end with a NUL and outlive the call.
    unsafe { HcsGrantVmAccess(vm.0.as_ptr(), path.0.as_ptr()) }.into()
}

pub(super) fn grant_vm_group_access(path: &Wide) -> Hresult {
    // SAFETY: as above.
    unsafe { HcsGrantVmGroupAccess(path.0.as_ptr()) }.into()
}
