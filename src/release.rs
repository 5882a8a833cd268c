//! A release that failed: what went wrong, and how to try again.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use tracing::error;

use crate::{Error, ErrorKind};

/// A tear-down that is still owed by some table.
pub(crate) trait PendingRelease: Send + Sync {
    /// Tries it once more.
    fn retry(self: Box<Self>) -> Releasing;
}

/// A release under way. Dropping it gives up the wait, not the tear-down.
pub(crate) type Releasing = Pin<Box<dyn Future<Output = Result<(), ReleaseError>> + Send>>;

/// A release whose tear-down failed.
///
/// The lease is given back all the same: the caller has nothing left to leak. What is owed stays with
/// the manager, at the step that failed, and is done by [`retry`](Self::retry), by
/// [`Manager::drain`](crate::Manager::drain), or before anybody is given the same disk again.
#[must_use = "retry it, or drain the manager before it goes"]
pub struct ReleaseError {
    first: Error,
    others: Vec<Error>,
    pending: Vec<Box<dyn PendingRelease>>,
}

/// For what holds nothing.
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

    /// What a caller can do about the first thing that went wrong: for `Busy`, retry when the user of
    /// the device has let go.
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
    /// What is still owed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; the tear-down that is under way goes on, and
    /// [`Manager::drain`](crate::Manager::drain) does what it leaves.
    pub async fn retry(self) -> Result<(), ReleaseError> {
        let mut outcome = Ok(());
        for pending in self.pending {
            outcome = both(outcome, pending.retry().await);
        }
        outcome
    }

    pub(crate) fn into_errors(self) -> impl Iterator<Item = Error> {
        std::iter::once(self.first).chain(self.others)
    }

    /// For when nobody is left to tell.
    pub(crate) fn log(&self) {
        for failed in self.errors() {
            error!(error = %failed, cause = %failed.cause(), "release failed; it is owed until the next drain");
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
