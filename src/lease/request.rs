//! A request that waits for its turn.

use std::sync::Arc;

use crate::sync::{Mutex, lock};

/// What one caller asks for, until a task takes it up or the caller takes it back. It may hold leases,
/// so it must not wait in a queue for somebody who has gone.
pub(super) struct PendingRequest<J>(Arc<Mutex<Option<J>>>);

impl<J> PendingRequest<J> {
    pub(super) fn new(job: J) -> Self {
        PendingRequest(Arc::new(Mutex::new(Some(job))))
    }

    pub(super) fn take(&self) -> Option<J> {
        lock(&self.0).take()
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&J) -> T) -> Option<T> {
        lock(&self.0).as_ref().map(look)
    }

    pub(super) fn is_taken_back(&self) -> bool {
        lock(&self.0).is_none()
    }
}

impl<J> Clone for PendingRequest<J> {
    fn clone(&self) -> Self {
        PendingRequest(Arc::clone(&self.0))
    }
}

/// Takes back what a caller asked for when the caller gives up; its leases come back by their `Drop`.
pub(super) struct CancelOnDrop<J>(pub(super) PendingRequest<J>);

impl<J> Drop for CancelOnDrop<J> {
    fn drop(&mut self) {
        let taken_back = self.0.take();
        drop(taken_back);
    }
}
