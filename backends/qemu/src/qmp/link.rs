//! The stream to QEMU: commands out, answers in, each tied to its caller.
//!
//! One task owns the stream. What it shares with the callers is a table of the calls that wait; the table is
//! locked for a look-up, never across I/O. A QEMU that stops reading fills a short queue, and each
//! caller behind it is freed by its own deadline.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::debug;

use super::QmpError;
use super::error::one_line;
use super::events::Listeners;
use super::lines::{Line, LineReader};
use super::message::{Message, Outcome, message};

/// How many commands wait for a QEMU that reads slowly; more wait with their callers. QEMU itself takes 8 from the
/// stream before it has answered the first.
const QUEUE: usize = 16;

/// How long what QEMU has said before it closed its end is still listened to.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A connection. It ends when the last caller lets go of it.
#[derive(Debug)]
pub(super) struct Link {
    calls: Arc<Calls>,
    queue: mpsc::Sender<Outgoing>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Outgoing {
    id: u64,
    line: Vec<u8>,
}

/// The calls that wait for an answer.
#[derive(Debug)]
struct Calls {
    waiting: Mutex<Waiting>,
    /// Why there are no more answers. Set under the lock of the calls.
    ended: watch::Sender<Option<Arc<str>>>,
    listeners: Arc<Listeners>,
}

#[derive(Debug, Default)]
struct Waiting {
    next_id: u64,
    calls: HashMap<u64, Call>,
}

#[derive(Debug)]
struct Call {
    /// Whether QEMU may have seen any of it.
    sent: bool,
    answer: oneshot::Sender<Outcome>,
}

impl Link {
    /// Takes over a stream whose greeting has been read.
    pub(super) fn start<S>(
        reader: LineReader<ReadHalf<S>>,
        writer: WriteHalf<S>,
        listeners: Arc<Listeners>,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let calls = Arc::new(Calls {
            waiting: Mutex::default(),
            ended: watch::Sender::new(None),
            listeners,
        });
        let (queue, commands) = mpsc::channel(QUEUE);
        let end = EndOnDrop(calls.clone());
        let task = tokio::spawn(async move {
            let mut receiving = pin!(receive(reader, &end.0));
            let reason = tokio::select! {
                reason = &mut receiving => reason,
                // QEMU may have answered before it closed its end.
                reason = send(writer, &end.0, commands) => {
                    timeout(LAST_WORDS, receiving).await.unwrap_or(reason)
                }
            };
            debug!(%reason, "the connection to QEMU has ended");
            end.0.end(&reason);
        });
        Link {
            calls,
            queue,
            task: task.abort_handle(),
        }
    }

    /// Sends a command, and waits for the answer. `line` makes the line of it from the number it is given.
    pub(super) async fn ask(
        &self,
        command: &str,
        deadline: Duration,
        line: impl FnOnce(u64) -> Result<Vec<u8>, QmpError>,
    ) -> Result<Value, QmpError> {
        let (answer, mut answered) = oneshot::channel();
        let sent = false;
        let call = self.calls.begin(Call { sent, answer });
        let call = call.map_err(|reason| gone(command, reason))?;
        let (id, line) = (call.id, line(call.id)?);
        let in_time = timeout(deadline, async {
            // The queue is closed only after the end is known.
            let _ = self.queue.send(Outgoing { id, line }).await;
            (&mut answered).await.ok()
        });
        let outcome = match in_time.await {
            Ok(outcome) => outcome,
            Err(_) => match call.give_up() {
                Some(Call { sent, .. }) => {
                    let command = command.to_owned();
                    return Err(QmpError::TimedOut {
                        command,
                        deadline,
                        sent,
                    });
                }
                // It came in the last moment.
                None => answered.try_recv().ok(),
            },
        };
        match outcome {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(refusal)) => Err(QmpError::Refused {
                command: command.to_owned(),
                class: one_line(&refusal.class),
                desc: one_line(&refusal.desc),
            }),
            None => Err(gone(command, self.calls.reason())),
        }
    }

