//! Kernel uevents, and waiting for a device to appear or to go.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use blockmount::{BackendError, blocking_step};
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt,
    socket, sockopt,
};
use tokio::io::unix::AsyncFd;

use crate::errno::errno_error;
use crate::sys;

mod dispatcher;

use dispatcher::Subscription;

/// The multicast group of the kernel itself; group 2 is the daemon's repetition.
const KERNEL_GROUP: u32 = 1;
/// Holds bursts of hot-plugs, in bytes. (systemd-udevd uses 128 MiB.)
const RECEIVE_BUFFER: usize = 4 << 20;
/// The kernel builds an event in a buffer of 2,048 bytes (`UEVENT_BUFFER_SIZE`) after the header.
const LONGEST_EVENT: usize = 8 << 10;
/// After this time without an event a wait probes all the same; the time doubles each time. In a container's
/// network namespace no event arrives, which must not cost the whole deadline; the doubling keeps many waits at once
/// from loading the machine.
const FIRST_POLL: Duration = Duration::from_secs(1);

/// What a [`Listener`] received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A uevent.
    Uevent(Uevent),
    /// The kernel dropped events (`ENOBUFS`): look at everything again.
    Lost,
}

/// One kernel uevent. Its text is bytes: device names need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    action: Vec<u8>,
    devpath: Vec<u8>,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Uevent {
    /// Reads `ACTION@DEVPATH` and the `KEY=VALUE` fields after it, each ended by a NUL. Fields
    /// without a `=` are left out; of a repeated key the first counts.
    ///
    /// Returns nothing for other messages, such as those of udevd.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let mut parts = message.split(|byte| *byte == 0);
        let (action, devpath) = split_at(parts.next()?, b'@')?;
        if action.is_empty()
            || !action.iter().all(u8::is_ascii_lowercase)
            || !devpath.starts_with(b"/")
        {
            return None;
        }
        let fields = parts
            .filter_map(|field| split_at(field, b'='))
            .filter(|(key, _)| !key.is_empty())
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .collect();
        Some(Uevent {
            action: action.to_vec(),
            devpath: devpath.to_vec(),
            fields,
        })
    }

    /// What happened: `add`, `remove`, `change` and so on.
    pub fn action(&self) -> &OsStr {
        OsStr::from_bytes(&self.action)
    }

    /// The device's path below `/sys`, with a leading slash.
    pub fn devpath(&self) -> &OsStr {
        OsStr::from_bytes(&self.devpath)
    }

    /// A field by its key: `SUBSYSTEM`, `DEVNAME`, `DISKSEQ`.
    pub fn field(&self, key: &str) -> Option<&OsStr> {
        let found = self
            .fields
            .iter()
            .find(|(name, _)| name == key.as_bytes())?;
        Some(OsStr::from_bytes(&found.1))
    }

    /// Whether it is about a disk or a partition.
    pub fn is_block(&self) -> bool {
        self.field("SUBSYSTEM") == Some(OsStr::new("block"))
    }
}

fn split_at(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == separator)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// Receives every kernel uevent from the moment it is made.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Subscribes. Must be called in a runtime of tokio that has I/O enabled.
    ///
    /// # Errors
    ///
    /// The system's, where it has no such sockets.
    pub fn new() -> io::Result<Self> {
        let socket = open()?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Listener(sys::watch(socket)?))
    }

    /// The next event. Cancel safe: no event is lost when the future is dropped.
    ///
    /// # Errors
    ///
    /// The system's, if the socket fails.
    pub async fn next(&self) -> io::Result<Event> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut event = None;
            let parse = |message: &[u8]| {
                event = Uevent::parse(message);
                event.is_some()
            };
            let mut buffer = [0; LONGEST_EVENT];
            match ready.try_io(|socket| receive(socket.get_ref(), &mut buffer, parse)) {
                Ok(Ok(false)) | Err(_) => {}
                Ok(Ok(true)) => return Ok(event.map_or(Event::Lost, Event::Uevent)),
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

/// A socket that receives every event from now on.
fn open() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
    // Only root may exceed `net.core.rmem_max`.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
    }
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    Ok(socket)
}

