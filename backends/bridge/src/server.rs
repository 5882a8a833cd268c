//! The agent's end: what an agent does for its hosts, whatever protocol they speak.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, Binder, ErrorKind, LayerCombiner, Mounter, Turns, Unplugger};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::debug;

use crate::codec::{AgentCodec, Step, WriteAnswer};
use crate::frames::{Found, FrameError, FrameReader, too_large};
use crate::protocol::{Key, Reply, Request};

/// How many requests of one connection are under way at once, unless told otherwise: as many as there are disks on
/// four controllers of Hyper-V. More wait in the stream.
const REQUESTS: usize = 256;

/// How long the rest of a message may take that was begun, unless told otherwise.
const FRAME: Duration = Duration::from_secs(30);

/// How many answers wait for a host that reads slowly; more wait with their requests.
const ANSWERS: usize = 16;

/// All that a guest does for its host. Implemented for whatever keeps the four contracts.
pub trait Guest: Mounter + LayerCombiner + Binder + Unplugger {}

impl<G: Mounter + LayerCombiner + Binder + Unplugger + ?Sized> Guest for G {}

/// Serves a guest to its hosts: requests in, calls of the guest's contracts, answers out.
///
/// Requests are done at once and answered as they end; those for one target or device in the order in which they
/// came. No request stops the server, whatever is in it. Each connection has a limit of its own, so a host that does
/// not read its answers holds up only itself. When a connection ends, what is under way goes on and its answers are
/// dropped; a request over the next connection waits for it where it must. So one server has to serve all
/// connections of a guest.
///
/// Cloning is cheap; clones are the same server.
#[derive(Debug)]
pub struct Server<C>(Arc<Shared<C>>);

impl<C> Clone for Server<C> {
    fn clone(&self) -> Self {
        Server(self.0.clone())
    }
}

struct Shared<C> {
    codec: C,
    guest: Arc<dyn Guest>,
    /// The order of the requests over all connections.
    turns: Turns<Key>,
    requests: usize,
    frame_timeout: Duration,
}

impl<C: fmt::Debug> fmt::Debug for Shared<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("codec", &self.codec)
            .finish_non_exhaustive()
    }
}

/// Why a connection was given up.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The stream failed, or is not made of frames any more.
    #[error("the connection to the host was lost")]
    Frame(#[from] FrameError),
    /// Host and agent have no common version of the protocol.
    #[error("{0}")]
    Incompatible(String),
}

impl<C: AgentCodec> Server<C> {
    /// A server with the default limits: 256 requests of each connection at once, 30 seconds for the rest of a
    /// message.
    pub fn new(guest: impl Guest) -> Self {
        Self::with_limits(guest, REQUESTS, FRAME)
    }

    /// A server that has at most so many requests of one connection under way (at least one), and waits so long for
    /// the rest of a message that was begun.
    pub fn with_limits(guest: impl Guest, requests: usize, frame_timeout: Duration) -> Self {
        Self::of(C::default(), guest, requests, frame_timeout)
    }

    /// A server with the default limits, that speaks by this codec.
    pub(crate) fn with_codec(codec: C, guest: impl Guest) -> Self {
        Self::of(codec, guest, REQUESTS, FRAME)
    }

    fn of(codec: C, guest: impl Guest, requests: usize, frame_timeout: Duration) -> Self {
        Server(Arc::new(Shared {
            codec,
            guest: Arc::new(guest),
            turns: Turns::default(),
            requests: requests.clamp(1, Semaphore::MAX_PERMITS),
            frame_timeout,
        }))
    }

    pub(crate) fn codec(&self) -> &C {
        &self.0.codec
    }

    /// Serves one connection until its host ends it.
    ///
    /// # Errors
    ///
    /// [`ServeError`]. The next connection can be served in any case.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection; what is under way goes on.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn serve<S>(&self, stream: S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite,
    {
        let (reader, writer) = tokio::io::split(stream);
        let (answers, outgoing) = mpsc::channel(ANSWERS);
        let connection = Connection {
            server: self,
            permits: Arc::new(Semaphore::new(self.0.requests)),
            answers,
            agreed: watch::Sender::new(false),
        };
        let reader = FrameReader::new(reader, self.0.frame_timeout);
        tokio::select! {
            outcome = connection.receive(reader) => outcome,
            outcome = send(writer, outgoing) => Ok(outcome.map_err(FrameError::from)?),
            () = connection.send_unasked() => Ok(()),
        }
    }
}

/// One connection: its requests under way, and its answers.
struct Connection<'a, C> {
    server: &'a Server<C>,
    permits: Arc<Semaphore>,
    answers: mpsc::Sender<Vec<u8>>,
    /// Whether a version was agreed on.
    agreed: watch::Sender<bool>,
}

