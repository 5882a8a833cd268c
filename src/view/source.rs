//! What a view keeps up: the mount that it shows, or the stack.

use std::path::Path;

use super::Viewable;
use crate::MountPoint;
use crate::journal::{MountKey, RecordKey};
use crate::mount::Mount;
use crate::release::Releasing;
use crate::stack::Stack;

/// A share of what a view shows.
pub(crate) enum Source {
    Mount(Mount),
    Stack(Stack),
}

impl Viewable<'_> {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        match self {
            Viewable::Mount(mount) => mount.path(),
            Viewable::Stack(stack) => stack.target(),
        }
    }

    /// One more share of it, for a view.
    pub(super) fn share(self) -> Source {
        match self {
            Viewable::Mount(mount) => Source::Mount(mount.share(None)),
            Viewable::Stack(stack) => Source::Stack(stack.share(None)),
        }
    }
}

impl Source {
    pub(crate) fn key(&self) -> RecordKey {
        match self {
            Source::Mount(mount) => mount.key(),
            Source::Stack(stack) => stack.key(),
        }
    }

    pub(super) fn mount_key(&self) -> Option<&MountKey> {
        match self {
            Source::Mount(mount) => Some(mount.mount_key()),
            Source::Stack(_) => None,
        }
    }

    pub(super) fn point(&self) -> Option<&MountPoint> {
        match self {
            Source::Mount(mount) => Some(mount.point()),
            Source::Stack(_) => None,
        }
    }

    pub(super) fn releasing(self) -> Releasing {
        match self {
            Source::Mount(mount) => mount.releasing(),
            Source::Stack(stack) => stack.releasing(),
        }
    }

    /// The same for what must not linger.
    pub(super) fn releasing_now(self) -> Releasing {
        match self {
            Source::Mount(mount) => mount.releasing_now(),
            Source::Stack(stack) => stack.releasing(),
        }
    }

    /// Leaves it as it is, for the next process.
    pub(super) fn abandon(self) {
        match self {
            Source::Mount(mount) => mount.abandon(),
            Source::Stack(stack) => stack.abandon(),
        }
    }
}
