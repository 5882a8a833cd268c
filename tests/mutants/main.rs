//! The conformance suite, tested by mutants: for each check a backend that breaks just that one.
//!
//! Run with `--nocapture` for the table of mutants and the checks that caught them.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

mod binder;
mod combiner;
mod mounter;
mod resolver;
#[path = "../common/suite.rs"]
mod suite;
mod transport;
mod unplugger;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::{Broken, CONTRACTS, GuestFixture, Passed, TransportFixture};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Presence, Transport};

/// A fake VM that breaks one rule.
#[derive(Clone)]
struct Mutant<B> {
    vm: FakeVm,
    bug: B,
    memory: Memory,
}

/// What a mutant needs to know to be wrong at the right moment.
#[derive(Clone, Default)]
struct Memory {
    /// Lines that it shows in the tables beside the fake VM's.
    left: Arc<Mutex<Vec<String>>>,
    calls: Arc<AtomicUsize>,
    /// Something happened that makes the next call wrong.
    spoilt: Arc<AtomicBool>,
    /// Keys that it had up once.
    seen: Arc<Mutex<BTreeSet<String>>>,
}

/// What every contract has a mutant of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Everywhere {
    Correct,
    LeavesSomethingBehindAtTheEnd,
    HasDisksThatCannotBeAttached,
    HasDisksThatCannotBeDetached,
}

use Everywhere::*;

impl<B> Mutant<B> {
    fn new(vm: FakeVm, bug: B) -> Self {
        Mutant {
            vm,
            bug,
            memory: Memory::default(),
        }
    }
}

impl Memory {
    fn leave(&self) {
        self.left.lock().unwrap().push("a leftover".to_owned());
    }

    fn spoil(&self) {
        self.spoilt.store(true, SeqCst);
    }

    fn mend(&self) {
        self.spoilt.store(false, SeqCst);
    }

    fn is_spoilt(&self) -> bool {
        self.spoilt.load(SeqCst)
    }

    /// How many calls this was told of before.
    fn count(&self) -> usize {
        self.calls.fetch_add(1, SeqCst)
    }

    fn see(&self, key: &dyn ToString) {
        self.seen.lock().unwrap().insert(key.to_string());
    }

    fn has_seen(&self, key: &dyn ToString) -> bool {
        self.seen.lock().unwrap().contains(&key.to_string())
    }
}

fn wrong<T>() -> Result<T, BackendError> {
    Err(BackendError::other("wrong on purpose"))
}

/// Panics without the message of the panic hook.
fn panics() -> ! {
    resume_unwind(Box::new("wrong on purpose"))
}

/// What a mutant does below this path is in no table.
const HIDDEN: &str = "/hidden";

/// A snapshot of the VM and the mutant's leftovers, which may show one more line from the n-th look.
fn tables(
    vm: &FakeVm,
    memory: &Memory,
    looks: &Arc<AtomicUsize>,
    one_more_from: usize,
) -> impl Fn() -> Vec<String> + Send + Sync + 'static {
    let (vm, memory, looks) = (vm.clone(), memory.clone(), looks.clone());
    move || {
        let mut lines = vm.left();
        lines.retain(|line| !line.starts_with(HIDDEN));
        lines.extend(memory.left.lock().unwrap().iter().cloned());
        if looks.fetch_add(1, SeqCst) + 1 >= one_more_from {
            lines.push("a late leftover".to_owned());
        }
        lines
    }
}

/// The transport of a guest's fixture: it fails as it is told.
struct FixtureTransport(FakeVm, Everywhere);

#[async_trait]
impl Transport for FixtureTransport {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        match self.1 {
            HasDisksThatCannotBeAttached => wrong(),
            _ => self.0.attach(disk, id).await,
        }
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let blank = disk.source().ends_with("blank");
        match self.1 {
            HasDisksThatCannotBeDetached if !blank => wrong(),
            _ => self.0.detach(disk).await,
        }
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.0.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        self.0.adopt(disk, id, locator).await
    }
}

