//! The agent's end of our own protocol.

use std::sync::Arc;
use std::time::Duration;

use blockmount::BackendError;
use serde::Serialize;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use crate::frames::{Found, FrameError, FrameReader};
use crate::protocol::{Answer, First, Hello, HelloAnswer, Id, Request, SOFTWARE, frame};
use crate::work::{FRAME, Guest, REQUESTS, Session, Worker, send};

/// Serves a guest to its hosts: requests in, calls of the guest's contracts, answers out.
///
/// Requests are done at once and answered as they end; those for one target or device in the order in which they
/// came. No request stops the server, whatever is in it. Each connection has a limit of its own, so a host that does
/// not read its answers holds up only itself. When a connection ends, what is under way goes on and its answers are
/// dropped; a request over the next connection waits for it where it must. So one server has to serve all
/// connections of a guest.
///
/// Cloning is cheap; clones are the same server.
#[derive(Debug, Clone)]
pub struct GuestServer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    worker: Worker,
    requests: usize,
    frame_timeout: Duration,
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

/// Serves a guest over one stream. As [`GuestServer::serve`], for a guest that is never reconnected.
///
/// # Errors
///
/// As for [`GuestServer::serve`].
pub async fn serve<S>(stream: S, guest: impl Guest) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite,
{
    GuestServer::new(guest).serve(stream).await
}

impl GuestServer {
    /// A server with the default limits: 256 requests of each connection at once, 30 seconds for the rest of a
    /// message.
    pub fn new(guest: impl Guest) -> Self {
        Self::with_limits(guest, REQUESTS, FRAME)
    }

    /// A server that has at most so many requests of one connection under way (at least one), and waits so long for
    /// the rest of a message that was begun.
    pub fn with_limits(guest: impl Guest, requests: usize, frame_timeout: Duration) -> Self {
        GuestServer(Arc::new(Shared {
            worker: Worker::new(guest),
            requests,
            frame_timeout,
        }))
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
        let Shared {
            worker,
            requests,
            frame_timeout,
        } = &*self.0;
        let (reader, writer) = tokio::io::split(stream);
        let (session, outgoing) = worker.session(*requests);
        let reader = FrameReader::new(reader, *frame_timeout);
        tokio::select! {
            outcome = receive(reader, &session) => outcome,
            outcome = send(writer, outgoing) => Ok(outcome.map_err(FrameError::from)?),
        }
    }
}

async fn receive<R: AsyncRead + Unpin>(
    mut reader: FrameReader<R, Id>,
    session: &Session,
) -> Result<(), ServeError> {
    let mut agreed = false;
    let mut disagreement = None;
    while let Some(found) = reader.next().await? {
        match found {
            Found::Frame(Id(id), body) if agreed => match Request::parse(&body) {
                Ok(request) => {
                    let answer = move |outcome| Some(Answer::from(outcome).frame(id));
                    session.start(request, answer).await;
                }
                Err(error) => refuse(session, id, error).await,
            },
            Found::Frame(Id(id), body) => match serde_json::from_slice(&body) {
                Ok(First::Hello(host)) => match agree(&host) {
                    Ok(answer) => {
                        agreed = true;
                        reply(session, id, &answer).await;
                    }
                    Err((answer, why)) => {
                        disagreement = Some(why);
                        reply(session, id, &answer).await;
                    }
                },
                Err(_) => reply(session, id, &Answer::HelloFirst).await,
            },
            Found::Oversize(Id(id), size) => {
                let message = format!("the request has {size} bytes, over the limit of 1 MiB");
                refuse(session, id, BackendError::invalid(message)).await;
            }
        }
    }
    match disagreement {
        Some(why) if !agreed => Err(ServeError::Incompatible(why)),
        _ => Ok(()),
    }
}

/// Chooses a version, or says why there is none.
fn agree(host: &Hello) -> Result<HelloAnswer, (HelloAnswer, String)> {
    let ours = Hello::ours();
    let software = SOFTWARE.to_owned();
    match ours.common(host) {
        Some(version) => Ok(HelloAnswer::Chosen { version, software }),
        None => {
            let why = Hello::disagreement(host, &ours);
            Err((HelloAnswer::Incompatible(ours), why))
        }
    }
}

async fn refuse(session: &Session, id: u64, error: BackendError) {
    debug!(id, %error, "refused a request of the host");
    // The connection may have ended.
    let _ = session.answers.send(Answer::Error(error).frame(id)).await;
}

async fn reply<B: Serialize>(session: &Session, id: u64, body: &B) {
    let bytes = frame(id, body).expect("a short text fits in a frame");
    let _ = session.answers.send(bytes).await;
}
