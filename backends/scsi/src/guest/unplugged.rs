//! From which addresses a disk was unplugged.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ScsiAddress;

/// The addresses at which the kernel may know a disk by one that has gone: it finds that one anew if it looks for disks between the
/// end of the unplugging and the moment at which the hypervisor takes the disk out; and in a burst of events it can miss that moment.
#[derive(Debug, Default)]
pub(super) struct Unplugged(Mutex<HashSet<ScsiAddress>>);

impl Unplugged {
    pub(super) fn note(&self, address: ScsiAddress) {
        self.addresses().insert(address);
    }

    pub(super) fn has(&self, address: ScsiAddress) -> bool {
        self.addresses().contains(&address)
    }

    fn addresses(&self) -> MutexGuard<'_, HashSet<ScsiAddress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
