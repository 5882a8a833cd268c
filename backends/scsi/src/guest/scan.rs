//! Having the kernel look for one LUN, and never while that LUN is being unplugged.
//!
//! A scan that runs during an unplug, or after it, would bring the disk back before the hypervisor has taken it out.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use blockmount::blocking;
use blockmount_linux::sysfs;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::controller::shown;
use crate::ScsiAddress;

/// One lock for each of the addresses that are scanned or unplugged now.
#[derive(Debug, Default)]
pub(super) struct AddressLocks(Mutex<HashMap<ScsiAddress, Arc<AsyncMutex<()>>>>);

impl AddressLocks {
    /// Waits until nothing else scans or unplugs an address, and keeps others from it until the answer is dropped.
    pub(super) async fn of(&self, address: ScsiAddress) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(address).or_default())
        };
        lock.lock_owned().await
    }
}

/// Has the kernel look for exactly this LUN, unless `wanted` has been dropped by then: looking for all of them costs a
/// command for each. What is found announces itself.
pub(super) async fn scan(
    locks: Arc<AddressLocks>,
    host_directory: Box<Path>,
    address: ScsiAddress,
    wanted: Weak<()>,
) {
    let lock = locks.of(address).await;
    let value = format!("0 0 {}", shown(address.lun));
    let scan = move || {
        // The lock is kept until the kernel has answered, which may be long after the caller has given up.
        let _lock = lock;
        match wanted.upgrade() {
            Some(_) => sysfs::command(&host_directory, "scan", &value),
            None => Ok(false),
        }
    };
    if let Err(error) = blocking(scan).await {
        tracing::warn!(%address, %error, "cannot have the kernel look for a disk");
    }
}
