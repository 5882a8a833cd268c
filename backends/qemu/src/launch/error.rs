//! Why there is no VM, or no longer.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What could not be done for a VM as a whole: starting it, reaching its guest, ending it.
///
/// `Display` is one line; the cause is its source. What the guest and QEMU printed last is part of the message
/// where that tells the reason. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct VmError {
    message: Arc<str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
    cut_off: bool,
}

impl VmError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        VmError {
            message: message.into().into(),
            source: None,
            cut_off: false,
        }
    }

    /// The same error with more to read.
    #[must_use]
    pub(super) fn and(mut self, more: &str) -> Self {
        self.message = format!("{}; {more}", self.message).into();
        self
    }

    /// The same error, if what was tried was cut off from outside, which says nothing about what QEMU was given.
    #[must_use]
    pub(super) fn cut_off(mut self, cut_off: bool) -> Self {
        self.cut_off = cut_off;
        self
    }

    pub(super) fn was_cut_off(&self) -> bool {
        self.cut_off
    }

    #[must_use]
    pub(super) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into().into());
        self
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for VmError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
