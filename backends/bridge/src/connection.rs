//! The host's end of our own protocol.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::frames::{Found, FrameReader};
use crate::line::{Deadlines, Failure, Line, Reconnect};
use crate::multiplexer::{Answers, Multiplexer};
use crate::protocol::{Answer, First, Hello, HelloAnswer, Id, Request, frame, printable};

/// The body of an answer, or why it cannot be read.
type Body = Result<Vec<u8>, String>;

/// A connection to the agent of a guest, over any stream of bytes.
///
/// Any number of requests are under way at once, and each is answered when the guest has done it. One
/// that is answered with garbage, too late or never fails alone. When the stream is lost, requests fail with
/// `Uncertain`, those under way and later ones, until [`reconnect`](Self::reconnect). A
/// [`RedialingChannel`](crate::RedialingChannel) reconnects by itself.
///
/// Cloning is cheap; clones are the same connection. The stream is closed when the last is dropped.
#[derive(Debug, Clone)]
pub struct GuestConnection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    deadlines: Deadlines,
    /// With the name and version of the agent's software.
    line: Line<Body, String>,
}

impl GuestConnection {
    /// Connects with the default [`Deadlines`].
    ///
    /// # Errors
    ///
    /// As for [`reconnect`](Self::reconnect).
    pub async fn connect<S>(stream: S) -> Result<Self, BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::connect_with(stream, Deadlines::default()).await
    }

    /// Agrees on a version over a stream; nothing else is sent before.
    ///
    /// # Errors
    ///
    /// As for [`reconnect`](Self::reconnect).
    pub async fn connect_with<S>(stream: S, deadlines: Deadlines) -> Result<Self, BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let connection = Self::unconnected(deadlines);
        connection.reconnect(stream).await?;
        Ok(connection)
    }

    pub(crate) fn unconnected(deadlines: Deadlines) -> Self {
        GuestConnection(Arc::new(Shared {
            deadlines,
            line: Line::new(),
        }))
    }

    /// Agrees on a version over another stream to the same guest, and uses that from now on. The old stream, if it
    /// still lives, is closed as if it were lost.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if host and agent have no common version of the protocol; the message says which end is older.
    /// `Uncertain` if the agent does not answer. The connection is then as it was.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the new stream and leaves the connection as it was.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn reconnect<S>(&self, stream: S) -> Result<(), BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let Shared { deadlines, line } = &*self.0;
        let link = start(stream, deadlines.frame, line.ids.clone());
        let software = negotiate(&link, deadlines.negotiation).await?;
        line.replace(link, software);
        Ok(())
    }

    /// Closes the connection; as if it were lost.
    pub fn close(&self) {
        self.0.line.close();
    }

    /// The name and version of the agent's software, as it says.
    pub fn agent(&self) -> Arc<String> {
        self.0.line.agreed()
    }

    /// Has the guest do something, within the usual deadline.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the guest may have done it: it has not answered in time, or with garbage, or there is no
    /// connection. `Busy` if it does not even read requests; this one was not sent then. `Invalid` if the request
    /// does not fit in a frame of 1 MiB or has a path that is not UTF-8. Otherwise what the guest answers; but a guest
    /// that says that it is `Gone` is `Uncertain`, since it answers.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the request.
    pub async fn call(&self, request: Request) -> Result<(), BackendError> {
        self.call_within(request, self.0.deadlines.call).await
    }

    /// As [`call`](Self::call), with a deadline of its own.
    ///
    /// # Errors
    ///
    /// As for [`call`](Self::call).
    pub async fn call_within(
        &self,
        request: Request,
        deadline: Duration,
    ) -> Result<(), BackendError> {
        Ok(self.attempt(request, deadline).await?)
    }
}

impl Reconnect for GuestConnection {
    type Request = Request;

    fn may_repeat(request: &Request) -> bool {
        request.is_teardown()
    }

    fn deadlines(&self) -> Deadlines {
        self.0.deadlines
    }

    async fn attempt(&self, request: Request, deadline: Duration) -> Result<(), Failure> {
        let what = request.describe();
        let link = self.0.line.link(&what)?;
        match exchange(&link, &what, &request, deadline).await? {
            Answer::Ok => Ok(()),
            Answer::Error(error) if error.kind() == ErrorKind::Gone => {
                let message = format!("the guest says of the {what} that it is gone");
                Err(BackendError::uncertain(message).with_source(error).into())
            }
            Answer::Error(error) => Err(error.into()),
            Answer::HelloFirst => {
                let why = "the agent was started anew, and knows nothing of this connection";
                link.end(why);
                Err(Failure::not_sent(&what, why))
            }
        }
    }

    async fn open<S>(&self, stream: S) -> Result<(), BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.reconnect(stream).await
    }

    fn hang_up(&self) {
        self.close();
    }
}

fn start<S>(stream: S, frame: Duration, ids: Arc<AtomicU64>) -> Multiplexer<Body>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, writer) = tokio::io::split(stream);
    let receive = |answers| receive(FrameReader::new(reader, frame), answers);
    Multiplexer::start(writer, ids, receive, |_| {})
}

/// Delivers answers until the stream ends, and returns the reason.
async fn receive<R: AsyncRead + Unpin>(
    mut reader: FrameReader<R, Id>,
    answers: Answers<Body>,
) -> String {
    loop {
        match reader.next_or_reason().await {
            Ok(Found::Frame(Id(id), body)) => answers.deliver(id, Ok(body)),
            Ok(Found::Oversize(Id(id), size)) => {
                answers.deliver(
                    id,
                    Err(format!("has {size} bytes, over the limit of 1 MiB")),
                );
            }
            Err(reason) => return reason,
        }
    }
}

async fn negotiate(link: &Multiplexer<Body>, deadline: Duration) -> Result<String, BackendError> {
    let host = Hello::ours();
    let first = First::Hello(host.clone());
    match exchange(link, "negotiation", &first, deadline).await? {
        HelloAnswer::Chosen { version, software } if (host.min..=host.max).contains(&version) => {
            Ok(printable(&software))
        }
        HelloAnswer::Chosen { version, software } => {
            let message = format!(
                "the agent ({}) has chosen version {version} of the protocol, which this host did not offer",
                printable(&software)
            );
            Err(BackendError::unsuitable(message))
        }
        HelloAnswer::Incompatible(agent) => {
            Err(BackendError::unsuitable(Hello::disagreement(&host, &agent)))
        }
    }
}

async fn exchange<B: serde::Serialize, A: DeserializeOwned>(
    link: &Multiplexer<Body>,
    what: &str,
    body: &B,
    deadline: Duration,
) -> Result<A, Failure> {
    let unanswered = |why| Failure::unanswered(what, deadline, why);
    let call = link.begin().map_err(unanswered)?;
    let bytes = frame(call.id(), body).map_err(|error| {
        BackendError::invalid(format!("cannot ask the guest for the {what}")).with_source(error)
    })?;
    let answer = call.exchange(bytes, deadline).await.map_err(unanswered)?;
    let garbled = |how: String| {
        let message = format!("the guest's answer to the {what} {how}");
        Failure::Failed(BackendError::uncertain(message))
    };
    let answer = answer.map_err(garbled)?;
    serde_json::from_slice(&answer).map_err(|error| garbled(format!("cannot be read: {error}")))
}
