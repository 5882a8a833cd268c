//! Many requests over one stream, each answer to its own caller.
//!
//! One task owns the stream. It shares a table of the pending requests with the callers; the table is locked for a
//! look-up, never across I/O. A peer that stops reading fills a short queue, and each caller behind it returns
//! by its own deadline. How a request is written and an answer is read is the protocol's business.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

/// How many requests wait for a peer that reads slowly; more wait with their callers.
const QUEUE: usize = 16;

/// How long what the peer has said before it closed its end is still read.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// The reason of the end where this side has closed the connection.
const CLOSED: &str = "the connection was closed";

/// The requests under way over one stream, with answers of type `A`. The stream is closed when it is dropped.
#[derive(Debug)]
pub struct Multiplexer<A> {
    pending: Arc<Pending<A>>,
    queue: mpsc::Sender<Outgoing>,
    task: AbortHandle,
}

/// Where the reading side of a protocol delivers what it has read.
#[derive(Debug)]
pub struct Answers<A>(Arc<Pending<A>>);

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unanswered {
    /// The stream was lost.
    Lost {
        /// Whether the peer may have seen any of the request.
        sent: bool,
        /// How the stream was lost.
        reason: Arc<str>,
    },
    /// The deadline has passed. A request that was not sent by then never will be.
    TimedOut {
        /// Whether the peer may have seen any of the request.
        sent: bool,
    },
}

#[derive(Debug)]
struct Outgoing {
    id: u64,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Pending<A> {
    requests: Mutex<Requests<A>>,
    /// Counts on when a stream replaces another, so that a late answer never meets a new request.
    next_id: Arc<AtomicU64>,
    /// Why there are no more answers. Set under the lock of the requests.
    ended: watch::Sender<Option<Arc<str>>>,
}

#[derive(Debug)]
struct Requests<A> {
    waiting: HashMap<u64, Request<A>>,
    /// When the last answer came.
    last_answer: Option<Instant>,
}

#[derive(Debug)]
struct Request<A> {
    sent: bool,
    answer: oneshot::Sender<Result<A, Unanswered>>,
}

impl<A: Send + 'static> Multiplexer<A> {
    /// Takes over a stream: its writing half, and `receive`, which reads the other half until its end, delivers
    /// answers, and returns the reason of the end. `ids` gives the numbers of the requests. `at_end` is told the reason
    /// after all requests have ended, also when the multiplexer is dropped.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start<W, F>(
        mut writer: W,
        ids: Arc<AtomicU64>,
        receive: impl FnOnce(Answers<A>) -> F,
        at_end: impl FnOnce(&Arc<str>) + Send + 'static,
    ) -> Self
    where
        W: AsyncWrite + Unpin + Send + 'static,
        F: Future<Output = String> + Send + 'static,
    {
        let pending = Arc::new(Pending {
            requests: Mutex::new(Requests {
                waiting: HashMap::new(),
                last_answer: None,
            }),
            next_id: ids,
            ended: watch::Sender::new(None),
        });
        let (queue, mut outgoing) = mpsc::channel(QUEUE);
        let receiving = receive(Answers(pending.clone()));
        let end = EndOnDrop(pending.clone(), Some(at_end));
        let task = tokio::spawn(async move {
            let mut receiving = pin!(receiving);
            let reason = tokio::select! {
                reason = &mut receiving => reason,
                // The peer may have answered before it closed its end.
                reason = send(&mut writer, &end.0, &mut outgoing) => {
                    timeout(LAST_ANSWERS, receiving).await.unwrap_or(reason)
                }
            };
            debug!(%reason, "a connection has ended");
            end.0.end(&reason);
        });
        Multiplexer {
            pending,
            queue,
            task: task.abort_handle(),
        }
    }

    /// Begins a request: gives it a number, and a place for its answer.
    ///
    /// # Errors
    ///
    /// [`Unanswered::Lost`], not sent, if the stream has ended.
    pub fn begin(&self) -> Result<Call<'_, A>, Unanswered> {
        let (answer, answered) = oneshot::channel();
        let mut requests = self.pending.lock();
        if let Some(reason) = self.pending.ended.borrow().clone() {
            let sent = false;
            return Err(Unanswered::Lost { sent, reason });
        }
        let id = self.pending.next_id.fetch_add(1, Ordering::Relaxed);
        let (sent, ahead) = (false, requests.waiting.len());
        requests.waiting.insert(id, Request { sent, answer });
        drop(requests);
        Ok(Call {
            multiplexer: self,
            id,
            ahead,
            answered,
        })
    }

    /// How many requests wait for an answer now.
    pub fn unanswered(&self) -> usize {
        self.pending.lock().waiting.len()
    }

    /// Ends the connection, and with it all requests under way.
    pub fn end(&self, reason: &str) {
        self.pending.end(reason);
        self.task.abort();
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.pending.ended.borrow().is_some()
    }

    /// Waits for the end of the connection, and says how it ended.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when the future is dropped.
    pub async fn closed(&self) -> Arc<str> {
        let mut ended = self.pending.ended.subscribe();
        // The sender lives as long as `self`.
        let _ = ended.wait_for(Option::is_some).await;
        self.pending.reason()
    }
}

impl<A> Drop for Multiplexer<A> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A request that was begun. Dropping it gives the request up; an answer that still comes is ignored.
#[derive(Debug)]
pub struct Call<'a, A> {
    multiplexer: &'a Multiplexer<A>,
    id: u64,
    /// How many requests waited for an answer when this one began.
    ahead: usize,
    answered: oneshot::Receiver<Result<A, Unanswered>>,
}