    /// Waits for the end of the connection, and says how it ended.
    pub(super) async fn closed(&self) -> Arc<str> {
        let mut ended = self.calls.ended.subscribe();
        // The sender lives as long as this link does.
        let _ = ended.wait_for(Option::is_some).await;
        self.calls.reason()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.calls.ended.borrow().is_some()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn gone(command: &str, reason: Arc<str>) -> QmpError {
    let command = command.to_owned();
    QmpError::Gone { command, reason }
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
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, call: Call) -> Result<Begun<'_>, Arc<str>> {
        let mut waiting = self.lock();
        if let Some(reason) = &*self.ended.borrow() {
            return Err(reason.clone());
        }
        let id = waiting.next_id;
        waiting.next_id += 1;
        waiting.calls.insert(id, call);
        Ok(Begun { calls: self, id })
    }

    /// Whether somebody still waits; from now on QEMU may have seen the command.
    fn sending(&self, id: u64) -> bool {
        let mut waiting = self.lock();
        let call = waiting.calls.get_mut(&id);
        call.map(|call| call.sent = true).is_some()
    }

    fn answer(&self, id: u64, outcome: Outcome) {
        let mut waiting = self.lock();
        // Nobody can answer what was not asked: the number of a later call is guessed.
        let asked = waiting.calls.get(&id).is_some_and(|call| call.sent);
        let call = asked.then(|| waiting.calls.remove(&id)).flatten();
        drop(waiting);
        match call {
            // The caller may have been dropped just now.
            Some(call) => drop(call.answer.send(outcome)),
            // Its caller has given up, or there never was one. No reason to fail anybody else.
            None => debug!(id, "ignored an answer of QEMU that nobody waits for"),
        }
    }

    fn end(&self, reason: &str) {
        let reason: Arc<str> = reason.into();
        let mut waiting = self.lock();
        if self.ended.borrow().is_some() {
            return;
        }
        self.ended.send_replace(Some(reason.clone()));
        // Whoever waits sees that its answer was dropped.
        waiting.calls.clear();
        drop(waiting);
        self.listeners.end(&reason);
    }

    fn reason(&self) -> Arc<str> {
        let reason = self.ended.borrow().clone();
        reason.unwrap_or_else(|| "the connection was closed".into())
    }
}

/// Hands out answers and events until the stream ends, and says why it did.
async fn receive<R: AsyncRead + Unpin>(mut reader: LineReader<R>, calls: &Calls) -> String {
    loop {
        match reader.next().await {
            // Whose answer it was cannot be known; that call ends by its deadline, and nobody else's.
            Ok(Some(Line::TooLong { bytes })) => {
                debug!(bytes, "skipped a line of QEMU over the limit");
            }
            Ok(Some(Line::Whole(line))) if line.trim_ascii().is_empty() => {}
            Ok(Some(Line::Whole(line))) => match message(line) {
                Ok(Message::Reply { id, outcome }) => calls.answer(id, outcome),
                Ok(Message::Event(event)) => calls.listeners.tell(event),
                Err(reason) => debug!(reason, "ignored a line of QEMU"),
            },
            Ok(None) => return "QEMU has closed the connection".to_owned(),
            Err(error) => return format!("the connection to QEMU was lost: {error}"),
        }
    }
}

/// Writes commands until the stream fails, and says why.
async fn send<S: AsyncWrite>(
    mut writer: WriteHalf<S>,
    calls: &Calls,
    mut commands: mpsc::Receiver<Outgoing>,
) -> String {
    while let Some(Outgoing { id, line }) = commands.recv().await {
        // What was given up before it was sent never happens at all.
        if !calls.sending(id) {
            continue;
        }
        let written = async {
            writer.write_all(&line).await?;
            writer.flush().await
        };
        if let Err(error) = written.await {
            return format!("the connection to QEMU was lost: {error}");
        }
    }
    "the connection was closed".to_owned()
}
