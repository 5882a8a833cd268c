//! The host's end: a connection to an agent, whatever protocol is spoken on it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::BackendError;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::codec::{Ask, HostCodec};
use crate::frames::{Found, FrameReader, Header, too_large};
use crate::link::{Deadlines, Failure, Link, Received};
use crate::multiplexer::{Answers, Multiplexer};
use crate::protocol::{Reply, Request};

/// A connection to the agent of a guest, over any stream of bytes.
///
/// Any number of requests are under way at once, and each is answered when the guest has done it. One
/// that is answered with garbage, too late or never fails alone. When the stream is lost, requests fail with
/// `Uncertain`, those under way and later ones, until [`reconnect`](Self::reconnect). A
/// [`RedialingChannel`](crate::RedialingChannel) reconnects by itself.
///
/// Cloning is cheap; clones are the same connection. The stream is closed when the last is dropped.
#[derive(Debug)]
pub struct Connection<C: HostCodec>(Arc<Shared<C>>);

impl<C: HostCodec> Clone for Connection<C> {
    fn clone(&self) -> Self {
        Connection(self.0.clone())
    }
}

#[derive(Debug)]
struct Shared<C: HostCodec> {
    codec: Arc<C>,
    deadlines: Deadlines,
    /// Counts on over reconnections: an answer to an old request is never one to a new.
    ids: Arc<AtomicU64>,
    /// Locked to be copied or replaced, never across I/O.
    current: Mutex<Current<C>>,
}

/// The stream that requests go over, and what was agreed on when it was made.
#[derive(Debug)]
struct Current<C: HostCodec> {
    stream: Option<Arc<Multiplexer<Received<C::Header>>>>,
    agreed: Arc<C::Agreed>,
}

impl<C: HostCodec> Connection<C> {
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
        let connection = Connection(Arc::new(Shared {
            codec: Arc::default(),
            deadlines,
            ids: Arc::default(),
            current: Mutex::new(Current {
                stream: None,
                agreed: Arc::default(),
            }),
        }));
        connection.reconnect(stream).await?;
        Ok(connection)
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
        let Shared {
            codec,
            deadlines,
            ids,
            ..
        } = &*self.0;
        let (reader, writer) = tokio::io::split(stream);
        let reader = FrameReader::new(reader, deadlines.frame);
        let receive = |answers| receive(codec.clone(), reader, answers);
        let stream = Multiplexer::start(writer, ids.clone(), receive, |_| {});
        let link = Link {
            stream: &stream,
            deadline: deadlines.negotiation,
        };
        let agreed = Arc::new(codec.negotiate(link).await?);
        let stream = Some(Arc::new(stream));
        let old = std::mem::replace(&mut *self.current(), Current { stream, agreed });
        if let Some(old) = old.stream {
            old.end("another connection has taken its place");
        }
        Ok(())
    }

    /// Closes the connection; as if it were lost.
    pub fn close(&self) {
        let stream = self.current().stream.take();
        if let Some(stream) = stream {
            stream.end("the connection was closed");
        }
    }

    /// Waits until the present stream has ended; if there is none, not at all.
    pub(crate) async fn closed(&self) {
        let stream = self.current().stream.clone();
        if let Some(stream) = stream {
            stream.closed().await;
        }
    }

    /// Has the guest do something, within the usual deadline.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the guest may have done it: it has not answered in time, or with garbage, or there is no
    /// connection. `Busy` if it does not even read requests; this one was not sent then. `Invalid` if the request
    /// does not fit in a frame or has a path that the protocol cannot carry, `Unsuitable` if the protocol has no message
    /// for it. Otherwise what the guest answers; but a guest that says that it is `Gone` is `Uncertain`, since it answers.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the request.
    pub async fn call(&self, request: Request) -> Result<Reply, BackendError> {
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
    ) -> Result<Reply, BackendError> {
        let what = request.describe();
        let message = match self.translate(request)? {
            Ask::Send(message) => message,
            Ask::Answer(reply) => return Ok(reply),
        };
        let outcome = self.attempt(&what, message.clone(), deadline).await;
        let outcome = outcome.map_err(BackendError::from);
        self.codec().settle(&message, &outcome);
        outcome
    }

    /// What is sent for a request.
    pub(crate) fn translate(&self, request: Request) -> Result<Ask<C::Message>, BackendError> {
        self.codec().translate(request, &self.agreed())
    }

    /// Sends a message over the present stream.
    pub(crate) async fn attempt(
        &self,
        what: &str,
        message: C::Message,
        deadline: Duration,
    ) -> Result<Reply, Failure> {
        let stream = self.current().stream.clone();
        let stream = stream.ok_or_else(|| Failure::not_sent(what, "there is no connection"))?;
        let link = Link {
            stream: &stream,
            deadline,
        };
        self.codec().exchange(link, what, message).await
    }

    pub(crate) fn agreed(&self) -> Arc<C::Agreed> {
        self.current().agreed.clone()
    }

    pub(crate) fn codec(&self) -> &C {
        &self.0.codec
    }

    pub(crate) fn deadlines(&self) -> Deadlines {
        self.0.deadlines
    }

    fn current(&self) -> MutexGuard<'_, Current<C>> {
        // Nothing under the lock panics.
        let current = self.0.current.lock();
        current.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Delivers answers until the stream ends, and returns the reason.
async fn receive<R: AsyncRead + Unpin, C: HostCodec>(
    codec: Arc<C>,
    mut reader: FrameReader<R, C::Header>,
    answers: Answers<Received<C::Header>>,
) -> String {
    loop {
        let (header, body) = match reader.next_or_reason().await {
            Ok(Found::Frame(header, body)) => (header, Ok(body)),
            Ok(Found::Oversize(header, size)) => (header, Err(too_large::<C::Header>(size))),
            Err(reason) => return reason,
        };
        if !codec.take_unasked(&header, &body) {
            answers.deliver(header.id(), (header, body));
        }
    }
}
