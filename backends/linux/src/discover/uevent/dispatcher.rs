//! One socket for all waits of the process: each event is received once, however many tasks wait.
//!
//! A thread reads the socket, because the tasks may be in different runtimes, any of which may end first.
//! The first wait starts the thread, which ends when there has been no wait for a while.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::sync::Notify;

use super::{LONGEST_EVENT, devpath, open, receive};

/// How long the thread stays without a wait, in seconds: the next disk of a series comes soon.
const LINGER: i64 = 5;

/// Whether an event is relevant, by the path of its device.
pub(super) type Filter = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Held for look-ups and for running the filters on one event; of system calls only across the one that opens
/// the socket, which does not wait.
static DISPATCHER: Mutex<Dispatcher> = Mutex::new(Dispatcher {
    subscriptions: BTreeMap::new(),
    next: 0,
    has_thread: false,
});

struct Dispatcher {
    subscriptions: BTreeMap<u64, (Filter, Arc<Notify>)>,
    next: u64,
    has_thread: bool,
}

fn lock() -> MutexGuard<'static, Dispatcher> {
    // A panic in a filter leaves the table as it was.
    DISPATCHER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes a task at each relevant event, until it is dropped.
pub(super) struct Subscription {
    number: u64,
    wake: Arc<Notify>,
}

impl Subscription {
    /// Subscribes to every event from now on.
    ///
    /// # Errors
    ///
    /// The system's, if there can be no socket or no thread.
    pub(super) fn new(filter: Filter) -> io::Result<Self> {
        let mut dispatcher = lock();
        if !dispatcher.has_thread {
            let socket = open()?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(LINGER))?;
            let thread = std::thread::Builder::new().name("uevents".to_owned());
            thread.spawn(move || dispatch(&socket))?;
            dispatcher.has_thread = true;
        }
        Ok(dispatcher.subscribe(filter))
    }

    /// The same if that costs next to nothing, because the socket is open; the filter again if it is not.
    pub(super) fn join(filter: Filter) -> Result<Self, Filter> {
        let mut dispatcher = lock();
        match dispatcher.has_thread {
            true => Ok(dispatcher.subscribe(filter)),
            false => Err(filter),
        }
    }

    /// Waits for a relevant event since the last call. Cancel safe: the event is not lost.
    pub(super) async fn notified(&self) {
        self.wake.notified().await;
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Subscription").field(&self.number).finish()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock().subscriptions.remove(&self.number);
    }
}

fn dispatch(socket: &OwnedFd) {
    let mut buffer = [0; LONGEST_EVENT];
    loop {
        let mut path = None;
        let received = receive(socket, &mut buffer, |message| {
            path = Some(devpath(message).to_vec());
            true
        });
        match received {
            // Whoever is woken may be faster than this thread, and takes the lock.
            Ok(true) => {
                let concerned = lock().concerned(path.as_deref());
                concerned.iter().for_each(|wake| wake.notify_one());
            }
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut dispatcher = lock();
                if dispatcher.subscriptions.is_empty() {
                    dispatcher.has_thread = false;
                    return;
                }
            }
            // Each wait also probes from time to time without an event, and the next one starts a new thread.
            Err(error) => {
                tracing::error!(%error, "cannot receive kernel uevents any more");
                lock().has_thread = false;
                return;
            }
        }
    }
}

impl Dispatcher {
    fn subscribe(&mut self, filter: Filter) -> Subscription {
        let (number, wake) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.subscriptions.insert(number, (filter, wake.clone()));
        Subscription { number, wake }
    }

    /// What wakes the tasks to which an event is relevant; all of them, if events were lost.
    fn concerned(&self, path: Option<&[u8]>) -> Vec<Arc<Notify>> {
        let all = self.subscriptions.values();
        let concerned = all.filter(|(filter, _)| path.is_none_or(filter));
        concerned.map(|(_, wake)| Arc::clone(wake)).collect()
    }
}
