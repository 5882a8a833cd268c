//! How full a filesystem is.

use serde::{Deserialize, Serialize};

/// How much of a filesystem is used, as statvfs(3) tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Usage {
    /// Its bytes. Those of a device that is exposed are all used.
    pub bytes: Space,
    /// Its inodes; all zero where a filesystem makes them as they are needed, and for a device.
    pub inodes: Space,
}

impl Usage {
    /// From both.
    pub fn new(bytes: Space, inodes: Space) -> Self {
        Usage { bytes, inodes }
    }
}

/// A quantity that there is a limit of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What is used.
    pub used: u64,
    /// What users other than root can still use: the rest, less what is reserved.
    pub available: u64,
}
