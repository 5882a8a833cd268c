//! The managers in more states than anybody would write down: every way in which a call can end, random schedules, and a
//! model that each answer is compared with.

#![allow(
    clippy::unwrap_used,
    reason = "a panic here is the message of a failure"
)]

mod gates;
mod harness;
mod model;
mod schedules;
