//! Our own protocol, both ends.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod common;
mod conformance;
mod golden;
mod hostile_frames;
mod lone_failures;
mod lost_connection;
mod negotiation;
mod schedules;
mod slow_peers;
