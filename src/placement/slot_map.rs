//! The addresses of a transport that are in use, for display.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Disk;

/// What an address that is not free is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SlotUse {
    /// A disk is there, or is about to be.
    Occupied,
    /// Whether the disk is there is not known.
    Quarantined,
    /// A disk that was detached is still there, because it cannot be taken out.
    Retained,
    /// Something is there that others put there. It is never detached, and no disk is given this address.
    Foreign,
    /// It is reserved for the VM, and never given to a disk.
    Pinned,
}

impl fmt::Display for SlotUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SlotUse::Occupied => "occupied",
            SlotUse::Quarantined => "quarantined",
            SlotUse::Retained => "retained",
            SlotUse::Foreign => "foreign",
            SlotUse::Pinned => "pinned",
        })
    }
}

/// A line of [`Placement::slot_map`](super::Placement::slot_map).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotEntry<A> {
    /// The address.
    pub address: A,
    /// What it is used for.
    pub usage: SlotUse,
    /// The disk; none at a foreign or reserved address.
    pub disk: Option<Disk>,
}