type Outcome = Result<Passed, Broken>;

/// One mutant: its name, the check that must catch it, and what the suite said.
struct Tried {
    name: String,
    check: &'static str,
    outcome: Outcome,
}

/// A contract's mutants, each run over a VM of its own with the clock paused.
fn try_all<B: Debug + Copy, F: Future<Output = Outcome>>(
    mutants: &[(B, &'static str)],
    everywhere: &[(Everywhere, &'static str)],
    correct: B,
    run: impl Fn(B, Everywhere, Arc<AtomicUsize>, usize) -> F,
) -> Vec<Tried> {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };
    let looks = Arc::new(AtomicUsize::new(0));
    let all = usize::MAX;
    let passed = runtime().block_on(run(correct, Correct, looks.clone(), all));
    let passed = passed.expect("a correct backend passes");
    assert_eq!(passed.not_run, [], "the fixture is complete");
    let last = looks.load(SeqCst);
    let own = mutants.iter().map(|(bug, check)| Tried {
        name: format!("{bug:?}"),
        check,
        outcome: runtime().block_on(run(*bug, Correct, Arc::default(), all)),
    });
    let shared = everywhere.iter().map(|(bug, check)| {
        let from = match bug {
            LeavesSomethingBehindAtTheEnd => last,
            _ => all,
        };
        Tried {
            name: format!("{bug:?}"),
            check,
            outcome: runtime().block_on(run(correct, *bug, Arc::default(), from)),
        }
    });
    own.chain(shared).collect()
}

const OF_EVERY_SUITE: [(Everywhere, &str); 1] = [(
    LeavesSomethingBehindAtTheEnd,
    "a suite leaves nothing behind",
)];

const OF_GUESTS: [(Everywhere, &str); 3] = [
    OF_EVERY_SUITE[0],
    (
        HasDisksThatCannotBeAttached,
        "the fixture's disks can be attached",
    ),
    (
        HasDisksThatCannotBeDetached,
        "the fixture's disks can be taken out after the suite",
    ),
];

fn transport_fixture(
    vm: &FakeVm,
    memory: &Memory,
    looks: &Arc<AtomicUsize>,
    from: usize,
) -> TransportFixture {
    suite::transport_fixture(vm, vm.clone(), tables(vm, memory, looks, from))
}

fn guest_fixture(
    vm: &FakeVm,
    memory: &Memory,
    everywhere: Everywhere,
    looks: &Arc<AtomicUsize>,
    from: usize,
) -> GuestFixture {
    let transport = FixtureTransport(vm.clone(), everywhere);
    suite::guest_fixture(vm, transport, vm.clone(), tables(vm, memory, looks, from))
}

#[test]
fn each_check_catches_the_mutant_that_breaks_it() {
    let tried = [
        ("transport", transport::try_all()),
        ("resolver", resolver::try_all()),
        ("unplugger", unplugger::try_all()),
        ("mounter", mounter::try_all()),
        ("combiner", combiner::try_all()),
        ("binder", binder::try_all()),
    ];
    let mut missed = Vec::new();
    for (contract, tried) in &tried {
        for Tried {
            name,
            check,
            outcome,
        } in tried
        {
            let said = match outcome {
                Err(broken) if broken.contract == *contract && broken.check.name() == *check => {
                    println!("{contract:<10} {name:<36} {check}");
                    continue;
                }
                Err(broken) => broken.to_string(),
                Ok(passed) => format!("it passed: {passed}"),
            };
            missed.push(format!(
                "{contract} {name} must break \"{check}\", but {said}"
            ));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
    for contract in CONTRACTS {
        let (_, tried) = tried
            .iter()
            .find(|(name, _)| *name == contract.name)
            .unwrap();
        for check in contract.checks {
            let caught = tried.iter().any(|tried| tried.check == check.name());
            assert!(
                caught,
                "no mutant of the {} breaks \"{check}\"",
                contract.name
            );
        }
    }
}
