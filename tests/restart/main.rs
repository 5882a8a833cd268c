//! A manager whose process ends at any moment, and the next one that recovers.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod abandoned;
#[path = "../common/mod.rs"]
mod common;
mod contradictions;
mod every_point;
mod freeze;
mod process;
mod random;
mod recovery;
