//! Requests for one key in the order in which they came, those for different keys at once.
//!
//! A host that has given up on a mount asks for the unmount while the mount is still under way. The
//! guest's contracts allow one call for a key at a time, so the second waits for the first, also where
//! it came over a later connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::gcs::guest_work::Key;

/// Who is last in line for each key.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    next_ticket: u64,
    last: HashMap<Key, (u64, oneshot::Receiver<()>)>,
}

/// A place in line. The next one moves up when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    order: Order,
    key: Key,
    ticket: u64,
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl Order {
    /// Takes the place behind everybody who is in line for the key.
    pub(crate) fn queue(&self, key: Key) -> Turn {
        let (done, waiting) = oneshot::channel();
        let mut lines = self.lines();
        let ticket = lines.next_ticket;
        lines.next_ticket += 1;
        let before = lines
            .last
            .insert(key.clone(), (ticket, waiting))
            .map(|(_, before)| before);
        drop(lines);
        Turn {
            order: self.clone(),
            key,
            ticket,
            before,
            _done: done,
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// Waits until everybody before has left.
    pub(crate) async fn come(&mut self) {
        if let Some(before) = &mut self.before {
            // Nothing is sent: it ends when the one before is dropped.
            let _ = before.await;
            self.before = None;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut lines = self.order.lines();
        if lines
            .last
            .get(&self.key)
            .is_some_and(|(ticket, _)| *ticket == self.ticket)
        {
            lines.last.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_key_is_in_order_and_another_is_free() {
        let order = Order::default();
        let key = |name: &str| Key::Target(PathBuf::from(name));
        let mut first = order.queue(key("/a"));
        let mut second = order.queue(key("/a"));
        let mut other = order.queue(key("/b"));
        first.come().await;
        other.come().await;
        let long = Duration::from_secs(60);
        assert!(timeout(long, second.come()).await.is_err());
        drop(first);
        second.come().await;
        drop((second, other));
        assert!(order.lines().last.is_empty());
    }
}
