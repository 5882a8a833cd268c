//! One ear for all who wait: however many wait at once, each event is heard once.
//!
//! A thread reads the socket, because those who wait may do so in different runtimes, any of which may end
//! first. It comes with the first who waits and goes when nobody has for a while.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::sync::Notify;

use super::{devpath, open, receive};

/// How long the thread stays when nobody waits, in seconds: the next disk of a series comes soon.
const LINGER: i64 = 5;

/// Whether an event is a reason to look, by the path of its device.
pub(super) type Concerns = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Held for look-ups and to ask each who waits about one event, never across a system call but the one that
/// opens the socket, which does not wait.
static HUB: Mutex<Hub> = Mutex::new(Hub {
    waiting: BTreeMap::new(),
    next: 0,
    is_heard: false,
});

struct Hub {
    waiting: BTreeMap<u64, (Concerns, Arc<Notify>)>,
    next: u64,
    /// Whether there is a thread.
    is_heard: bool,
}

fn lock() -> MutexGuard<'static, Hub> {
    // A panic of somebody's `Concerns` leaves the table as it was.
    HUB.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Somebody who waits, until it is dropped.
pub(super) struct Waiting {
    number: u64,
    wake: Arc<Notify>,
}

impl Waiting {
    /// Starts to wait: every event from now on counts.
    ///
    /// # Errors
    ///
    /// The system's, if there can be no socket or no thread.
    pub(super) fn new(concerns: Concerns) -> io::Result<Self> {
        let mut hub = lock();
        if !hub.is_heard {
            let socket = open()?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(LINGER))?;
            let thread = std::thread::Builder::new().name("uevents".to_owned());
            thread.spawn(move || hear(&socket))?;
            hub.is_heard = true;
        }
        let (number, wake) = (hub.next, Arc::new(Notify::new()));
        hub.next += 1;
        hub.waiting.insert(number, (concerns, wake.clone()));
        Ok(Waiting { number, wake })
    }

    /// Waits for a reason to look that came since the last one. Cancel safe: it is not lost.
    pub(super) async fn reason(&self) {
        self.wake.notified().await;
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Waiting").field(&self.number).finish()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock().waiting.remove(&self.number);
    }
}

fn hear(socket: &OwnedFd) {
    loop {
        let mut path = None;
        let heard = receive(socket, |message| {
            path = Some(devpath(message).to_vec());
            true
        });
        let mut hub = lock();
        match heard {
            Ok(true) => hub.tell(path.as_deref()),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if hub.waiting.is_empty() {
                    hub.is_heard = false;
                    return;
                }
            }
            // Those who wait look from time to time all the same, and the next one starts anew.
            Err(error) => {
                tracing::error!(%error, "cannot hear the kernel's events any more");
                hub.is_heard = false;
                return;
            }
        }
    }
}

impl Hub {
    /// Wakes those whom an event concerns; all, if events were lost.
    fn tell(&self, path: Option<&[u8]>) {
        for (concerns, wake) in self.waiting.values() {
            if path.is_none_or(concerns) {
                wake.notify_one();
            }
        }
    }
}
