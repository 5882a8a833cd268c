//! One connection to a guest: requests out, answers in, each tied to its caller.
//!
//! One task owns the stream. What it shares with the callers is a table of the calls that wait; the table is
//! locked for a look-up, never across I/O. A peer that stops reading fills a short queue, and each
//! caller behind it is freed by its own deadline.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::BackendError;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::debug;

use crate::gcs::messages::{Notification, decode};
use crate::gcs::wire::{Decoded, Frame, FrameReader, MessageType, Role};

/// How many requests wait for a peer that reads slowly; more wait with their callers.
const QUEUE: usize = 16;

/// A connection. It ends when the last caller lets go of it.
#[derive(Debug)]
pub(crate) struct Link {
    calls: Arc<Calls>,
    queue: mpsc::Sender<Outgoing>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Outgoing {
    id: u64,
    bytes: Vec<u8>,
}

/// The calls that wait for an answer.
#[derive(Debug, Default)]
struct Calls(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    /// Why there are no more answers.
    ended: Option<Arc<str>>,
    calls: HashMap<u64, Call>,
}

#[derive(Debug)]
struct Call {
    message: MessageType,
    /// Whether the peer may have seen any of it.
    sent: bool,
    answer: oneshot::Sender<Answer>,
}

#[derive(Debug)]
enum Answer {
    Payload(Vec<u8>),
    /// There was an answer, and nobody can read it.
    Garbled(String),
    /// There is none, and will be none.
    Ended {
        sent: bool,
        reason: Arc<str>,
    },
}

impl Answer {
    /// What it means for the caller.
    fn outcome(self, what: &str) -> Result<Vec<u8>, BackendError> {
        match self {
            Answer::Payload(payload) => Ok(payload),
            Answer::Garbled(how) => Err(BackendError::uncertain(format!(
                "the guest's answer to {what} {how}"
            ))),
            Answer::Ended {
                sent: false,
                reason,
            } => Err(BackendError::gone(format!(
                "the guest was not asked for {what}: {reason}"
            ))),
            Answer::Ended { sent: true, reason } => Err(BackendError::uncertain(format!(
                "the guest was asked for {what} and has not answered: {reason}"
            ))),
        }
    }
}

impl Link {
    /// Takes over a stream.
    pub(crate) fn start<S>(
        stream: S,
        frame_deadline: Duration,
        notifications: broadcast::Sender<Notification>,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let calls = Arc::new(Calls::default());
        let (queue, requests) = mpsc::channel(QUEUE);
        let (reader, writer) = tokio::io::split(stream);
        let end = EndOnDrop(calls.clone());
        let task = tokio::spawn(async move {
            let reader = FrameReader::new(reader, frame_deadline);
            let reason = tokio::select! {
                reason = receive(reader, &end.0, &notifications) => reason,
                reason = send(writer, &end.0, requests) => reason,
            };
            debug!(%reason, "the connection to the guest has ended");
            end.0.end(&reason);
        });
        Link {
            calls,
            queue,
            task: task.abort_handle(),
        }
    }

    /// Asks, and waits for the answer. `what` names the call in errors.
    ///
    /// Dropping the future gives the call up; an answer that still comes is ignored.
    pub(crate) async fn ask(
        &self,
        what: &str,
        frame: Frame,
        deadline: Duration,
    ) -> Result<Vec<u8>, BackendError> {
        let bytes = frame.encode().map_err(|error| {
            BackendError::invalid(format!(
                "cannot ask the guest for {what}: the request is too long"
            ))
            .with_source(error)
        })?;
        let (id, message) = (frame.id, frame.message);
        let (answer, mut answered) = oneshot::channel();
        let call = Call {
            message,
            sent: false,
            answer,
        };
        let call = self.calls.begin(id, call).map_err(|reason| {
            BackendError::gone(format!("cannot ask the guest for {what}: {reason}"))
        })?;
        let in_time = timeout(deadline, async {
            // The queue is closed only after every call was given its answer.
            let _ = self.queue.send(Outgoing { id, bytes }).await;
            (&mut answered).await
        });
        let answer = match in_time.await {
            Ok(answer) => answer.ok(),
            Err(_) => match call.give_up() {
                Some(given_up) => return Err(too_late(what, given_up.sent, deadline)),
                // It came in the last moment.
                None => answered.try_recv().ok(),
            },
        };
        match answer {
            Some(answer) => answer.outcome(what),
            None => Err(BackendError::uncertain(format!(
                "nobody knows the outcome of {what}"
            ))),
        }
    }

