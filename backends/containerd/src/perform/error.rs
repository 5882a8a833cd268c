//! Why a plan could not be performed.

use blockmount::{BackendError, ErrorKind};
use thiserror::Error;

use crate::InvalidMount;
use crate::plan::Plan;

/// A plan could not be performed. What had been done of it is undone.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PerformError {
    /// What a mount asks for makes no sense, or is nothing that this crate does.
    #[error(transparent)]
    Invalid(#[from] InvalidMount),
    /// A mount could not be done.
    #[error("mount {index} of the list ({kind:?}) cannot be done")]
    Failed {
        /// The number of the mount, from 0.
        index: usize,
        /// Its type without transforms.
        kind: String,
        /// What the caller can do about it.
        error_kind: ErrorKind,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Errors about one step of a plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) plan: &'a Plan,
    pub(super) step: usize,
}

impl At<'_> {
    fn kind(self) -> String {
        self.plan.steps[self.step].mount.kind.clone()
    }

    pub(super) fn invalid(self, reason: impl Into<String>) -> PerformError {
        PerformError::Invalid(InvalidMount {
            index: self.step,
            kind: self.kind(),
            reason: reason.into(),
        })
    }

    /// On the way to the guest, or in it.
    pub(super) fn failed(self, error: blockmount::Error) -> PerformError {
        PerformError::Failed {
            index: self.step,
            kind: self.kind(),
            error_kind: error.kind(),
            source: Box::new(error),
        }
    }

    /// On this host, before anything is attached.
    pub(super) fn failed_here(self, error: BackendError) -> PerformError {
        match error.kind() {
            ErrorKind::Invalid => self.invalid(error.to_string()),
            error_kind => PerformError::Failed {
                index: self.step,
                kind: self.kind(),
                error_kind,
                source: Box::new(error),
            },
        }
    }
}
