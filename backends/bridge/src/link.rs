//! One request over a stream to an agent: its deadline, its answer, and what it means that there is none.

use std::time::Duration;

use blockmount::BackendError;

use crate::frames::Header;
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
    /// There was no answer in time, though the guest may have seen the request.
    TimedOut(BackendError),
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
            Failure::Lost { error, .. } | Failure::TimedOut(error) | Failure::Failed(error) => {
                error
            }
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

    /// The answer cannot be read.
    pub(crate) fn garbled(what: &str, how: &str) -> Self {
        let message = format!("the guest's answer to the {what} {how}");
        Failure::Failed(BackendError::uncertain(message))
    }

    /// There is no answer.
    fn unanswered(what: &str, deadline: Duration, why: Unanswered) -> Self {
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
            Unanswered::TimedOut { sent: true } => Failure::TimedOut(BackendError::uncertain(
                format!("the guest has not answered the {what} within {deadline:?}"),
            )),
            Unanswered::TimedOut { sent: false } => Failure::Failed(BackendError::busy(format!(
                "the guest has not read its requests for {deadline:?}; the {what} was not sent, \
                     try again later"
            ))),
        }
    }
}

/// The header and the body of a frame, or why the body cannot be read.
pub(crate) type Received<H> = (H, Result<Vec<u8>, String>);

/// The present stream to an agent, for one request.
#[derive(Debug)]
pub struct Link<'a, H> {
    pub(crate) stream: &'a Multiplexer<Received<H>>,
    /// How long the answer may take.
    pub(crate) deadline: Duration,
}

impl<H> Clone for Link<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H> Copy for Link<'_, H> {}

impl<H: Header> Link<'_, H> {
    /// Sends the bytes that are made for the id of a request, and returns its answer.
    pub(crate) async fn exchange(
        self,
        what: &str,
        write: impl FnOnce(u64) -> Result<Vec<u8>, BackendError>,
    ) -> Result<(H, Vec<u8>), Failure> {
        let unanswered = |why| Failure::unanswered(what, self.deadline, why);
        let call = self.stream.begin().map_err(unanswered)?;
        let bytes = write(call.id()).map_err(|error| {
            let message = format!("cannot ask the guest for the {what}");
            BackendError::invalid(message).with_source(error)
        })?;
        let answer = call.exchange(bytes, self.deadline).await;
        let (header, body) = answer.map_err(unanswered)?;
        Ok((header, body.map_err(|how| Failure::garbled(what, &how))?))
    }

    /// Gives the stream up, whose agent has done nothing: it is another process than the one that agreed on a version.
    pub(crate) fn restarted(self, what: &str) -> Failure {
        let why = "the agent was started anew, and knows nothing of this connection";
        self.stream.end(why);
        Failure::not_sent(what, why)
    }
}
