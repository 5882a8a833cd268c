//! How layers share a device: their ranges, and how many fit beside the allocator used before.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

mod filling;
mod four_way_split;
mod golden;
mod ranges;

use filling::{Leaving, compare};

/// In every one of the sequences, and in half of them by far.
fn holds_more(leaving: Leaving) {
    let found = compare(10_000, leaving);
    assert!(found.lowest_ratio >= 1.0, "{}", found.lowest_ratio);
    assert!(found.ratio >= 1.5, "{}", found.ratio);
    let of_medians = found.ours as f64 / found.baseline as f64;
    assert!(of_medians >= 1.5, "{} / {}", found.ours, found.baseline);
    assert!(found.unused < 0.15, "{}", found.unused);
    assert!(found.baseline_unused > 0.4, "{}", found.baseline_unused);
}

#[test]
fn v09_a_device_holds_more_layers_than_with_the_four_way_split() {
    holds_more(Leaving::No);
}

#[test]
fn v09_a_device_holds_more_layers_also_when_some_leave() {
    holds_more(Leaving::TwoInFive);
}
