//! The managers over a VM in memory, danger by danger.
//!
//! One program, since each of several would compile the managers for that VM anew.

// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod cancellation;
mod conflict;
mod devices;
mod failure;
mod fake_vm;
mod inspect;
mod lingering;
mod locators;
mod lost_writes;
mod pending;
mod sharing;
mod stacks;
mod teardown;
mod views;
mod volumes;
