//! Waiting for a descriptor whose other end comes and goes.
#![allow(unsafe_code)] // One constructor of tokio that is unsafe; the reason is at the call.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The moments at which something happened to a descriptor, one by one.
///
/// A virtio port reports a hang-up for as long as its host end is not connected, and the runtime takes a
/// hang-up for final: waiting for such a port by the runtime alone would spin. An epoll instance of
/// our own, edge triggered, has something to read only when something has happened.
///
/// It is one instance for both directions, and each edge is told to both. The driver of virtio ports takes what the host has
/// sent out of its queue when it is merely asked whether it could be written to, and the interrupt about it, which
/// comes then, wakes nobody: whoever waits for input alone has lost it.
#[derive(Debug)]
pub(super) struct Edges {
    epoll: AsyncFd<OwnedFd>,
    waiting: Arc<Waiting>,
    /// Whether something has happened that a direction was not told of yet.
    untold: [bool; 2],
}

/// Who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// A reader.
    Input,
    /// A writer.
    Output,
}

impl Direction {
    fn other(self) -> Self {
        match self {
            Direction::Input => Direction::Output,
            Direction::Output => Direction::Input,
        }
    }
}

/// The tasks that wait, by direction: the runtime knows only one for each descriptor.
#[derive(Debug, Default)]
struct Waiting(Mutex<[Option<Waker>; 2]>);

impl Waiting {
    fn set(&self, direction: Direction, waker: &Waker) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks[direction as usize] = Some(waker.clone());
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        let tasks = mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Edges {
    /// Watches for something to read and the possibility to write. Must be made in a runtime that has I/O enabled.
    pub(super) fn of(watched: impl AsFd) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let what = EventFlags::IN | EventFlags::RDHUP | EventFlags::OUT | EventFlags::ET;
        epoll::add(&epoll, watched, EventData::new_u64(0), what)?;
        // SAFETY: an owned descriptor is the same number as long as it lives, and is not closed before.
        let epoll = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        Ok(Edges {
            epoll: epoll.map_err(io::Error::from)?,
            waiting: Arc::default(),
            untold: [false; 2],
        })
    }

    /// Something has happened, in whichever direction, since this one was told the last time. The first may be about
    /// what was before.
    pub(super) fn poll(
        &mut self,
        direction: Direction,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if mem::take(&mut self.untold[direction as usize]) {
            return Poll::Ready(Ok(()));
        }
        self.waiting.set(direction, cx.waker());
        let both = Waker::from(self.waiting.clone());
        loop {
            let mut ready = ready!(self.epoll.poll_read_ready(&mut Context::from_waker(&both)))?;
            match take(self.epoll.get_ref())? {
                true => break,
                false => ready.clear_ready(),
            }
        }
        self.tell(direction.other());
        Poll::Ready(Ok(()))
    }

    /// Has a direction look again, and whoever waits.
    pub(super) fn tell(&mut self, direction: Direction) {
        self.untold[direction as usize] = true;
        self.waiting.clone().wake();
    }
}

/// Takes one edge, if there is one.
fn take(epoll: &OwnedFd) -> io::Result<bool> {
    let mut events = [Event {
        flags: EventFlags::empty(),
        data: EventData::new_u64(0),
    }];
    match epoll::wait(epoll, &mut events, Some(&Timespec::default())) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
