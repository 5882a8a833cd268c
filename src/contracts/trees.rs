//! What is made of mounts: overlays and views.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{OverlayOptions, ViewOptions};

/// Layers to be seen as one tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Overlay {
    /// Where each layer is mounted, the topmost first.
    pub layers: Vec<PathBuf>,
    /// A writable directory that takes all changes; the tree is read-only without one. The
    /// combiner makes the directories it needs in it (`upper` and `work`) and leaves them there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// Where the tree appears.
    pub target: PathBuf,
    /// How the layers are stacked. What the guest cannot do is `Unsuitable`.
    #[serde(default, skip_serializing_if = "OverlayOptions::is_empty")]
    pub options: OverlayOptions,
}

impl Overlay {
    /// A read-only tree of `layers` (where each is mounted, the topmost first) at `target`.
    pub fn new<L: Into<PathBuf>>(
        layers: impl IntoIterator<Item = L>,
        target: impl Into<PathBuf>,
    ) -> Self {
        Overlay {
            layers: layers.into_iter().map(Into::into).collect(),
            scratch: None,
            target: target.into(),
            options: OverlayOptions::default(),
        }
    }

    /// The same with options.
    #[must_use]
    pub fn with_options(mut self, options: OverlayOptions) -> Self {
        self.options = options;
        self
    }

    /// The same with a writable directory for changes.
    #[must_use]
    pub fn with_scratch(mut self, directory: impl Into<PathBuf>) -> Self {
        self.scratch = Some(directory.into());
        self
    }
}

/// A mount, or a directory of it, to be seen at a further place.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct BindMount {
    /// Where the mount is.
    pub source: PathBuf,
    /// Where it appears.
    pub target: PathBuf,
    /// How it appears.
    #[serde(default)]
    pub options: ViewOptions,
}

impl BindMount {
    /// What is mounted at `source`, at `target` as well.
    pub fn new(
        source: impl Into<PathBuf>,
        target: impl Into<PathBuf>,
        options: ViewOptions,
    ) -> Self {
        BindMount {
            source: source.into(),
            target: target.into(),
            options,
        }
    }
}
