//! A manager whose process ends at any moment, and the next one that recovers.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

#[path = "../common/mod.rs"]
mod common;
mod every_point;
mod freeze;
mod process;
mod random;
mod recovery;
