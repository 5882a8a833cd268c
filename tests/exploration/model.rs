//! The manager against a model of it: maps of counts, and a rule for each request.
//!
//! Requests come one after the other, with faults of single calls, lines to the guest that are lost, VMs that end, and
//! processes that end and are followed by another. After each one the answer, the number of calls of each kind, what is
//! in use and where everything is must be as the model predicts. The last act of each case is a restart.

mod real;
mod reference;
mod requests;

use self::real::Real;
use std::time::Duration;

use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, HolderName};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use proptest_state_machine::prop_state_machine;

const SLOTS: usize = 3;
const DISKS: usize = 4;
/// Another name of disk 0.
const ALIAS: usize = DISKS;

const OPTIONS: [&[&str]; 5] = [
    &["ro"],
    &["noatime", "ro"],
    &["ro", "data=x"],
    &["ro", "sync"],
    &["rw"],
];
const WRITABLE: usize = 4;
/// Which readers agree on the filesystem's options; a writer agrees with nobody.
const SUPERBLOCK: [Option<u8>; 5] = [Some(0), Some(0), Some(1), Some(2), None];

/// As asked for, and in the one form that a path has; `None` if it is no target at all.
const TARGETS: [(&str, Option<&str>); 6] = [
    ("/a", Some("/a")),
    ("/a/b", Some("/a/b")),
    ("//c/.", Some("/c")),
    ("/s", Some("/s")),
    ("relative", None),
    ("/x/../y", None),
];
const SCRATCH_TARGET: usize = 3;
const TREES: [(&str, Option<&str>); 4] = [
    ("/t", Some("/t")),
    ("/a/b", Some("/a/b")),
    ("/s/tree", Some("/s/tree")),
    ("t", None),
];

type Kinds = Vec<ErrorKind>;
type MountKey = (usize, usize);

/// A request, or a fault of the next call of a step.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Attach {
        name: usize,
        read_only: bool,
    },
    Add {
        name: usize,
        read_only: bool,
        options: usize,
        target: Option<usize>,
    },
    Stack {
        layers: Vec<MountKey>,
        scratch: Option<(usize, bool)>,
        tree: usize,
    },
    Release(usize),
    Drop(usize),
    Retry(usize),
    Drain,
    /// The time of all that lingers is over.
    Wait,
    Fault(VmStep, Gate),
    /// From now on no call of the guest is answered, whether it happens or not.
    LoseLine {
        happened: bool,
    },
    /// The guest answers again.
    MendLine,
    EndVm,
    /// The process ends, and the next one recovers. Of the holders with a name those come back whose bit is set; nobody
    /// else does. A VM that has ended is replaced.
    Restart {
        back: u64,
    },
}

/// What the caller is told.
#[derive(Debug, Clone, PartialEq, Default)]
enum Said {
    #[default]
    Nothing,
    Got,
    /// One of these: of several layers that fail at once, any may be the first.
    Refused(Kinds),
    Released(Kinds),
    Drained(Kinds, usize),
}

/// How long what was released is kept: longer than a case takes.
const LINGER: Duration = Duration::from_secs(2_000);

/// The calls that a lost line cuts off.
fn is_in_guest(step: VmStep) -> bool {
    use VmStep::{Combine, Mount, Separate, Unmount, Unplug};
    matches!(step, Mount | Combine | Separate | Unmount | Unplug)
}

/// Three of four handles have a name, by which they are claimed after a restart.
fn name_of(request: u32) -> Option<HolderName> {
    let name = || HolderName::new(format!("holder {request}")).unwrap();
    (!request.is_multiple_of(4)).then(name)
}

fn sorted(mut kinds: Kinds) -> Kinds {
    kinds.sort_by_key(|kind| kind.to_string());
    kinds
}

/// The same cases each time, so that a failure is one of the change at hand; others by
/// `PROPTEST_RNG_SEED` and `PROPTEST_CASES`.
fn config() -> ProptestConfig {
    let given = ProptestConfig::default();
    ProptestConfig {
        cases: if given.cases == 256 {
            1_500
        } else {
            given.cases
        },
        rng_seed: match given.rng_seed {
            RngSeed::Random => RngSeed::Fixed(1),
            fixed => fixed,
        },
        // They grow with the number of cases.
        max_local_rejects: u32::MAX,
        failure_persistence: None,
        ..given
    }
}

prop_state_machine! {
    #![proptest_config(config())]

    #[test]
    fn the_manager_is_as_its_model(sequential 1..40 => Real);
}
