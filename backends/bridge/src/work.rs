//! What an agent does for its hosts, whatever protocol they speak.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, LayerCombiner, Mounter, Unplugger};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tracing::debug;

use crate::order::Order;
use crate::protocol::{Key, Request};

/// How many requests of one connection are under way at once, unless told otherwise: as many as there are disks on
/// four controllers of Hyper-V. More wait in the stream.
pub(crate) const REQUESTS: usize = 256;

/// How long the rest of a message may take that was begun, unless told otherwise.
pub(crate) const FRAME: Duration = Duration::from_secs(30);

/// How many answers wait for a host that reads slowly; more wait with their requests.
const ANSWERS: usize = 16;

/// All that a guest does for its host. Implemented for whatever keeps the three contracts.
pub trait Guest: Mounter + LayerCombiner + Unplugger {}

impl<G: Mounter + LayerCombiner + Unplugger + ?Sized> Guest for G {}

/// A guest, and the order of the requests for it over all connections.
#[derive(Clone)]
pub(crate) struct Worker {
    guest: Arc<dyn Guest>,
    order: Order<Key>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

/// One connection's share of a worker: its requests under way, and its answers. A host that does not read its answers
/// uses up its own limit and no other connection's.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    worker: Worker,
    permits: Arc<Semaphore>,
    pub(crate) answers: mpsc::Sender<Vec<u8>>,
}

impl Worker {
    pub(crate) fn new(guest: impl Guest) -> Self {
        Worker {
            guest: Arc::new(guest),
            order: Order::default(),
        }
    }

    /// A connection with at most so many requests under way, and its answers as they are to be sent.
    pub(crate) fn session(&self, requests: usize) -> (Session, mpsc::Receiver<Vec<u8>>) {
        let (answers, outgoing) = mpsc::channel(ANSWERS);
        let requests = requests.clamp(1, Semaphore::MAX_PERMITS);
        let session = Session {
            worker: self.clone(),
            permits: Arc::new(Semaphore::new(requests)),
            answers,
        };
        (session, outgoing)
    }
}

impl Session {
    /// Starts a request in a task of its own, which nothing ends half-way, and returns. `answer` makes the bytes of
    /// the answer; none are sent where it makes none.
    ///
    /// It waits while too many requests are under way: then nothing more is read from the stream.
    pub(crate) async fn start(
        &self,
        request: Request,
        answer: impl FnOnce(Result<(), BackendError>) -> Option<Vec<u8>> + Send + 'static,
    ) {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let (worker, answers) = (self.worker.clone(), self.answers.clone());
        // Here and not in the task: tasks may start in another order.
        let mut turn = worker.order.queue(request.key());
        tokio::spawn(async move {
            let done = tokio::spawn(async move {
                turn.come().await;
                run(&*worker.guest, request).await
            });
            let outcome = done.await.unwrap_or_else(|_| {
                let message = "the guest's backend panicked; what it has done is unknown";
                Err(BackendError::uncertain(message))
            });
            if let Err(error) = &outcome {
                debug!(%error, "a request of the host has failed");
            }
            if let Some(bytes) = answer(outcome) {
                // The connection may have ended.
                let _ = answers.send(bytes).await;
            }
            drop(permit);
        });
    }
}

async fn run(guest: &dyn Guest, request: Request) -> Result<(), BackendError> {
    match request {
        Request::Mount {
            locator,
            target,
            options,
        } => guest.mount(&locator, &target, &options).await,
        Request::Unmount { target } => guest.unmount(&target).await,
        Request::Combine(overlay) => guest.combine(&overlay).await,
        Request::Separate { target } => guest.separate(&target).await,
        Request::Unplug { locator } => guest.unplug(&locator).await,
    }
}

/// Writes answers until the stream fails.
pub(crate) async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
) -> std::io::Result<()> {
    while let Some(bytes) = outgoing.recv().await {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
    }
    Ok(())
}
