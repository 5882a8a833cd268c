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
mod fixture;
mod mounter;
mod resolver;
mod transport;
mod unplugger;

pub use checks::Passed;
pub use combiner::combiner;
pub use fixture::{GuestFixture, Snapshot, TransportFixture};
pub use mounter::mounter;
pub use resolver::resolver;
pub use transport::transport;
pub use unplugger::unplugger;

use crate::Disk;

impl GuestFixture {
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
        checks
            .unchanged("a suite leaves nothing behind", "the suite", before)
            .await;
    }
}
