//! A line to a guest that is made anew when it is lost.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use blockmount::{BackendError, ErrorKind};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use crate::codec::{Ask, HostCodec};
use crate::connection::Connection;
use crate::link::{Deadlines, Failure};
use crate::native::{GuestConnection, NativeHost};
use crate::{GuestChannel, Reply, Request};

/// The way to a guest's agent, and to what knows whether its VM lives.
#[async_trait]
pub trait Dialer: Send + Sync + 'static {
    /// A stream to the agent.
    type Stream: AsyncRead + AsyncWrite + Send + 'static;

    /// Dials the agent, or waits until it dials. One call at a time; the last stream is closed by then.
    ///
    /// The implementor must bound the wait, and leave nothing behind when the future is dropped.
    ///
    /// # Errors
    ///
    /// Why there is no stream; of any kind.
    async fn dial(&self) -> Result<Self::Stream, BackendError>;

    /// Whether the VM still runs. It is asked when the guest does not answer, and nothing else makes a guest count as
    /// gone. The implementor must answer `true` when it does not know.
    async fn is_alive(&self) -> bool;
}

/// A connection to a guest that dials again when the stream was lost.
///
/// A request that was not sent, because the stream was lost before, is sent over the new stream. A tear-down that a
/// lost stream has cut off is sent again, once, because tear-down may be repeated; a set-up that was cut off is
/// `Uncertain`. Both happen within the one deadline of the call. `Gone` is answered only when the dialer says that
/// the VM has ended.
pub struct RedialingChannel<D, C: HostCodec = NativeHost> {
    dialer: D,
    connection: Connection<C>,
    /// Locked while a stream is made; requests over one do not wait for it.
    dialing: Mutex<()>,
    /// Counts the streams.
    generation: AtomicU64,
}

impl<D, C: HostCodec> fmt::Debug for RedialingChannel<D, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedialingChannel")
            .field("connection", &self.connection)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl<D: Dialer> RedialingChannel<D> {
    /// Dials, with the default [`Deadlines`].
    ///
    /// # Errors
    ///
    /// As for [`connect_with`](Self::connect_with).
    pub async fn connect(dialer: D) -> Result<Self, BackendError> {
        Self::connect_with(dialer, Deadlines::default()).await
    }

    /// Dials, and agrees on a version of the protocol.
    ///
    /// # Errors
    ///
    /// Those of the dialer, and of [`GuestConnection::connect`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn connect_with(dialer: D, deadlines: Deadlines) -> Result<Self, BackendError> {
        let stream = dialer.dial().await?;
        let connection = GuestConnection::connect_with(stream, deadlines).await?;
        Ok(RedialingChannel::over(dialer, connection))
    }
}

impl<D: Dialer, C: HostCodec> RedialingChannel<D, C> {
    /// A channel whose first connection is made already.
    pub fn over(dialer: D, connection: Connection<C>) -> Self {
        RedialingChannel {
            dialer,
            connection,
            dialing: Mutex::new(()),
            generation: AtomicU64::new(0),
        }
    }

    /// The connection, such as it is now.
    pub fn connection(&self) -> &Connection<C> {
        &self.connection
    }

    /// Waits until the stream is lost and the guest cannot be reached again, and says why: the [`Dialer`] has given up, or the
    /// deadline of a call has passed; `Gone` if the VM has ended. A stream that can be made anew is made anew at once, before
    /// the next request.
    ///
    /// # Cancel safety
    ///
    /// The next request, or the next call of this, dials in its place.
    pub async fn lost(&self) -> BackendError {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            self.connection.closed().await;
            let call = self.connection.deadlines().call;
            let what = "the guest has closed the connection, and cannot be reached again";
            let error = match timeout(call, self.redial(generation)).await {
                Ok(Ok(())) => continue,
                Ok(Err(why)) => BackendError::uncertain(what).with_source(why),
                Err(_) => BackendError::uncertain(format!("{what} within {call:?}")),
            };
            return self.checked(error).await;
        }
    }

    /// Sends a message, over a new stream where it must, within one deadline. `repeatable` if it may be sent again
    /// after a lost stream has cut off its answer.
    async fn send(
        &self,
        what: &str,
        message: &C::Message,
        repeatable: bool,
    ) -> Result<Reply, BackendError> {
        let end = Instant::now() + self.connection.deadlines().call;
        // A request that was not sent, and one that was cut off: each leads to a new stream at most once.
        let (mut dialed, mut repeated) = (false, !repeatable);
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            let remaining = end.saturating_duration_since(Instant::now());
            let message = message.clone();
            let outcome = self.connection.attempt(what, message, remaining).await;
            let once = match &outcome {
                Err(Failure::Lost { sent: false, .. }) => &mut dialed,
                Err(Failure::Lost { sent: true, .. }) => &mut repeated,
                _ => &mut true,
            };
            let again = !std::mem::replace(once, true);
            let error = match outcome {
                Ok(reply) => return Ok(reply),
                Err(failure) => self.checked(failure.into()).await,
            };
            if !again || error.kind() == ErrorKind::Gone {
                return Err(error);
            }
            let redialed = timeout_at(end, self.redial(generation)).await;
            if let Ok(Err(why)) = redialed {
                let message = format!("{}; it cannot be reached again", error.message());
                let error = BackendError::uncertain(message).with_source(why);
                return Err(self.checked(error).await);
            }
            if redialed.is_err() {
                return Err(error);
            }
        }
    }

    /// Makes a new stream in place of the one of a generation, unless another caller has.
    async fn redial(&self, lost: u64) -> Result<(), BackendError> {
        let _one_at_a_time = self.dialing.lock().await;
        if self.generation.load(Ordering::Acquire) != lost {
            return Ok(());
        }
        // Some lines have one stream at a time.
        self.connection.close();
        let stream = self.dialer.dial().await?;
        self.connection.reconnect(stream).await?;
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// What an error means, now that the VM may have ended.
    async fn checked(&self, error: BackendError) -> BackendError {
        if error.kind() != ErrorKind::Uncertain || self.dialer.is_alive().await {
            return error;
        }
        BackendError::gone("the VM has ended").with_source(error)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<D: Dialer, C: HostCodec> GuestChannel for RedialingChannel<D, C> {
    async fn call(&self, request: Request) -> Result<Reply, BackendError> {
        let (what, repeatable) = (request.describe(), request.is_teardown());
        let message = match self.connection.translate(request)? {
            Ask::Send(message) => message,
            Ask::Answer(reply) => return Ok(reply),
        };
        let outcome = self.send(&what, &message, repeatable).await;
        self.connection.codec().settle(&message, &outcome);
        outcome
    }
}
