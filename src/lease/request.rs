//! A request that waits for its turn.

use std::sync::Arc;

use crate::sync::{Mutex, lock};

/// What one caller requests, until a task takes it or the caller cancels it. It may hold leases, so it must
/// not stay in a queue after its caller is gone.
pub(super) struct PendingRequest<J>(Arc<Mutex<Option<J>>>);

impl<J> PendingRequest<J> {
    pub(super) fn new(job: J) -> Self {
        PendingRequest(Arc::new(Mutex::new(Some(job))))
    }

    pub(super) fn take(&self) -> Option<J> {
        lock(&self.0).take()
    }

    pub(super) fn peek<T>(&self, read: impl FnOnce(&J) -> T) -> Option<T> {
        lock(&self.0).as_ref().map(read)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        lock(&self.0).is_none()
    }
}

impl<J> Clone for PendingRequest<J> {
    fn clone(&self) -> Self {
        PendingRequest(Arc::clone(&self.0))
    }
}

/// Drops a request when its caller is cancelled; the leases in it are released by their `Drop`.
pub(super) struct CancelOnDrop<J>(pub(super) PendingRequest<J>);

impl<J> Drop for CancelOnDrop<J> {
    fn drop(&mut self) {
        let cancelled = self.0.take();
        drop(cancelled);
    }
}
