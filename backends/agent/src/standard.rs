//! The transports of the standard program: the one place of this crate that names any.

mod loopback;
mod scsi;
mod vpmem;

pub use loopback::Loop;
pub use scsi::Scsi;
pub use vpmem::Vpmem;

use crate::{Agent, AgentBuilder};

/// The agent of the program `blockmount-agent`, which finds SCSI disks, persistent memory and loop devices.
pub fn agent() -> AgentBuilder {
    Agent::builder()
        .transport(Scsi::default())
        .transport(Vpmem::default())
        .transport(Loop)
}
