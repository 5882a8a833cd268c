//! Checking a filesystem before it is mounted.

use serde::{Deserialize, Serialize};

/// What is done about the consistency of a filesystem before it is mounted. Nothing is repaired unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Check {
    /// It is checked completely, and not mounted if anything is wrong with it. Nothing is written.
    Verify,
    /// It is checked completely, what can be repaired without a loss is repaired (`e2fsck -p`), and it is not mounted if
    /// anything else is wrong with it.
    Repair,
}
