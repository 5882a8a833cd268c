//! The checks by name, and what a suite says in the end.

use std::fmt;

/// One rule of a contract, by the name that a suite reports it under.
///
/// Only the tables of the suites make one, so that no check is missing in [`CONTRACTS`](super::CONTRACTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Check(pub(super) &'static str);

impl Check {
    /// The rule as a sentence.
    pub fn name(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A contract and all checks of its suite.
#[derive(Debug)]
pub struct Contract {
    /// `transport`, `resolver`, `unplugger`, `mounter`, `combiner` or `binder`.
    pub name: &'static str,
    /// The checks, in the order of the suite's table.
    pub checks: &'static [Check],
}

/// What a backend has shown by the time its suite ends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Passed {
    /// How many times a check was held against the backend.
    pub checks: usize,
    /// How many calls the checks required to succeed, and did.
    pub successes: usize,
    /// The checks that were not run, because the fixture lacks what they need: a capacity, a scratch
    /// disk, a fault.
    pub not_run: Vec<Check>,
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Passed {
            checks,
            successes,
            not_run,
        } = self;
        write!(f, "{checks} checks held, {successes} calls succeeded")?;
        for check in not_run {
            write!(f, "\n  not run: {check}")?;
        }
        Ok(())
    }
}

/// A check that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Broken {
    /// The name of the contract.
    pub contract: &'static str,
    /// The check.
    pub check: Check,
    /// What the backend did.
    pub did: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Broken {
            contract,
            check,
            did,
        } = self;
        write!(f, "the {contract} broke the check \"{check}\": {did}")
    }
}

impl std::error::Error for Broken {}

/// Declares the checks of a contract: a constant for each, and `CONTRACT` with all of them and those
/// that every contract has.
macro_rules! contract {
    ($contract:literal $($shared:ident)* { $($name:ident = $check:literal;)* }) => {
        $(const $name: $crate::testing::conformance::check::Check =
            $crate::testing::conformance::check::Check($check);)*

        pub(super) static CONTRACT: $crate::testing::conformance::check::Contract =
            $crate::testing::conformance::check::Contract {
                name: $contract,
                checks: &[
                    $($name,)*
                    $($crate::testing::conformance::check::$shared,)*
                    $crate::testing::conformance::check::PANICS,
                    $crate::testing::conformance::check::ENDS,
                    $crate::testing::conformance::check::NOTHING_LEFT,
                ],
            };
    };
}

pub(super) use contract;

pub(super) const PANICS: Check = Check("a backend never panics");
pub(super) const ENDS: Check = Check("every call ends");
pub(super) const NOTHING_LEFT: Check = Check("a suite leaves nothing behind");
pub(super) const ATTACHABLE: Check = Check("the fixture's disks can be attached");
pub(super) const REMOVABLE: Check = Check("the fixture's disks can be taken out after the suite");
