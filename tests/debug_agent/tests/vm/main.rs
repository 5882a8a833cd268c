//! The whole way of disks into a real guest, and what can go wrong on it. Each test has a VM of its own, which is
//! restored from one saved state.
// A panic in a test is its failure message, in its helpers too; and each file uses a part of the common ones.
#![allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::unwrap_used
)]

mod rig;

mod combinations;
mod crypt;
mod devices;
mod disks;
mod exercise;
mod failure;
mod filesystems;
mod gcs;
mod life;
mod luks;
mod migration;
mod restart;
mod sharing;
mod teardown;
mod verity;
mod views;
mod volumes;
mod vpmem;