/// Receives one message. True if it is from the kernel and `filter` takes it, or if events were lost.
fn receive(
    socket: &impl AsFd,
    buffer: &mut [u8; LONGEST_EVENT],
    filter: impl FnOnce(&[u8]) -> bool,
) -> io::Result<bool> {
    let fd = socket.as_fd().as_raw_fd();
    match recvfrom::<NetlinkAddr>(fd, buffer) {
        // Any process may send to this socket; the kernel has port 0.
        Ok((length, Some(sender))) if sender.pid() == 0 => Ok(filter(&buffer[..length])),
        Ok(_) => Ok(false),
        Err(nix::Error::ENOBUFS) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// The path of the device that a message is about, without parsing the rest.
fn devpath(message: &[u8]) -> &[u8] {
    let head = message.split(|byte| *byte == 0).next().unwrap_or_default();
    split_at(head, b'@').map_or(b"", |(_, devpath)| devpath)
}

/// Probes at once, then after each kernel uevent, until `probe` finds something or the deadline passes.
///
/// `probe` answers what it found, nothing yet, or an error that ends the wait. It runs on a blocking thread, and
/// once more at the deadline. Must be called in a runtime of tokio that has I/O and time.
///
/// # Errors
///
/// That of `probe`. After the deadline the answer is `None`, and the caller says what was missing.
///
/// # Cancel safety
///
/// A call that is dropped lets a running `probe` end.
pub async fn wait_until<T, F>(deadline: Instant, mut probe: F) -> Result<Option<T>, BackendError>
where
    T: Send + 'static,
    F: FnMut() -> Result<Option<T>, BackendError> + Send + 'static,
{
    let probe = move || probe().map(|found| found.ok_or(()));
    Ok(wait(deadline, |_| true, probe).await?.ok())
}

/// What one look at sysfs answers, for [`wait_for`].
pub type Probe<T> = Result<T, NotReady>;

/// Why a [`Probe`] found nothing.
#[derive(Debug)]
pub enum NotReady {
    /// The device may still appear; what is missing.
    NotYet(BackendError),
    /// Waiting makes no sense.
    Failed(BackendError),
}

impl NotReady {
    /// The device may still appear; `what` is the message of the error that says what is missing.
    pub fn not_found(what: impl Into<String>) -> Self {
        NotReady::NotYet(BackendError::not_found(what))
    }

    /// The error, for a caller that does not probe again.
    pub fn into_error(self) -> BackendError {
        match self {
            NotReady::NotYet(error) | NotReady::Failed(error) => error,
        }
    }
}

/// What is there now, for a caller to whom a missing device is a device that has gone.
///
/// # Errors
///
/// That of [`NotReady::Failed`].
pub fn present<T>(probe: Probe<T>) -> Result<Option<T>, BackendError> {
    match probe {
        Ok(found) => Ok(Some(found)),
        Err(NotReady::NotYet(_)) => Ok(None),
        Err(NotReady::Failed(error)) => Err(error),
    }
}

impl From<BackendError> for NotReady {
    fn from(error: BackendError) -> Self {
        NotReady::Failed(error)
    }
}

/// As [`wait_until`], for a `probe` that says what is missing, and only after events that pass `filter`, which is
/// given the path of a device below `/sys`.
///
/// Without a filter, n waits during a burst of n hot-plugs would probe n times each.
///
/// # Errors
///
/// What failed, or what was missing at the deadline.
pub async fn wait_for<T, C, F>(
    deadline: Instant,
    filter: C,
    mut probe: F,
) -> Result<T, BackendError>
where
    T: Send + 'static,
    C: Fn(&[u8]) -> bool + Send + Sync + 'static,
    F: FnMut() -> Probe<T> + Send + 'static,
{
    let probe = move || match probe() {
        Ok(found) => Ok(Ok(found)),
        Err(NotReady::NotYet(missing)) => Ok(Err(missing)),
        Err(NotReady::Failed(error)) => Err(error),
    };
    wait(deadline, filter, probe).await?
}

async fn wait<T, M, C, F>(
    deadline: Instant,
    filter: C,
    mut probe: F,
) -> Result<Result<T, M>, BackendError>
where
    T: Send + 'static,
    M: Send + 'static,
    C: Fn(&[u8]) -> bool + Send + Sync + 'static,
    F: FnMut() -> Result<Result<T, M>, BackendError> + Send + 'static,
{
    let events = match Subscription::join(Box::new(filter)) {
        Ok(events) => events,
        // Most devices are there already; a socket would cost more than the probe.
        Err(filter) => {
            let (found, returned) = blocking_step(move || Ok((probe()?, probe))).await?;
            probe = returned;
            if found.is_ok() {
                return Ok(found);
            }
            Subscription::new(filter)
                .map_err(|error| errno_error("cannot subscribe to kernel uevents", error))?
        }
    };
    let mut pause = FIRST_POLL;
    loop {
        // The probe after the subscription finds what was announced before it.
        let (found, returned) = blocking_step(move || Ok((probe()?, probe))).await?;
        probe = returned;
        let left = deadline.saturating_duration_since(Instant::now());
        if found.is_ok() || left.is_zero() {
            return Ok(found);
        }
        let event = tokio::time::timeout(left.min(pause), events.notified());
        if event.await.is_err() {
            pause *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADD: &[u8] =
        b"add@/devices/virtual/block/loop0\0ACTION=add\0DEVPATH=/devices/virtual/block/loop0\0\
        SUBSYSTEM=block\0DEVNAME=loop0\0DISKSEQ=7\0";

    #[test]
    fn reads_an_event() {
        let event = Uevent::parse(ADD).unwrap();
        assert_eq!(event.action(), "add");
        assert_eq!(event.devpath(), "/devices/virtual/block/loop0");
        assert_eq!(devpath(ADD), b"/devices/virtual/block/loop0");
        assert_eq!(event.field("DISKSEQ").unwrap(), "7");
        assert!(event.is_block() && event.field("MAJOR").is_none());
    }

    #[test]
    fn refuses_what_is_no_event() {
        let daemon = b"libudev\0\xfe\xed\xca\xfe";
        for bytes in [
            &b""[..],
            b"\0",
            b"@",
            b"add",
            b"@/x",
            b"add@",
            b"add@x",
            b"AD D@/x",
            daemon,
        ] {
            assert_eq!(Uevent::parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn keeps_bytes_that_are_no_text() {
        let event = Uevent::parse(b"add@/d\xff\0A=\xfe=\0=x\0B\0A=2\0").unwrap();
        assert_eq!(event.field("A").unwrap().as_bytes(), b"\xfe=");
        assert_eq!(event.devpath().as_bytes(), b"/d\xff");
        assert!(event.field("B").is_none() && event.field("").is_none());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0..ADD.len()) {
            if let Some(event) = Uevent::parse(&bytes) {
                prop_assert_eq!(event.devpath().as_bytes(), devpath(&bytes));
            }
            let mut damaged = ADD[..cut].to_vec();
            damaged.extend(bytes);
            let _ = Uevent::parse(&damaged);
        }
    }

    #[tokio::test]
    async fn a_wait_ends_at_its_deadline() {
        let started = Instant::now();
        let deadline = started + Duration::from_millis(30);
        let found = wait_until(deadline, || Ok(None::<()>)).await.unwrap();
        assert_eq!(found, None);
        assert!(started.elapsed() >= Duration::from_millis(30));
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn an_error_of_the_look_ends_the_wait() {
        let deadline = Instant::now() + Duration::from_secs(60);
        let look = || Err::<Option<()>, _>(BackendError::invalid("no"));
        assert_eq!(
            wait_until(deadline, look).await.unwrap_err().message(),
            "no"
        );
    }

    #[tokio::test]
    async fn what_was_missing_at_the_deadline_is_the_error() {
        let mut looks = 0;
        let look = move || {
            looks += 1;
            Probe::<()>::Err(NotReady::not_found(format!("look {looks}")))
        };
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = wait_for(deadline, |_| true, look).await.unwrap_err();
        assert_eq!(error.kind(), blockmount::ErrorKind::NotFound);
        assert!(error.message() != "look 1", "{error}");
    }
}
