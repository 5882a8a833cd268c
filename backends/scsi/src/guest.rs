//! The guest's side: from `scsi:0/3` to `/dev/sdb`, and letting go of it.

mod controller;
mod identity;
mod resolver;
mod unplugger;

pub use controller::ControllerId;
pub use identity::Identity;
pub use resolver::ScsiResolver;
pub use unplugger::ScsiUnplugger;
