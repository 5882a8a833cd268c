//! Our own protocol, both ends.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

#[path = "../shared/conformance.rs"]
mod conformance;
mod golden;
#[path = "../shared/harness.rs"]
mod harness;
#[path = "../shared/hostile_frames.rs"]
mod hostile_frames;
#[path = "../shared/lone_failures.rs"]
mod lone_failures;
#[path = "../shared/lost_connection.rs"]
mod lost_connection;
mod negotiation;
#[path = "../shared/recorder.rs"]
mod recorder;
#[path = "../shared/schedules.rs"]
mod schedules;
#[path = "../shared/slow_peers.rs"]
mod slow_peers;
mod whole_values;
mod wire;
