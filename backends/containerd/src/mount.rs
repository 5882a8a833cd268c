//! A mount as containerd describes it, and what is wrong with one.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One mount of a list (`containerd.types.Mount`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Transforms and the type of the filesystem: `erofs`, `format/mkdir/overlay`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is mounted.
    #[serde(default)]
    pub source: String,
    /// Where in the root filesystem, for those that are not the root itself; mostly empty.
    #[serde(default)]
    pub target: String,
    /// Options of the filesystem, of the mount, and those of containerd (`X-containerd.`).
    #[serde(default)]
    pub options: Vec<String>,
}

impl Mount {
    /// A mount without options.
    pub fn new(kind: impl Into<String>, source: impl Into<String>) -> Self {
        Mount {
            kind: kind.into(),
            source: source.into(),
            ..Mount::default()
        }
    }

    /// With one more option.
    #[must_use]
    pub fn option(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }
}

/// A list makes no sense: which mount of it, and why. Nothing was done.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("mount {index} of the list ({kind:?}): {reason}")]
#[non_exhaustive]
pub struct InvalidMount {
    /// The number of the mount, from 0.
    pub index: usize,
    /// Its type, as it was given.
    pub kind: String,
    /// What is wrong with it.
    pub reason: String,
}
