//! The judge: makes the calls, counts the checks, and says which one a backend broke.

use crate::testing::AttachIdentified as _;
use std::collections::HashSet;
use std::fmt::{Debug, Display};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use super::Snapshot;
use crate::{BackendError, DeviceLocator, ErrorKind, Transport};

/// How long one call may take. Longer than any deadline that a backend of ours sets itself.
const LONGEST_CALL: Duration = Duration::from_secs(120);

/// What a backend has shown by the time its suite ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// How many times a check was held against the backend.
    pub checks: usize,
    /// How many calls the checks required to succeed, and did.
    pub successes: usize,
}

pub(super) type Answer<T> = Result<T, BackendError>;

/// One run of a suite.
pub(super) struct Checks<'a> {
    contract: &'static str,
    snapshot: &'a dyn Snapshot,
    passed: Passed,
}

impl<'a> Checks<'a> {
    pub(super) fn of(contract: &'static str, snapshot: &'a dyn Snapshot) -> Self {
        Checks {
            contract,
            snapshot,
            passed: Passed {
                checks: 0,
                successes: 0,
            },
        }
    }

    /// Ends the suite.
    pub(super) fn passed(self) -> Passed {
        let Passed { checks, successes } = self.passed;
        assert!(
            successes > 0,
            "{}: the suite has proved nothing in {checks} checks",
            self.contract
        );
        self.passed
    }

    /// A call, whatever it answers: it must end, and must not panic.
    pub(super) async fn call<T>(
        &self,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> Answer<T> {
        let mut call = pin!(call);
        let guarded = poll_fn(|context| {
            let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context)));
            match polled {
                Ok(poll) => poll.map(Ok),
                Err(panic) => Poll::Ready(Err(BackendError::from_panic(panic))),
            }
        });
        match tokio::time::timeout(LONGEST_CALL, guarded).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(panic)) => self.broken("a backend never panics", format!("{what}: {panic}")),
            Err(_) => self.broken(
                "every call ends",
                format!("{what} took over {LONGEST_CALL:?}"),
            ),
        }
    }

    /// A call that must succeed.
    pub(super) async fn succeeds<T>(
        &mut self,
        check: &str,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> T {
        self.passed.checks += 1;
        match self.call(&what, call).await {
            Ok(value) => {
                self.passed.successes += 1;
                value
            }
            Err(error) => self.broken(check, format!("{what} answered {}: {error}", error.kind())),
        }
    }

    /// A call that must fail, with one of these kinds (any, if none is given), and change nothing.
    pub(super) async fn fails<T: Debug>(
        &mut self,
        check: &str,
        kinds: &[ErrorKind],
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) {
        self.passed.checks += 1;
        let before = self.snapshot.entries().await;
        match self.call(&what, call).await {
            Ok(value) => self.broken(check, format!("{what} succeeded with {value:?}")),
            Err(error) if !kinds.is_empty() && !kinds.contains(&error.kind()) => {
                self.broken(check, format!("{what} answered {}: {error}", error.kind()))
            }
            Err(_) => self.unchanged(check, what, &before).await,
        }
    }

    /// A call that may be answered in any way, but must change nothing.
    pub(super) async fn harmless<T>(
        &mut self,
        check: &str,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) {
        let before = self.snapshot.entries().await;
        // Which answer it was does not matter here.
        let _ = self.call(&what, call).await;
        self.unchanged(check, what, &before).await;
    }

    pub(super) fn holds(&mut self, check: &str, holds: bool, did: impl Display) {
        self.passed.checks += 1;
        if !holds {
            self.broken(check, did);
        }
    }

    /// What the tables show now.
    pub(super) async fn tables(&self) -> Vec<String> {
        self.snapshot.entries().await
    }

    pub(super) async fn unchanged(&mut self, check: &str, what: impl Display, before: &[String]) {
        self.passed.checks += 1;
        let now = self.tables().await;
        if now != before {
            let (gone, new) = (difference(before, &now), difference(&now, before));
            self.broken(
                check,
                format!("{what} left {new:?} more and {gone:?} less in the tables"),
            );
        }
    }

    pub(super) async fn changed(&mut self, check: &str, what: impl Display, before: &[String]) {
        self.holds(
            check,
            self.tables().await != before,
            format!("{what} changed nothing in the tables"),
        );
    }

    pub(super) fn broken(&self, check: &str, did: impl Display) -> ! {
        panic!("the {} broke the check \"{check}\": {did}", self.contract)
    }
}

fn difference(from: &[String], take: &[String]) -> Vec<String> {
    let take: HashSet<_> = take.iter().collect();
    from.iter()
        .filter(|line| !take.contains(line))
        .cloned()
        .collect()
}

/// Runs the futures at once, in one task, and gives what they answered in order.
pub(super) async fn at_once<T>(
    futures: impl IntoIterator<Item = impl Future<Output = T>>,
) -> Vec<T> {
    let mut running: Vec<_> = futures
        .into_iter()
        .map(|future| (Box::pin(future), None))
        .collect();
    poll_fn(|context| {
        for (future, answer) in running.iter_mut().filter(|(_, answer)| answer.is_none()) {
            if let Poll::Ready(value) = future.as_mut().poll(context) {
                *answer = Some(value);
            }
        }
        match running.iter().all(|(_, answer)| answer.is_some()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    running
        .into_iter()
        .filter_map(|(_, answer)| answer)
        .collect()
}

/// Locators of a transport with addresses that no device has: some make no sense, some are just
/// too big, some mean something to a shell, a path or a format string.
pub(super) fn hostile(scheme: &str) -> Vec<DeviceLocator> {
    let long = "9".repeat(DeviceLocator::MAX_LEN - scheme.len() - 1);
    [
        "-1",
        "4294967296",
        "18446744073709551616",
        "1/-1",
        "0/0/0/0",
        "1@2",
        "1@0+0",
        "0x10",
        "+1",
    ]
    .into_iter()
    .chain([
        "../../etc/passwd",
        "/dev/null",
        "%s%n",
        "$(reboot)",
        ";",
        "\"",
        &long,
    ])
    .map(|address| DeviceLocator::new(scheme, address).expect("visible ASCII is an address"))
    .collect()
}

/// A locator of a transport that nobody has.
pub(super) fn foreign() -> DeviceLocator {
    DeviceLocator::new("no-such-transport", 0).expect("a lower-case word is a transport")
}

/// Attaches disks that the suite of another contract works on.
pub(super) async fn attached(
    checks: &mut Checks<'_>,
    transport: &dyn Transport,
    disks: &[crate::Disk],
) -> Vec<DeviceLocator> {
    let mut locators = Vec::new();
    for disk in disks {
        let what = format!("attach of {disk}");
        let check = "the fixture's disks can be attached";
        locators.push(
            checks
                .succeeds(check, what, transport.attach_identified(disk))
                .await,
        );
    }
    locators
}

/// Targets that cannot be.
pub(super) fn impossible_targets() -> Vec<PathBuf> {
    let long = format!("/{}", "a".repeat(5_000));
    ["", "relative", "./relative", "/", "/nul\0byte", &long]
        .into_iter()
        .map(PathBuf::from)
        .collect()
}
