//! From what the kernel answers to what the caller can do about it.

use std::io;
use std::time::{Duration, Instant};

/// A call runs on one blocking thread until it has to wait.
pub(crate) use blockmount::blocking_step as blocking;
use blockmount::{BackendError, ErrorKind};
use rustix::io::Errno;

/// Damage found by a filesystem (`EFSCORRUPTED`), and by its checksums (`EFSBADCRC`).
pub(crate) const DAMAGED: [Errno; 2] = [Errno::UCLEAN, Errno::BADMSG];

/// Whether an error of the system means that a device or file is not there: not yet, or no longer.
pub fn is_absent(error: &io::Error) -> bool {
    let absent = [
        Errno::NOENT,
        Errno::NXIO,
        Errno::NODEV,
        Errno::NOMEDIUM,
        Errno::NOTDIR,
    ];
    Errno::from_io_error(error).is_some_and(|errno| absent.contains(&errno))
}

/// Whether a system call cannot be used: the kernel is older than it, or a filter of a container refuses it (seccomp), with
/// the number of a missing permission. If it is really permission that is missing, the older call says so as well.
pub(crate) fn is_call_missing(errno: Errno) -> bool {
    matches!(errno, Errno::NOSYS | Errno::PERM)
}

/// The number of the kernel's error that an error was made of.
pub(crate) fn errno_of(error: &BackendError) -> Option<Errno> {
    let source = std::error::Error::source(error)?;
    Errno::from_io_error(source.downcast_ref::<io::Error>()?)
}

/// An error about `what` was tried, of the kind that the error number means for mounting and
/// unmounting.
pub(crate) fn errno_error(what: impl Into<String>, cause: impl Into<io::Error>) -> BackendError {
    let cause = cause.into();
    BackendError::new(kind(&cause), what).with_source(cause)
}

fn kind(cause: &io::Error) -> ErrorKind {
    let Some(errno) = Errno::from_io_error(cause) else {
        return ErrorKind::Other;
    };
    match errno {
        Errno::BUSY => ErrorKind::Busy,
        // The device or the medium refuses writes: it is there with other access.
        Errno::ACCESS | Errno::ROFS => ErrorKind::Conflict,
        Errno::NOENT | Errno::NXIO | Errno::NOMEDIUM => ErrorKind::NotFound,
        Errno::NODEV | Errno::NOSYS | Errno::OPNOTSUPP => ErrorKind::Unsuitable,
        Errno::INVAL | Errno::NAMETOOLONG | Errno::NOTDIR | Errno::LOOP => ErrorKind::Invalid,
        damaged if DAMAGED.contains(&damaged) => ErrorKind::Invalid,
        _ => ErrorKind::Other,
    }
}

/// The pauses between attempts at something that is busy: from 1 ms, doubling up to 50 ms, until a deadline.
///
/// Most users of a device are about to close it: a process that is being started has copies of all open
/// descriptors, one that ends has not closed them yet, udev looks at each new device. The kernel sends no event
/// when it becomes free.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    deadline: Instant,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(1);
    const LONGEST: Duration = Duration::from_millis(50);

    /// Starts with the shortest pause.
    pub fn until(deadline: Instant) -> Self {
        Backoff {
            next: Self::FIRST,
            deadline,
        }
    }

    /// The next pause; nothing if the deadline has passed.
    pub fn pause(&mut self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let pause = self.next.min(left);
        self.next = (self.next * 2).min(Self::LONGEST);
        (!left.is_zero()).then_some(pause)
    }
}

/// Repeats an attempt that is `Busy` until `timeout` has passed, with the pauses of [`Backoff`].
pub(crate) async fn retry_while_busy<T, F>(timeout: Duration, attempt: F) -> Result<T, BackendError>
where
    T: Send + 'static,
    F: Fn() -> Result<T, BackendError> + Clone + Send + 'static,
{
    let mut backoff = Backoff::until(Instant::now() + timeout);
    loop {
        let done = blocking(attempt.clone()).await;
        match done {
            Err(error) if error.kind() == ErrorKind::Busy => match backoff.pause() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(error),
            },
            done => return done,
        }
    }
}
