//! Lists of mounts performed on loop devices.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod activations;
mod fuzz;
mod golden;
mod kit;
#[path = "../../../../tests/common/merged_erofs.rs"]
mod merged_erofs;
mod socket;
mod vms;
