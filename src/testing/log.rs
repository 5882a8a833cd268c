//! What happened to a fake VM, in order.

use std::fmt;

use super::{Key, VmStep};
use crate::{DeviceLocator, ErrorKind};

/// The beginning or the end of a call.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its place in the log, from 0.
    pub order: usize,
    /// Which call it is.
    pub step: VmStep,
    /// What the call is about.
    pub key: Key,
    /// The device that is touched, as far as the VM knows at that moment.
    pub device: Option<DeviceLocator>,
    /// Whether the call begins or how it ended.
    pub phase: Phase,
}

/// Whether a call begins or how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The VM was called.
    Begun,
    /// The VM answered, or the call ended without an answer.
    Ended(Outcome),
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was asked to do.
    Done,
    /// An adoption found nothing there.
    Absent,
    /// It did nothing and said so.
    Failed(ErrorKind),
    /// It left open whether it happened.
    Uncertain {
        /// Whether it did.
        happened: bool,
    },
    /// It panicked.
    Panicked {
        /// Whether it had an effect before.
        happened: bool,
    },
    /// Its future was dropped before it had an effect, which no caller may do.
    Dropped,
}

impl Outcome {
    /// Whether the caller cannot know if it happened.
    pub fn is_in_doubt(self) -> bool {
        matches!(
            self,
            Outcome::Uncertain { .. } | Outcome::Panicked { .. } | Outcome::Dropped
        ) || self == Outcome::Failed(ErrorKind::Uncertain)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>5}  {:<8} {}",
            self.order,
            self.step.to_string(),
            self.key
        )?;
        if let Some(device) = self
            .device
            .as_ref()
            .filter(|_| !matches!(self.key, Key::Device(_)))
        {
            write!(f, " ({device})")?;
        }
        match self.phase {
            Phase::Begun => f.write_str(" ..."),
            Phase::Ended(outcome) => write!(f, ": {outcome}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let effect = |happened| {
            if happened {
                "it happened"
            } else {
                "it did not happen"
            }
        };
        match *self {
            Outcome::Done => f.write_str("done"),
            Outcome::Absent => f.write_str("absent"),
            Outcome::Failed(kind) => write!(f, "failed, {kind}"),
            Outcome::Uncertain { happened } => write!(f, "uncertain, {}", effect(happened)),
            Outcome::Panicked { happened } => write!(f, "panicked, {}", effect(happened)),
            Outcome::Dropped => f.write_str("dropped half-way"),
        }
    }
}

/// The last events, for a message.
pub(super) fn tail(log: &[Event]) -> String {
    const SHOWN: usize = 40;
    let from = log.len().saturating_sub(SHOWN);
    let mut text = String::new();
    if from > 0 {
        text.push_str(&format!("  ... {from} events before\n"));
    }
    for event in &log[from..] {
        text.push_str(&format!("{event}\n"));
    }
    text
}
