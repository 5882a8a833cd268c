//! A release that failed: what went wrong, and how to try again.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tracing::error;

use crate::{Error, ErrorKind};

/// A tear-down that is still pending in a table.
pub(crate) trait PendingRelease: Send + Sync {
    /// Tries it once more.
    fn retry(self: Box<Self>) -> Releasing;
}

/// A release under way. Dropping it ends the wait, not the tear-down.
pub(crate) struct Releasing(Stage);

enum Stage {
    /// Nothing is left to wait for, as is the rule where backends have nothing to wait for: it costs no allocation.
    Over(Unheard),
    Waits(Pin<Box<dyn Future<Output = Result<(), ReleaseError>> + Send>>),
}

impl Releasing {
    pub(crate) fn over(outcome: Result<(), ReleaseError>) -> Self {
        Releasing(Stage::Over(Unheard(Some(outcome))))
    }

    pub(crate) fn waits(
        release: impl Future<Output = Result<(), ReleaseError>> + Send + 'static,
    ) -> Self {
        Releasing(Stage::Waits(Box::pin(release)))
    }

    /// With the outcome of what was released before.
    pub(crate) fn after(self, before: Result<(), ReleaseError>) -> Self {
        match self.0 {
            Stage::Over(outcome) => Self::over(both(before, outcome.hear())),
            Stage::Waits(rest) => {
                let before = Unheard(Some(before));
                Self::waits(async move { both(before.hear(), rest.await) })
            }
        }
    }
}

impl Future for Releasing {
    type Output = Result<(), ReleaseError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Stage::Over(outcome) => Poll::Ready(outcome.take()),
            Stage::Waits(release) => release.as_mut().poll(context),
        }
    }
}

/// A release whose tear-down failed.
///
/// The lease is released all the same: the caller has nothing left to leak. After `LostWrites` the tear-down is done, and a
/// retry has nothing to do. After any other error it stays pending in the manager, at the step that failed. [`retry`](Self::retry), [`Manager::drain`](crate::Manager::drain) and the
/// next request for the same disk or mount retry it.
#[must_use = "retry it, or drain the manager before it goes"]
pub struct ReleaseError(
    /// Behind a pointer, so that the outcomes that are no errors stay small.
    Box<Failures>,
);

struct Failures {
    first: Error,
    others: Vec<Error>,
    pending: Vec<Box<dyn PendingRelease>>,
}

/// For a job that holds no leases.
pub(crate) fn nothing_to_release() -> Releasing {
    Releasing::over(Ok(()))
}

impl ReleaseError {
    pub(crate) fn new(error: Error, pending: Box<dyn PendingRelease>) -> Self {
        Self::of(error, vec![pending])
    }

    fn of(first: Error, pending: Vec<Box<dyn PendingRelease>>) -> Self {
        let others = Vec::new();
        ReleaseError(Box::new(Failures {
            first,
            others,
            pending,
        }))
    }

    /// The first thing that went wrong.
    pub fn error(&self) -> &Error {
        &self.0.first
    }

    /// What a caller can do about the first thing that went wrong: for `Busy`, retry once the device is
    /// no longer in use.
    pub fn kind(&self) -> ErrorKind {
        self.0.first.kind()
    }

    /// Everything that went wrong; a stack has many parts.
    pub fn errors(&self) -> impl Iterator<Item = &Error> {
        std::iter::once(&self.0.first).chain(&self.0.others)
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
        for pending in self.0.pending {
            outcome = both(outcome, pending.retry().await);
        }
        outcome
    }

    /// For what is torn down and has lost writes: there is nothing to try again.
    pub(crate) fn lost_writes(error: Error) -> Self {
        Self::of(error, Vec::new())
    }

    pub(crate) fn into_errors(self) -> impl Iterator<Item = Error> {
        std::iter::once(self.0.first).chain(self.0.others)
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
struct Unheard(Option<Result<(), ReleaseError>>);

impl Unheard {
    fn hear(mut self) -> Result<(), ReleaseError> {
        self.take()
    }

    fn take(&mut self) -> Result<(), ReleaseError> {
        self.0.take().expect("an outcome is taken once")
    }
}

impl Drop for Unheard {
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
            one.0.others.push(other.0.first);
            one.0.others.extend(other.0.others);
            one.0.pending.extend(other.0.pending);
            Err(one)
        }
        (one, other) => one.and(other),
    }
}

impl fmt::Display for ReleaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.first, f)?;
        match self.0.others.len() {
            0 => Ok(()),
            others => write!(f, " (and {others} more)"),
        }
    }
}

impl fmt::Debug for ReleaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReleaseError")
            .field("first", &self.0.first)
            .field("others", &self.0.others)
            .finish_non_exhaustive()
    }
}

impl StdError for ReleaseError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        StdError::source(&self.0.first)
    }
}

/// Releases what a caller does not get after all.
pub(crate) async fn give_back(releasing: Releasing) {
    if let Err(left) = releasing.await {
        left.log();
    }
}
