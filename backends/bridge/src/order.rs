//! Requests for one key in the order in which they came, those for different keys at once.
//!
//! A host that has given up on a mount asks for the unmount while the mount is still under way. The guest's
//! contracts allow one call for a key at a time, so the second waits for the first, also where it came over a
//! later connection.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The last request in the queue of each key.
#[derive(Debug)]
pub(crate) struct Order<K>(Arc<Mutex<Queues<K>>>);

#[derive(Debug)]
struct Queues<K> {
    next_ticket: u64,
    last: HashMap<K, (u64, oneshot::Receiver<()>)>,
}

/// A request's place in the queue. The next request follows when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<K: Eq + Hash> {
    order: Order<K>,
    key: K,
    ticket: u64,
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl<K> Default for Order<K> {
    fn default() -> Self {
        Order(Arc::new(Mutex::new(Queues {
            next_ticket: 0,
            last: HashMap::new(),
        })))
    }
}

impl<K> Clone for Order<K> {
    fn clone(&self) -> Self {
        Order(self.0.clone())
    }
}

impl<K> Order<K> {
    fn queues(&self) -> MutexGuard<'_, Queues<K>> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone> Order<K> {
    /// Takes the place behind all requests in the queue of the key.
    pub(crate) fn queue(&self, key: K) -> Turn<K> {
        let (done, waiting) = oneshot::channel();
        let mut queues = self.queues();
        let ticket = queues.next_ticket;
        queues.next_ticket += 1;
        let before = queues.last.insert(key.clone(), (ticket, waiting));
        drop(queues);
        Turn {
            order: self.clone(),
            key,
            ticket,
            before: before.map(|(_, before)| before),
            _done: done,
        }
    }
}

impl<K: Eq + Hash> Turn<K> {
    /// Waits until all requests before are done.
    pub(crate) async fn come(&mut self) {
        if let Some(before) = &mut self.before {
            // Nothing is sent: it ends when the one before is dropped.
            let _ = before.await;
            self.before = None;
        }
    }
}

impl<K: Eq + Hash> Drop for Turn<K> {
    fn drop(&mut self) {
        let mut queues = self.order.queues();
        let last = queues.last.get(&self.key);
        if last.is_some_and(|(ticket, _)| *ticket == self.ticket) {
            queues.last.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_key_is_in_order_and_another_is_free() {
        let order = Order::default();
        let mut first = order.queue("/a");
        let mut second = order.queue("/a");
        let mut other = order.queue("/b");
        first.come().await;
        other.come().await;
        let long = Duration::from_secs(60);
        assert!(timeout(long, second.come()).await.is_err());
        drop(first);
        second.come().await;
        drop((second, other));
        assert!(order.queues().last.is_empty());
    }
}
