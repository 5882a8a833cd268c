//! The checks that every backend must keep, as functions over `&dyn` contract.
//!
//! Each function takes a backend and a fixture (what there is to work on), works on it, and
//! leaves it as it was. It panics at the first check that does not hold, naming the check and what the backend
//! did; what was set up by then stays. If all hold, it says how many [were held against
//! it](Passed). A backend cannot pass by refusing everything, nor by doing nothing: the checks require
//! successes, and the [`Snapshot`] must show them.
//!
//! Three checks hold for every call of every suite: it ends within two minutes, it does not panic,
//! and where it fails it leaves the snapshot as it was.
//!
//! The suites ask one thing at a time of a backend, except where a check says "at once". Run them on
//! a tokio runtime with time enabled.

mod checks;
mod combiner;
mod mounter;
mod resolver;
mod transport;
mod unplugger;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

pub use checks::Passed;
pub use combiner::combiner;
pub use mounter::mounter;
pub use resolver::resolver;
pub use transport::transport;
pub use unplugger::unplugger;

use crate::{Disk, MountOptions, Transport, Unplugger};

/// Reads the tables that show what a backend has set up, a line for each entry, in a stable order:
/// the slots of the VM, the kernel's loop devices and mounts, the directories made.
///
/// It must show nothing that others may change meanwhile, and nothing that changes by itself.
pub type Snapshot = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// Removes the file behind a disk from the host.
pub type RemoveSource = Box<dyn Fn(&Disk) + Send + Sync>;

/// What the suite of [`transport`] works on.
pub struct TransportFixture {
    /// Different disks that are there and not attached; at least two, and more than
    /// [`capacity`](Self::capacity).
    pub disks: Vec<Disk>,
    /// Other names of the first disk: relative, through a symbolic link, a hard link. Whatever
    /// the transport can tell.
    pub aliases: Vec<Disk>,
    /// A disk whose source is not there.
    pub missing: Disk,
    /// How many disks fit at once, if it is few enough to try.
    pub capacity: Option<usize>,
    /// Removes the source of a disk, if the transport keeps a disk that has lost its name. It is done to the last disk, at
    /// the end.
    pub remove_source: Option<RemoveSource>,
    /// What the transport has set up.
    pub snapshot: Snapshot,
}

/// What the suites of the guest's contracts work on.
pub struct GuestFixture {
    /// Makes devices for the guest.
    pub transport: Arc<dyn Transport>,
    /// Takes them away again.
    pub unplugger: Arc<dyn Unplugger>,
    /// Different disks that are there and not attached, each with a filesystem on all of it that can
    /// be mounted with [`options`](Self::options); at least two.
    pub disks: Vec<Disk>,
    /// How to mount them.
    pub options: MountOptions,
    /// A disk without a filesystem, if mounting looks for one.
    pub blank: Option<Disk>,
    /// A disk with a filesystem that can be mounted read-write, for the changes of an overlay; without
    /// one, overlays are only tried read-only.
    pub scratch: Option<Disk>,
    /// An absolute path in the guest below which the suite has the paths to itself. It makes no
    /// directories there; the mounter does.
    pub directory: PathBuf,
    /// What transport and guest have set up.
    pub snapshot: Snapshot,
}

impl fmt::Debug for TransportFixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportFixture")
            .field("disks", &self.disks)
            .field("aliases", &self.aliases)
            .field("missing", &self.missing)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for GuestFixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFixture")
            .field("disks", &self.disks)
            .field("options", &self.options)
            .field("blank", &self.blank)
            .field("scratch", &self.scratch)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl GuestFixture {
    /// The first two disks.
    fn two_disks(&self) -> &[Disk] {
        assert!(
            self.disks.len() >= 2,
            "the fixture must have two disks, not {}",
            self.disks.len()
        );
        &self.disks[..2]
    }

    /// Takes disks out again, in reverse, and shows that all is as it was before the suite.
    async fn take_out(
        &self,
        checks: &mut checks::Checks<'_>,
        disks: &[Disk],
        locators: &[crate::DeviceLocator],
        before: &[String],
    ) {
        let check = "the fixture's disks can be taken out after the suite";
        for (disk, locator) in disks.iter().zip(locators).rev() {
            let unplug = self.unplugger.unplug(locator);
            checks
                .succeeds(check, format!("unplug of {locator}"), unplug)
                .await;
            checks
                .succeeds(
                    check,
                    format!("detach of {disk}"),
                    self.transport.detach(disk),
                )
                .await;
        }
        checks.unchanged("a suite leaves nothing behind", "the suite", before);
    }
}
