//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod common;
#[path = "../../../scsi/tests/sysfs/mod.rs"]
mod sysfs;

mod addresses;
mod capacity;
mod conformance;
mod foreign;
mod in_doubt;
mod passing_on;
mod retained;
mod root_guest;
mod schedules;
mod sharing;
mod teardown;
