//! Waiting for a descriptor whose other end comes and goes.
#![allow(unsafe_code)] // One constructor of tokio that is unsafe; the reason is at the call.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The moments at which something happened to a descriptor, one by one.
///
/// A virtio port reports a hang-up for as long as its host end is not connected, and the runtime takes a
/// hang-up for final: waiting for such a port by the runtime alone would spin. An epoll instance of
/// our own, edge triggered, has something to read only when something has happened.
#[derive(Debug)]
pub(super) struct Edges(AsyncFd<OwnedFd>);

impl Edges {
    /// Watches for something to read. Must be made in a runtime that has I/O enabled.
    pub(super) fn of_input(of: impl AsFd) -> io::Result<Self> {
        Self::watch(of, EventFlags::IN | EventFlags::RDHUP)
    }

    /// Watches for the possibility to write. Must be made in a runtime that has I/O enabled.
    pub(super) fn of_output(of: impl AsFd) -> io::Result<Self> {
        Self::watch(of, EventFlags::OUT)
    }

    fn watch(of: impl AsFd, what: EventFlags) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, of, EventData::new_u64(0), what | EventFlags::ET)?;
        // SAFETY: an owned descriptor is the same number as long as it lives, and is not closed before.
        let epoll = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        Ok(Edges(epoll.map_err(io::Error::from)?))
    }

    /// Something has happened since the last answer. The first may be about what was before.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            match take(self.0.get_ref())? {
                true => return Poll::Ready(Ok(())),
                false => ready.clear_ready(),
            }
        }
    }

    /// Waits for the next. Cancel safe.
    pub(super) async fn next(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll(cx)).await
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
