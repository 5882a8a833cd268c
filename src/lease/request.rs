//! A request that waits for its turn and then for its answer.

use std::sync::Arc;

use crate::sync::{Mutex, lock, oneshot};

/// What one caller requests, and where its answer goes.
///
/// The work on a request begins in its caller, which takes the answer from it directly. Once the work has moved to a
/// task, the answer is sent to whoever waits for it.
pub(super) struct PendingRequest<J, A>(Arc<Mutex<Pending<J, A>>>);

struct Pending<J, A> {
    /// Until the work takes it or the caller cancels it. It may hold leases, so it must not stay in a queue after its caller
    /// is gone.
    job: Option<J>,
    answer: Option<oneshot::Sender<A>>,
}

impl<J, A> PendingRequest<J, A> {
    pub(super) fn new(job: J) -> Self {
        let (job, answer) = (Some(job), None);
        PendingRequest(Arc::new(Mutex::new(Pending { job, answer })))
    }

    pub(super) fn take(&self) -> Option<J> {
        lock(&self.0).job.take()
    }

    pub(super) fn peek<T>(&self, read: impl FnOnce(&J) -> T) -> Option<T> {
        lock(&self.0).job.as_ref().map(read)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        lock(&self.0).job.is_none()
    }

    /// From now on the answer is sent.
    pub(super) fn receive(&self) -> oneshot::Receiver<A> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.0).answer = Some(sender);
        receiver
    }

    /// Sends the answer to a caller that waits for it, or drops it here if that has given up. It comes back for a caller in
    /// which the work still runs.
    pub(super) fn answer(&self, answer: A) -> Option<A> {
        let waiting = lock(&self.0).answer.take();
        match waiting {
            None => Some(answer),
            Some(waiting) => {
                drop(waiting.send(answer));
                None
            }
        }
    }
}

impl<J, A> Clone for PendingRequest<J, A> {
    fn clone(&self) -> Self {
        PendingRequest(Arc::clone(&self.0))
    }
}

/// Drops a request when its caller is cancelled; the leases in it are released by their `Drop`.
pub(super) struct CancelOnDrop<J, A>(pub(super) PendingRequest<J, A>);

impl<J, A> Drop for CancelOnDrop<J, A> {
    fn drop(&mut self) {
        let cancelled = self.0.take();
        drop(cancelled);
    }
}
