//! What systemd is told, and the socket that it opens for a service. (sd_notify(3), sd_listen_fds(3))

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixListener;

use crate::failure::{Context, Failure};

/// Tells the service manager, if there is one. It goes on without, too.
pub(super) fn notify(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    };
    let sent = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, state, "the service manager cannot be told");
    }
}

/// Tells that the configuration is read again.
pub(super) fn notify_reloading() {
    let now = clock_gettime(ClockId::Monotonic);
    let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
}

/// The socket that was opened for this process, if one was.
pub(super) fn listener() -> Result<Option<UnixListener>, Failure> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS") {
        Some(1) => {}
        Some(0) | None => return Ok(None),
        Some(count) => {
            let what = format!("systemd has opened {count} sockets for this service");
            return Err(Failure::usage(what).advise("have one ListenStream= in its socket unit"));
        }
    }
    let what = || "the socket of systemd cannot be used".to_owned();
    let socket = inherited::take_first();
    // Children are none of its users.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).context(what)?;
    let listens = rustix::net::sockopt::socket_acceptconn(&socket).context(what)?;
    let domain = rustix::net::sockopt::socket_domain(&socket).context(what)?;
    if !listens || domain != rustix::net::AddressFamily::UNIX {
        return Err(Failure::usage(what()).advise("have a path as its ListenStream="));
    }
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).context(what)?;
    Ok(Some(UnixListener::from_std(listener).context(what)?))
}

/// The one place that takes a descriptor by its number.
#[allow(unsafe_code)]
mod inherited {
    use std::os::fd::{FromRawFd, OwnedFd};

    /// The first descriptor that a service manager hands over (`SD_LISTEN_FDS_START`).
    const FIRST: i32 = 3;

    pub(super) fn take_first() -> OwnedFd {
        // SAFETY: the service manager says by LISTEN_PID and LISTEN_FDS that this process was started with the descriptor open,
        // and that it is this process's own. It is taken once: a server has one socket.
        unsafe { OwnedFd::from_raw_fd(FIRST) }
    }
}