impl<A: Send + 'static> Call<'_, A> {
    /// The number of the request.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Sends the bytes of the request, and waits for its answer, to a peer that does many requests at once.
    ///
    /// # Errors
    ///
    /// [`Unanswered`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; a request that was sent may be done by the peer.
    pub async fn exchange(self, bytes: Vec<u8>, deadline: Duration) -> Result<A, Unanswered> {
        self.exchange_extended(bytes, deadline, 0).await
    }

    /// As [`exchange`](Self::exchange), to a peer that does one request after the other: the deadline begins again with each
    /// answer, at most as often as requests were ahead of this one. A peer that is busy with those is not late.
    ///
    /// # Errors
    ///
    /// As for [`exchange`](Self::exchange).
    ///
    /// # Cancel safety
    ///
    /// As for [`exchange`](Self::exchange).
    pub async fn exchange_in_turn(
        self,
        bytes: Vec<u8>,
        deadline: Duration,
    ) -> Result<A, Unanswered> {
        let ahead = self.ahead;
        self.exchange_extended(bytes, deadline, ahead).await
    }

    async fn exchange_extended(
        mut self,
        bytes: Vec<u8>,
        deadline: Duration,
        mut extensions: usize,
    ) -> Result<A, Unanswered> {
        let (id, Multiplexer { pending, queue, .. }) = (self.id, self.multiplexer);
        let mut until = Instant::now() + deadline;
        let in_time = {
            let mut answer = pin!(async {
                // The queue is closed only after every request was given its answer.
                let _ = queue.send(Outgoing { id, bytes }).await;
                (&mut self.answered).await
            });
            loop {
                if let Ok(answer) = timeout_at(until, answer.as_mut()).await {
                    break Some(answer.ok());
                }
                let last = pending.lock().last_answer;
                match last.map(|last| last + deadline) {
                    Some(later) if extensions > 0 && later > until => until = later,
                    _ => break None,
                }
                extensions -= 1;
            }
        };
        let answer = in_time.unwrap_or_else(|| match pending.lock().waiting.remove(&id) {
            Some(Request { sent, .. }) => Some(Err(Unanswered::TimedOut { sent })),
            // It came in the last moment.
            None => self.answered.try_recv().ok(),
        });
        answer.unwrap_or_else(|| {
            // The task ended without a reason, and how far it came is unknown.
            let reason = pending.reason();
            Err(Unanswered::Lost { sent: true, reason })
        })
    }
}

impl<A> Drop for Call<'_, A> {
    fn drop(&mut self) {
        self.multiplexer.pending.lock().waiting.remove(&self.id);
    }
}

impl<A> Answers<A> {
    /// Delivers an answer. One that no request waits for is dropped: its caller has given up, or the peer made up its
    /// number. That is no reason to fail another request.
    pub fn deliver(&self, id: u64, answer: A) {
        let mut requests = self.0.lock();
        // A request that was not sent cannot be answered: the number is guessed.
        let waiting = &mut requests.waiting;
        let asked = waiting.get(&id).is_some_and(|request| request.sent);
        let request = asked.then(|| waiting.remove(&id)).flatten();
        if request.is_some() {
            requests.last_answer = Some(Instant::now());
        }
        drop(requests);
        match request {
            // The caller may have been dropped just now.
            Some(request) => drop(request.answer.send(Ok(answer))),
            None => debug!(id, "ignored an answer that no request waits for"),
        }
    }
}

/// Returns the callers also where the task was aborted.
struct EndOnDrop<A, E: FnOnce(&Arc<str>)>(Arc<Pending<A>>, Option<E>);

impl<A, E: FnOnce(&Arc<str>)> Drop for EndOnDrop<A, E> {
    fn drop(&mut self) {
        self.0.end(CLOSED);
        if let Some(at_end) = self.1.take() {
            at_end(&self.0.reason());
        }
    }
}

impl<A> Pending<A> {
    fn lock(&self) -> MutexGuard<'_, Requests<A>> {
        // Nothing under the lock panics half-way through a change.
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the caller still waits; from now on the peer may have seen the request.
    fn sending(&self, id: u64) -> bool {
        let mut requests = self.lock();
        let request = requests.waiting.get_mut(&id);
        request.map(|request| request.sent = true).is_some()
    }

    fn end(&self, reason: &str) {
        let mut requests = self.lock();
        if self.ended.borrow().is_some() {
            return;
        }
        let reason: Arc<str> = reason.into();
        self.ended.send_replace(Some(reason.clone()));
        for (_, Request { sent, answer }) in requests.waiting.drain() {
            let reason = reason.clone();
            let _ = answer.send(Err(Unanswered::Lost { sent, reason }));
        }
    }

    fn reason(&self) -> Arc<str> {
        let reason = self.ended.borrow().clone();
        reason.unwrap_or_else(|| CLOSED.into())
    }
}

/// Writes requests until the stream fails, and returns the reason.
async fn send<W: AsyncWrite + Unpin, A>(
    writer: &mut W,
    pending: &Pending<A>,
    requests: &mut mpsc::Receiver<Outgoing>,
) -> String {
    while let Some(Outgoing { id, bytes }) = requests.recv().await {
        // A request that was given up before it was sent is never sent.
        if !pending.sending(id) {
            continue;
        }
        let written = async {
            writer.write_all(&bytes).await?;
            writer.flush().await
        };
        if let Err(error) = written.await {
            return format!("the connection was lost: {error}");
        }
    }
    CLOSED.to_owned()
}
