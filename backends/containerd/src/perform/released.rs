//! What was performed, and how it goes.

use std::fmt;
use std::path::PathBuf;

use blockmount::{Error, ErrorKind, Held, HolderName, Recovery, ReleaseError};

/// A plan that was performed: the handles that keep it up.
///
/// [`release`](Self::release) it to hear how that went. Dropping it releases it in the background, where an error can only be
/// logged.
#[derive(Debug)]
#[must_use = "dropping it releases it in the background, where an error is only logged"]
pub struct Performed {
    points: Vec<PathBuf>,
    held: Vec<Held>,
}

/// Not all of what was held is there after a restart.
#[derive(Debug)]
pub struct Lost {
    /// What is there.
    pub rest: Performed,
    /// Why the others are not.
    pub errors: Vec<Error>,
}

impl Performed {
    pub(super) fn new(points: Vec<PathBuf>, held: Vec<Held>) -> Self {
        Performed { points, held }
    }

    /// Takes over what an earlier process has performed: its [`holders`](super::holders), and its [`points`](Self::points).
    ///
    /// # Errors
    ///
    /// [`Lost`] if not all of it is there.
    pub fn claim(
        recovery: &Recovery,
        holders: &[HolderName],
        points: Vec<PathBuf>,
    ) -> Result<Self, Lost> {
        let mut performed = Performed::new(points, Vec::new());
        let mut errors = Vec::new();
        for name in holders {
            match recovery.claim(name) {
                Ok(held) => performed.held.push(held),
                Err(error) => errors.push(error),
            }
        }
        match errors.is_empty() {
            true => Ok(performed),
            false => Err(Lost {
                rest: performed,
                errors,
            }),
        }
    }

    /// Where each step of the plan is mounted; empty for a `loop` whose disk a later mount has taken, which is seen nowhere else.
    pub fn points(&self) -> &[PathBuf] {
        &self.points
    }

    /// Takes it back, in reverse order. What others share stays for them.
    ///
    /// # Errors
    ///
    /// Everything that went wrong; see [`Unreleased`] for how to go on.
    ///
    /// # Cancel safety
    ///
    /// Run it in a task of its own. Dropped, what it has not come to is released in the background.
    pub async fn release(mut self) -> Result<(), Unreleased> {
        let mut errors = Vec::new();
        while let Some(held) = self.held.pop() {
            errors.extend(held.release().await.err());
        }
        Unreleased::of(errors)
    }
}

/// What could not be taken back: it stays pending in the manager.
#[must_use = "retry it, or drain the manager before it goes"]
pub struct Unreleased(Vec<ReleaseError>);

impl Unreleased {
    fn of(errors: Vec<ReleaseError>) -> Result<(), Self> {
        match errors.is_empty() {
            true => Ok(()),
            false => Err(Unreleased(errors)),
        }
    }

    /// What a caller can do: for `Busy`, retry once nobody uses it any more. After `LostWrites` all of it is taken back.
    pub fn kind(&self) -> ErrorKind {
        self.worst().kind()
    }

    /// What went wrong.
    pub fn error(&self) -> &Error {
        self.worst()
    }

    /// That which is still pending before that which is done and has lost writes.
    fn worst(&self) -> &Error {
        let mut all = self.0.iter().flat_map(ReleaseError::errors);
        let is_pending = |error: &&Error| error.kind() != ErrorKind::LostWrites;
        let pending = all.find(is_pending);
        pending.unwrap_or_else(|| self.0[0].error())
    }

    /// Tries again.
    ///
    /// # Errors
    ///
    /// What is still pending.
    ///
    /// # Cancel safety
    ///
    /// As for [`ReleaseError::retry`].
    pub async fn retry(self) -> Result<(), Self> {
        let mut errors = Vec::new();
        for error in self.0 {
            errors.extend(error.retry().await.err());
        }
        Unreleased::of(errors)
    }
}

impl fmt::Debug for Unreleased {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errors = self.0.iter().flat_map(ReleaseError::errors);
        formatter.debug_list().entries(errors).finish()
    }
}

impl fmt::Display for Unreleased {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.worst().fmt(formatter)
    }
}

impl std::error::Error for Unreleased {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.worst().source()
    }
}
