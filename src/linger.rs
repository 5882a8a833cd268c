//! How long what nobody uses any more is kept.

use std::time::Duration;

/// Keeps what was released for the next caller, for a while.
///
/// By default the last release of a disk takes it out of the VM. With this, a disk stays attached after it, and a mount stays
/// mounted, until its time is over, until there are too many, or until the slot or the path is needed: the least recently used
/// goes first. The next request for it shares it at once, as if somebody had held it all the time.
///
/// - Only what is read-only lingers: a disk that can be written to has all writes when its release returns.
/// - Only what its transport can tell to be unchanged lingers ([`DiskId::with_version`](crate::DiskId::with_version)). If the
///   file was replaced or changed meanwhile, the next request gets the new one.
/// - What lingers never keeps another disk out: a request that meets no free slot, or a path that is taken, has it torn down
///   and is tried again.
/// - It is not in use: [`Manager::drain`](crate::Manager::drain) takes it out, and nothing counts it.
///
/// The release of what lingers succeeds at once. What goes wrong when it is torn down later is logged, and is pending until the
/// next drain, as with a handle that is dropped. The manager keeps itself alive while anything lingers.
///
/// ```
/// use std::time::Duration;
/// use blockmount::{Linger, Manager};
///
/// let linger = Linger { at_most: Duration::from_secs(60), how_many: 128 };
/// let builder = Manager::builder().linger(linger);
/// # let _ = builder;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linger {
    /// How long one is kept after its last release. Zero keeps nothing.
    pub at_most: Duration,
    /// How many are kept at once; a mount with its disks counts as one. Zero keeps nothing.
    pub how_many: usize,
}

impl Linger {
    /// Keeps nothing: the default.
    pub const OFF: Linger = Linger {
        at_most: Duration::ZERO,
        how_many: 0,
    };
}

impl Default for Linger {
    fn default() -> Self {
        Linger::OFF
    }
}
