//! Why a command of QMP did not do what it should, and what that means for a backend.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use thiserror::Error;

/// How much is kept of a text that QEMU says, in characters.
const KEPT: usize = 1_000;

/// Why a command failed. Cloning is cheap enough: everybody who waits is told.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// QEMU has not done it, and says why.
    #[error("QEMU refuses {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// The class of the error: nearly always `GenericError`.
        class: String,
        /// What QEMU says, cut to 1,000 characters; it is for humans, and differs between versions.
        desc: String,
    },
    /// There is no answer in time. If the command was sent QEMU may still do it; otherwise it never will.
    #[error(
        "QEMU has not {} {command} within {deadline:?}",
        if *sent { "answered" } else { "read its monitor, so it was not asked for" }
    )]
    TimedOut {
        /// The command, or the event that was awaited.
        command: String,
        /// How long it was waited for.
        deadline: Duration,
        /// Whether QEMU may have seen any of it.
        sent: bool,
    },
    /// The connection has ended: QEMU has, or it has closed its monitor.
    #[error("QEMU is gone, {command} has no answer: {reason}")]
    Gone {
        /// The command, or the event that was awaited.
        command: String,
        /// How the connection ended.
        reason: Arc<str>,
    },
    /// What QEMU says cannot be understood.
    #[error("what QEMU says to {command} cannot be read: {reason}")]
    Invalid {
        /// The command.
        command: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The command is longer than [`MAX_COMMAND`](super::MAX_COMMAND), or its arguments are no JSON. It was not sent.
    #[error("{command} is no command that can be sent: {reason}")]
    Unfit {
        /// The command.
        command: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It was begun, and has failed.
    #[error("{command} has failed: {reason}")]
    Failed {
        /// The command.
        command: String,
        /// What QEMU or the system says.
        reason: String,
    },
    /// Events came faster than they were taken, and the oldest are lost: ask for the state of things
    /// in place of them.
    #[error("{missed} events {event} were missed")]
    Lagged {
        /// The name of the event.
        event: String,
        /// How many are lost.
        missed: u64,
    },
}

impl QmpError {
    /// What it means for the caller of a backend.
    ///
    /// The classes that mean something are those which QEMU's `qapi/error.json` documents; a
    /// `GenericError` means nothing but that it was not done.
    pub fn kind(&self) -> ErrorKind {
        match self {
            QmpError::Refused { class, .. } => match class.as_str() {
                "CommandNotFound" | "KVMMissingCap" => ErrorKind::Unsuitable,
                "DeviceNotFound" => ErrorKind::NotFound,
                _ => ErrorKind::Other,
            },
            QmpError::Failed { .. } => ErrorKind::Other,
            QmpError::TimedOut { sent: false, .. } => ErrorKind::Busy,
            QmpError::TimedOut { sent: true, .. }
            | QmpError::Invalid { .. }
            | QmpError::Lagged { .. } => ErrorKind::Uncertain,
            QmpError::Gone { .. } => ErrorKind::Gone,
            QmpError::Unfit { .. } => ErrorKind::Invalid,
        }
    }

    /// As the cause of a backend's error of the same [kind](Self::kind), which says what was tried.
    pub fn while_trying(self, tried: impl Into<String>) -> BackendError {
        BackendError::new(self.kind(), tried).with_source(self)
    }
}

impl From<QmpError> for BackendError {
    fn from(error: QmpError) -> BackendError {
        BackendError::new(error.kind(), error.to_string())
    }
}

/// A text of another program as part of a line of ours.
pub(super) fn one_line(text: &dyn fmt::Display) -> String {
    let text = text.to_string();
    let line = blockmount::printable(text.trim_end());
    line.shortened(KEPT).to_string()
}
