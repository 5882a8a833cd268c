//! GCS, the protocol of Hyper-V's guests, both ends.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod agents_of_2026;
#[path = "../shared/conformance.rs"]
mod conformance;
mod foreign_guests;
mod foreign_hosts;
mod frames;
mod golden;
#[path = "../shared/harness.rs"]
mod harness;
#[path = "../shared/hostile_frames.rs"]
mod hostile_frames;
mod ledger;
#[path = "../shared/lone_failures.rs"]
mod lone_failures;
#[path = "../shared/lost_connection.rs"]
mod lost_connection;
mod negotiation;
mod numbers_and_notifications;
#[path = "../shared/recorder.rs"]
mod recorder;
#[path = "../shared/schedules.rs"]
mod schedules;
#[path = "../shared/slow_peers.rs"]
mod slow_peers;
mod wire;
