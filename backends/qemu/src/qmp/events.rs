//! Events, to whoever wants to hear of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, timeout_at};
use tracing::trace;

use super::health::Watched;
use super::{Event, QmpError};

/// How many events of one name are kept for who does not take them; then the oldest go.
pub(super) const KEPT: usize = 256;

/// Who listens to which events.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    state: Mutex<State>,
    pub(super) health: Watched,
}

#[derive(Debug, Default)]
struct State {
    by_name: HashMap<String, broadcast::Sender<Arc<Event>>>,
    /// Why there are no more.
    ended: Option<Arc<str>>,
}

impl Listeners {
    pub(super) fn listen(self: &Arc<Self>, name: &str) -> Events {
        let mut state = self.lock();
        state
            .by_name
            .retain(|_, sender| sender.receiver_count() > 0);
        let receiver = if state.ended.is_some() {
            // Its sender is gone: it is at its end.
            broadcast::Sender::new(1).subscribe()
        } else {
            let sender = state.by_name.entry(name.to_owned());
            let sender = sender.or_insert_with(|| broadcast::Sender::new(KEPT));
            sender.subscribe()
        };
        Events {
            name: name.to_owned(),
            receiver,
            listeners: self.clone(),
        }
    }

    /// Never waits: who is slow misses events.
    pub(super) fn tell(&self, event: Event) {
        self.health.tell(&event);
        match self.lock().by_name.get(&event.name) {
            // The last listener may have gone just now.
            Some(sender) => drop(sender.send(Arc::new(event))),
            None => trace!(name = event.name, "nobody listens to an event of QEMU"),
        }
    }

    pub(super) fn end(&self, reason: &Arc<str>) {
        self.health.end(reason);
        let mut state = self.lock();
        state.ended = Some(reason.clone());
        state.by_name.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of one name, from the moment of [`Qmp::events`](super::Qmp::events) on.
///
/// At most 256 are kept for a listener that does not take them; it is told how many it has missed, and
/// nobody else notices.
#[derive(Debug)]
pub struct Events {
    name: String,
    receiver: broadcast::Receiver<Arc<Event>>,
    listeners: Arc<Listeners>,
}

impl Events {
    /// The next event, within a time.
    ///
    /// # Errors
    ///
    /// [`QmpError::TimedOut`] if there is none in time, [`QmpError::Lagged`] if this listener was too slow and has
    /// missed some (the next call goes on with those that are left), and [`QmpError::Gone`] after the end of the
    /// connection, once those that came before are taken.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no event.
    pub async fn next(&mut self, deadline: Duration) -> Result<Arc<Event>, QmpError> {
        self.next_by(after(deadline), deadline).await
    }

    /// The next event that is wanted, within a time; the others are passed over.
    ///
    /// # Errors
    ///
    /// As for [`next`](Self::next).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses only events that are not wanted.
    pub async fn find(
        &mut self,
        deadline: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Arc<Event>, QmpError> {
        let end = after(deadline);
        loop {
            let event = self.next_by(end, deadline).await?;
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    async fn next_by(&mut self, end: Instant, deadline: Duration) -> Result<Arc<Event>, QmpError> {
        match timeout_at(end, self.receiver.recv()).await {
            Ok(Ok(event)) => Ok(event),
            Ok(Err(RecvError::Lagged(missed))) => Err(QmpError::Lagged {
                event: self.name.clone(),
                missed,
            }),
            Ok(Err(RecvError::Closed)) => Err(QmpError::Gone {
                command: self.name.clone(),
                reason: self.reason(),
            }),
            Err(_) => Err(QmpError::TimedOut {
                command: self.name.clone(),
                deadline,
                sent: true,
            }),
        }
    }

    fn reason(&self) -> Arc<str> {
        let ended = self.listeners.lock().ended.clone();
        ended.unwrap_or_else(|| "the connection was closed".into())
    }
}

/// The end of a wait, however long.
fn after(deadline: Duration) -> Instant {
    /// As good as never, and no instant overflows.
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    Instant::now() + deadline.min(LONGEST)
}
