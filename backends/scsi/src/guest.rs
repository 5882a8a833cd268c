//! The guest's side: from `scsi:0/3` to `/dev/sdb`, and unplugging it.

mod controller;
mod identity;
mod resolver;
mod scan;
mod unplugged;
mod unplugger;

pub use controller::ControllerId;
pub use resolver::ScsiResolver;
pub use unplugger::ScsiUnplugger;