impl<C: AgentCodec> Connection<'_, C> {
    async fn receive<R: AsyncRead + Unpin>(
        &self,
        mut reader: FrameReader<R, C::Header>,
    ) -> Result<(), ServeError> {
        let codec = self.server.codec();
        let mut disagreement = None;
        while let Some(found) = reader.next().await? {
            let agreed = *self.agreed.borrow();
            let step = match found {
                Found::Frame(header, body) => codec.read(header, &body, agreed),
                Found::Oversize(header, size) => {
                    let why = format!("the request {}", too_large::<C::Header>(size));
                    codec.refuse(header, why)
                }
            };
            match step {
                Step::Ignore => {}
                Step::Reply(bytes) => self.answer(bytes).await,
                Step::Agree(bytes) => {
                    // The answer first: what is sent unasked must not overtake it.
                    self.answer(bytes).await;
                    self.agreed.send_replace(true);
                }
                Step::Disagree(bytes, why) => {
                    disagreement = Some(why);
                    self.answer(bytes).await;
                }
                Step::Run {
                    request,
                    otherwise,
                    write,
                } => self.start(request, otherwise, write).await,
            }
        }
        match disagreement {
            Some(why) if !*self.agreed.borrow() => Err(ServeError::Incompatible(why)),
            _ => Ok(()),
        }
    }

    async fn answer(&self, bytes: Vec<u8>) {
        // The connection may have ended.
        let _ = self.answers.send(bytes).await;
    }

    async fn send_unasked(&self) {
        let mut agreed = self.agreed.subscribe();
        // The sender lives as long as `self`.
        let _ = agreed.wait_for(|agreed| *agreed).await;
        self.server.codec().send_unasked(self.answers.clone()).await;
    }

    /// Starts a request in a task of its own, which nothing ends half-way, and returns.
    ///
    /// It waits while too many requests are under way: then nothing more is read from the stream.
    async fn start(&self, request: Request, otherwise: Option<Request>, write: WriteAnswer) {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let Shared { guest, turns, .. } = &*self.server.0;
        let (guest, answers) = (guest.clone(), self.answers.clone());
        let (key, what) = (request.key(), request.describe());
        let done = turns.run(key, async move {
            match (run(&*guest, request).await, otherwise) {
                (Err(error), Some(other)) if error.kind() == ErrorKind::Conflict => {
                    run(&*guest, other).await
                }
                (outcome, _) => outcome,
            }
        });
        tokio::spawn(async move {
            let outcome = done.await;
            if let Err(error) = &outcome {
                debug!(%what, %error, "a request of the host has failed");
            }
            if let Some(bytes) = write(outcome) {
                // The connection may have ended.
                let _ = answers.send(bytes).await;
            }
            drop(permit);
        });
    }
}

async fn run(guest: &dyn Guest, request: Request) -> Result<Reply, BackendError> {
    let done = match request {
        Request::Mount {
            locator,
            target,
            options,
        } => guest.mount(&locator, &target, &options).await,
        Request::Unmount { target } => guest.unmount(&target).await,
        Request::Combine(overlay) => guest.combine(&overlay).await,
        Request::Separate { target } => guest.separate(&target).await,
        Request::Unplug { locator } => guest.unplug(&locator).await,
        Request::AdoptMount {
            locator,
            target,
            options,
        } => {
            let found = Mounter::adopt(guest, &locator, &target, &options).await;
            return found.map(Reply::Presence);
        }
        Request::AdoptOverlay(overlay) => {
            let found = LayerCombiner::adopt(guest, &overlay).await;
            return found.map(Reply::Presence);
        }
        Request::Usage { target } => return guest.usage(&target).await.map(Reply::Usage),
        Request::Trim { target } => return guest.trim(&target).await.map(Reply::Trimmed),
        Request::Grow { target, bytes } => guest.grow(&target, bytes).await,
        Request::Bind(bind) => guest.bind(&bind).await,
        Request::Unbind { target } => guest.unbind(&target).await,
        Request::AdoptView(bind) => {
            let found = Binder::adopt(guest, &bind).await;
            return found.map(Reply::Presence);
        }
    };
    done.map(|()| Reply::Done)
}

/// Writes answers until the stream fails.
async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
) -> std::io::Result<()> {
    while let Some(mut bytes) = outgoing.recv().await {
        // What waits already is written at once: in a guest, each write leaves it.
        while let Ok(further) = outgoing.try_recv() {
            bytes.extend(further);
        }
        writer.write_all(&bytes).await?;
        writer.flush().await?;
    }
    Ok(())
}
