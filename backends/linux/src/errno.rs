//! From what the kernel answers to what the caller can do about it.

use std::io;
use std::time::{Duration, Instant};

pub(crate) use blockmount::blocking;
use blockmount::{BackendError, ErrorKind};
use rustix::io::Errno;

/// Damage found by a filesystem (`EFSCORRUPTED`), and by its checksums (`EFSBADCRC`).
pub(crate) const DAMAGED: [Errno; 2] = [Errno::UCLEAN, Errno::BADMSG];

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

/// How often what is busy is tried again: at first soon, because most users are about to leave.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(50);

/// Tries until it is not `Busy`, or until the deadline.
///
/// Much that is busy is so for a moment: a process that is being started has copies of all open
/// descriptors, one that ends has not closed them yet, a daemon looks at each new device. The
/// kernel announces no end of it.
pub(crate) async fn retry_while_busy<T, F>(timeout: Duration, attempt: F) -> Result<T, BackendError>
where
    T: Send + 'static,
    F: Fn() -> Result<T, BackendError> + Clone + Send + 'static,
{
    let deadline = Instant::now() + timeout;
    let mut pause = FIRST_RETRY;
    loop {
        let done = blocking(attempt.clone()).await;
        let left = deadline.saturating_duration_since(Instant::now());
        match done {
            Err(error) if error.kind() == ErrorKind::Busy && !left.is_zero() => {}
            done => return done,
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}
