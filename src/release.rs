//! A release that failed: what went wrong, and how to try again.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use tracing::error;

use crate::{Error, ErrorKind};

/// A tear-down that is still pending in a table.
pub(crate) trait PendingRelease: Send + Sync {
    /// Tries it once more.
    fn retry(self: Box<Self>) -> Releasing;
}

/// A release under way. Dropping it ends the wait, not the tear-down.
pub(crate) type Releasing = Pin<Box<dyn Future<Output = Result<(), ReleaseError>> + Send>>;

/// A release whose tear-down failed.
///
/// The lease is released all the same: the caller has nothing left to leak. After `LostWrites` the tear-down is done, and a
/// retry has nothing to do. After any other error it stays pending in the manager, at the step that failed. [`retry`](Self::retry), [`Manager::drain`](crate::Manager::drain) and the
/// next request for the same disk or mount retry it.
#[must_use = "retry it, or drain the manager before it goes"]
pub struct ReleaseError {
    first: Error,
    others: Vec<Error>,
    pending: Vec<Box<dyn PendingRelease>>,
}

/// For a job that holds no leases.
pub(crate) fn nothing_to_release() -> Releasing {
    Box::pin(std::future::ready(Ok(())))
}

impl ReleaseError {
    pub(crate) fn new(error: Error, pending: Box<dyn PendingRelease>) -> Self {
        ReleaseError {
            first: error,
            others: Vec::new(),
            pending: vec![pending],
        }
    }

    /// The first thing that went wrong.
    pub fn error(&self) -> &Error {
        &self.first
    }

    /// What a caller can do about the first thing that went wrong: for `Busy`, retry once the device is
    /// no longer in use.
    pub fn kind(&self) -> ErrorKind {
        self.first.kind()
    }

    /// Everything that went wrong; a stack has many parts.
    pub fn errors(&self) -> impl Iterator<Item = &Error> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Tries again, from the step that failed.
    ///
    /// # Errors
    ///
    /// What is still pending.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the wait; the tear-down that is under way goes on, and
    /// [`Manager::drain`](crate::Manager::drain) retries what it leaves.
    pub async fn retry(self) -> Result<(), ReleaseError> {
        let mut outcome = Ok(());
        for pending in self.pending {
            outcome = both(outcome, pending.retry().await);
        }
        outcome
    }

    /// For what is torn down and has lost writes: there is nothing to try again.
    pub(crate) fn lost_writes(error: Error) -> Self {
        ReleaseError {
            first: error,
            others: Vec::new(),
            pending: Vec::new(),
        }
    }

    pub(crate) fn into_errors(self) -> impl Iterator<Item = Error> {
        std::iter::once(self.first).chain(self.others)
    }

    /// For when no caller waits for the error.
    pub(crate) fn log(&self) {
        for failed in self.errors() {
            let (error, cause) = (failed, failed.cause());
            match failed.kind() {
                ErrorKind::LostWrites => error!(%error, %cause, "released, but writes were lost"),
                _ => {
                    error!(%error, %cause, "release failed; it is pending until the next drain");
                }
            }
        }
    }
}

/// The outcome of a release on its way to its caller. An error that no caller has taken is logged by whoever drops
/// it last.
pub(crate) struct Unheard<T>(Option<Result<T, ReleaseError>>);

impl<T> Unheard<T> {
    pub(crate) fn new(outcome: Result<T, ReleaseError>) -> Self {
        Unheard(Some(outcome))
    }

    pub(crate) fn hear(mut self) -> Result<T, ReleaseError> {
        self.0.take().expect("taken once, by value")
    }
}

impl<T> Drop for Unheard<T> {
    fn drop(&mut self) {
        if let Some(Err(error)) = &self.0 {
            error.log();
        }
    }
}

/// One outcome of two: a release goes on after an error, and reports all of them.
pub(crate) fn both(
    one: Result<(), ReleaseError>,
    other: Result<(), ReleaseError>,
) -> Result<(), ReleaseError> {
    match (one, other) {
        (Err(mut one), Err(other)) => {
            one.others.push(other.first);
            one.others.extend(other.others);
            one.pending.extend(other.pending);
            Err(one)
        }
        (one, other) => one.and(other),
    }
}

impl fmt::Display for ReleaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.first, f)?;
        match self.others.len() {
            0 => Ok(()),
            others => write!(f, " (and {others} more)"),
        }
    }
}

impl fmt::Debug for ReleaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReleaseError")
            .field("first", &self.first)
            .field("others", &self.others)
            .finish_non_exhaustive()
    }
}

impl StdError for ReleaseError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        StdError::source(&self.first)
    }
}

/// Releases what a caller does not get after all.
pub(crate) async fn give_back(releasing: Releasing) {
    if let Err(left) = releasing.await {
        left.log();
    }
}
