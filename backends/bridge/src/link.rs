//! The host's end of a line to an agent, whatever protocol is spoken on it: the current connection, what it means
//! that there is none, and the deadlines.

use std::future::Future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::BackendError;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::multiplexer::{Multiplexer, Unanswered};

/// How long the host waits for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For the answer to one request, from the moment it is made. When it has passed only this call
    /// fails, with `Uncertain`. Default: 90 seconds, which is longer than a guest of ours takes to give up.
    pub call: Duration,
    /// For each step of the negotiation. Default: 10 seconds.
    pub negotiation: Duration,
    /// For the rest of a message that was begun; then the connection is lost. Default: 30 seconds.
    pub frame: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            call: Duration::from_secs(90),
            negotiation: Duration::from_secs(10),
            frame: Duration::from_secs(30),
        }
    }
}

/// Why a request failed.
#[derive(Debug)]
pub enum Failure {
    /// The connection was lost, or there was none.
    Lost {
        /// Whether the guest may have seen any of the request.
        sent: bool,
        /// What to say if that is the end of it; `Uncertain`.
        error: BackendError,
    },
    /// Anything else.
    Failed(BackendError),
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Failure::Failed(error)
    }
}

impl From<Failure> for BackendError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lost { error, .. } | Failure::Failed(error) => error,
        }
    }
}

impl Failure {
    /// The request was not sent, because there is no connection.
    pub(crate) fn not_sent(what: &str, why: &str) -> Self {
        let message = format!("the guest was not asked for the {what}: {why}");
        Failure::Lost {
            sent: false,
            error: BackendError::uncertain(message),
        }
    }

    /// There is no answer.
    pub(crate) fn unanswered(what: &str, deadline: Duration, why: Unanswered) -> Self {
        match why {
            Unanswered::Lost {
                sent: false,
                reason,
            } => Failure::not_sent(what, &reason),
            Unanswered::Lost { sent: true, reason } => Failure::Lost {
                sent: true,
                error: BackendError::uncertain(format!(
                    "the guest was asked for the {what} and has not answered: {reason}"
                )),
            },
            Unanswered::TimedOut { sent: true } => Failure::Failed(BackendError::uncertain(
                format!("the guest has not answered the {what} within {deadline:?}"),
            )),
            Unanswered::TimedOut { sent: false } => Failure::Failed(BackendError::busy(format!(
                "the guest has not read its requests for {deadline:?}; the {what} was not sent, \
                     try again later"
            ))),
        }
    }
}

/// The connection that requests go over, and what was agreed on when it was made.
#[derive(Debug)]
pub(crate) struct Line<A, G> {
    /// Counts on over reconnections: an answer to an old request is never one to a new.
    pub(crate) ids: Arc<AtomicU64>,
    /// Locked to be copied or replaced, never across I/O.
    current: Mutex<Current<A, G>>,
}

#[derive(Debug)]
struct Current<A, G> {
    link: Option<Arc<Multiplexer<A>>>,
    agreed: Arc<G>,
}

impl<A: Send + 'static, G: Default> Line<A, G> {
    pub(crate) fn new() -> Self {
        Line {
            ids: Arc::default(),
            current: Mutex::new(Current {
                link: None,
                agreed: Arc::default(),
            }),
        }
    }

    /// Uses a new connection from now on, and closes the old one.
    pub(crate) fn replace(&self, link: Multiplexer<A>, agreed: G) {
        let (link, agreed) = (Some(Arc::new(link)), Arc::new(agreed));
        let old = std::mem::replace(&mut *self.current(), Current { link, agreed });
        if let Some(old) = old.link {
            old.end("another connection has taken its place");
        }
    }

    pub(crate) fn close(&self) {
        let link = self.current().link.take();
        if let Some(link) = link {
            link.end("the connection was closed");
        }
    }

    /// The connection, for a request.
    pub(crate) fn link(&self, what: &str) -> Result<Arc<Multiplexer<A>>, Failure> {
        let link = self.current().link.clone();
        link.ok_or_else(|| Failure::not_sent(what, "there is no connection"))
    }

    pub(crate) fn agreed(&self) -> Arc<G> {
        self.current().agreed.clone()
    }

    fn current(&self) -> MutexGuard<'_, Current<A, G>> {
        // Nothing under the lock panics.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that can be made anew over another stream.
pub trait Reconnect: Send + Sync + 'static {
    /// What the guest is asked for.
    type Request: Clone + Send + Sync;

    /// Whether a request may be sent again when a lost connection has cut off its answer.
    fn may_repeat(request: &Self::Request) -> bool;

    /// How long is waited for what.
    fn deadlines(&self) -> Deadlines;

    /// Sends a request over the present connection.
    fn attempt(
        &self,
        request: Self::Request,
        deadline: Duration,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Connects over another stream.
    fn open<S>(&self, stream: S) -> impl Future<Output = Result<(), BackendError>> + Send
    where
        S: AsyncRead + AsyncWrite + Send + 'static;

    /// Closes the present connection.
    fn hang_up(&self);
}