    /// Ends the connection.
    pub(crate) fn end(&self, reason: &str) {
        self.calls.end(reason);
        self.task.abort();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn too_late(what: &str, sent: bool, deadline: Duration) -> BackendError {
    if sent {
        let message = format!("the guest has not answered {what} within {deadline:?}");
        return BackendError::uncertain(message);
    }
    let message = format!(
        "the guest has not read its requests for {deadline:?}; {what} was not sent, try again later"
    );
    BackendError::busy(message)
}

/// A call in the table; out of it when dropped.
struct Begun<'a> {
    calls: &'a Calls,
    id: u64,
}

impl Begun<'_> {
    fn give_up(&self) -> Option<Call> {
        self.calls.lock().calls.remove(&self.id)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Frees the callers also where the task was aborted.
struct EndOnDrop(Arc<Calls>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end("the connection was closed");
    }
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, id: u64, call: Call) -> Result<Begun<'_>, Arc<str>> {
        let mut waiting = self.lock();
        if let Some(reason) = &waiting.ended {
            return Err(reason.clone());
        }
        waiting.calls.insert(id, call);
        Ok(Begun { calls: self, id })
    }

    /// Whether somebody still waits; from now on the peer may have seen the request.
    fn sending(&self, id: u64) -> bool {
        let mut waiting = self.lock();
        let call = waiting.calls.get_mut(&id);
        call.map(|call| call.sent = true).is_some()
    }

    fn answer(&self, message: Option<MessageType>, id: u64, answer: Answer) {
        let call = self.lock().calls.remove(&id);
        let Some(call) = call else {
            // Its caller has given up, or there never was one. No reason to fail anybody else.
            return debug!(id, "ignored an answer that nobody waits for");
        };
        let expected = call.message.response();
        let answer = match message {
            Some(message) if message != expected => {
                Answer::Garbled(format!("is of type {message} in place of {expected}"))
            }
            _ => answer,
        };
        // The caller may have been dropped just now.
        let _ = call.answer.send(answer);
    }

    fn end(&self, reason: &str) {
        let reason: Arc<str> = reason.into();
        let mut waiting = self.lock();
        if waiting.ended.is_some() {
            return;
        }
        waiting.ended = Some(reason.clone());
        for (_, call) in waiting.calls.drain() {
            let (sent, reason) = (call.sent, reason.clone());
            let _ = call.answer.send(Answer::Ended { sent, reason });
        }
    }
}

/// Hands out answers until the stream ends, and says why it did.
async fn receive<R: AsyncRead + Unpin>(
    mut reader: FrameReader<R>,
    calls: &Calls,
    notifications: &broadcast::Sender<Notification>,
) -> String {
    loop {
        match reader.next().await {
            Ok(Some(Decoded::Frame(frame))) => match frame.message.role() {
                Role::Response => {
                    calls.answer(
                        Some(frame.message),
                        frame.id,
                        Answer::Payload(frame.payload),
                    );
                }
                Role::Notification => notify(&frame, notifications),
                role => debug!(message = %frame.message, ?role, "ignored a message of the guest"),
            },
            Ok(Some(Decoded::Oversize { message, id, size })) => {
                debug!(%message, id, size, "skipped a message of the guest over the limit");
                if message.role() == Role::Response {
                    let how = format!("has {size} bytes, over the limit of 64 KiB");
                    calls.answer(Some(message), id, Answer::Garbled(how));
                }
            }
            Ok(None) => return "the guest has closed the connection".to_owned(),
            Err(error) => {
                return format!(
                    "the connection to the guest was lost: {}",
                    with_cause(&error)
                );
            }
        }
    }
}

fn notify(frame: &Frame, notifications: &broadcast::Sender<Notification>) {
    match decode::<Notification>(&frame.payload) {
        // Nobody has to listen.
        Ok(notification) => drop(notifications.send(notification)),
        Err(error) => debug!(%error, "ignored a notification that cannot be read"),
    }
}

/// Writes requests until the stream fails, and says why.
async fn send<S: AsyncWrite>(
    mut writer: WriteHalf<S>,
    calls: &Calls,
    mut requests: mpsc::Receiver<Outgoing>,
) -> String {
    while let Some(Outgoing { id, bytes }) = requests.recv().await {
        // What was given up before it was sent never happens at all.
        if !calls.sending(id) {
            continue;
        }
        let written = async {
            writer.write_all(&bytes).await?;
            writer.flush().await
        };
        if let Err(error) = written.await {
            return format!("the connection to the guest was lost: {error}");
        }
    }
    "the connection was closed".to_owned()
}

/// An error with its cause, on one line.
fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
