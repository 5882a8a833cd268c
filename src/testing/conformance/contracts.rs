//! The suites by name.

use super::check::Contract;
use super::{binder, combiner, mounter, resolver, transport, unplugger};

/// Every contract that has a suite.
pub const CONTRACTS: [&Contract; 6] = [
    &transport::CONTRACT,
    &resolver::CONTRACT,
    &unplugger::CONTRACT,
    &mounter::CONTRACT,
    &combiner::CONTRACT,
    &binder::CONTRACT,
];
