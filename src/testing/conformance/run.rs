//! One run of a suite: makes the calls, counts the checks, and says which one a backend broke.

use std::collections::HashSet;
use std::fmt::{Debug, Display};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use super::check::{ATTACHABLE, ENDS, NOTHING_LEFT, PANICS, REMOVABLE};
use super::fixture::{Fault, Faults, GuestFixture, Snapshot};
use super::{Broken, Check, Contract, Passed};
use crate::testing::{AttachIdentified as _, VmStep};
use crate::{BackendError, DeviceLocator, Disk, ErrorKind, Transport};

/// How long one call may take. Longer than any deadline that a backend of ours sets itself.
const LONGEST_CALL: Duration = Duration::from_secs(120);

pub(super) type Answer<T> = Result<T, BackendError>;

/// What a step of a suite gives: the first check that does not hold ends the suite.
pub(super) type Held<T = ()> = Result<T, Broken>;

/// One run of a suite.
pub(super) struct Run<'a> {
    contract: &'static Contract,
    snapshot: &'a dyn Snapshot,
    faults: Option<&'a dyn Faults>,
    checks: usize,
    successes: usize,
    held: HashSet<Check>,
}

impl<'a> Run<'a> {
    pub(super) fn of(
        contract: &'static Contract,
        snapshot: &'a dyn Snapshot,
        faults: Option<&'a dyn Faults>,
    ) -> Self {
        Run {
            contract,
            snapshot,
            faults,
            checks: 0,
            successes: 0,
            held: HashSet::new(),
        }
    }

    /// Ends the suite, which must have left the tables as they were before it.
    pub(super) async fn end(mut self, before: &[String]) -> Held<Passed> {
        self.unchanged(NOTHING_LEFT, "the suite", before).await?;
        // Every call was held against these.
        self.held.extend([PANICS, ENDS]);
        let not_run = self.contract.checks.iter().copied();
        Ok(Passed {
            checks: self.checks,
            successes: self.successes,
            not_run: not_run.filter(|check| !self.held.contains(check)).collect(),
        })
    }

    /// Makes the next call of a step end in a fault; not all fixtures can.
    pub(super) async fn inject(&self, step: VmStep, fault: Fault) -> bool {
        match self.faults {
            Some(faults) => faults.inject(step, fault).await,
            None => false,
        }
    }

    /// From now on, calls end as they would.
    pub(super) async fn clear(&self) {
        if let Some(faults) = self.faults {
            faults.clear().await;
        }
    }

    /// A call, whatever it answers: it must end, and must not panic.
    pub(super) async fn call<T>(
        &self,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> Held<Answer<T>> {
        let mut call = pin!(call);
        let guarded = poll_fn(|context| {
            let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context)));
            match polled {
                Ok(poll) => poll.map(Ok),
                Err(panic) => Poll::Ready(Err(BackendError::from_panic(panic))),
            }
        });
        match tokio::time::timeout(LONGEST_CALL, guarded).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(panic)) => Err(self.broken(PANICS, format!("{what}: {panic}"))),
            Err(_) => Err(self.broken(ENDS, format!("{what} took over {LONGEST_CALL:?}"))),
        }
    }

    /// A call that must succeed.
    pub(super) async fn succeeds<T>(
        &mut self,
        check: Check,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> Held<T> {
        let answer = self.call(&what, call).await?;
        let value = self.answered(check, what, answer)?;
        self.successes += 1;
        Ok(value)
    }

    /// An answer that must be a success.
    pub(super) fn answered<T>(
        &mut self,
        check: Check,
        what: impl Display,
        answer: Answer<T>,
    ) -> Held<T> {
        self.count(check);
        answer.map_err(|error| {
            let kind = error.kind();
            self.broken(check, format!("{what} answered {kind}: {error}"))
        })
    }

    /// A call that must fail, with one of these kinds (any, if none is given), and change nothing.
    pub(super) async fn fails<T: Debug>(
        &mut self,
        check: Check,
        kinds: &[ErrorKind],
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> Held {
        let before = self.tables().await;
        match self.call(&what, call).await? {
            Ok(value) => Err(self.broken(check, format!("{what} succeeded with {value:?}"))),
            Err(error) if !kinds.is_empty() && !kinds.contains(&error.kind()) => {
                let kind = error.kind();
                Err(self.broken(check, format!("{what} answered {kind}: {error}")))
            }
            Err(_) => self.unchanged(check, what, &before).await,
        }
    }

    /// A call that may be answered in any way, but must change nothing.
    pub(super) async fn harmless<T>(
        &mut self,
        check: Check,
        what: impl Display,
        call: impl Future<Output = Answer<T>>,
    ) -> Held {
        let before = self.tables().await;
        // Which answer it was does not matter here.
        let _ = self.call(&what, call).await?;
        self.unchanged(check, what, &before).await
    }

    /// A tear-down after the end of the VM.
    pub(super) async fn done_or_gone(
        &mut self,
        check: Check,
        what: impl Display,
        call: impl Future<Output = Answer<()>>,
    ) -> Held {
        let answer = match self.call(&what, call).await? {
            Err(error) if error.kind() == ErrorKind::Gone => Ok(()),
            answer => answer,
        };
        self.answered(check, what, answer)
    }

    pub(super) fn holds(&mut self, check: Check, holds: bool, did: impl Display) -> Held {
        self.count(check);
        match holds {
            true => Ok(()),
            false => Err(self.broken(check, did)),
        }
    }

    /// What the snapshot shows now.
    pub(super) async fn tables(&self) -> Vec<String> {
        self.snapshot.entries().await
    }

    pub(super) async fn unchanged(
        &mut self,
        check: Check,
        what: impl Display,
        before: &[String],
    ) -> Held {
        let now = self.tables().await;
        let (gone, new) = (difference(before, &now), difference(&now, before));
        let did = format!("{what} left {new:?} more and {gone:?} less in the tables");
        self.holds(check, now == before, did)
    }

    pub(super) async fn changed(
        &mut self,
        check: Check,
        what: impl Display,
        before: &[String],
    ) -> Held {
        let changed = self.tables().await != before;
        self.holds(
            check,
            changed,
            format!("{what} changed nothing in the tables"),
        )
    }

    fn count(&mut self, check: Check) {
        let contract = self.contract;
        assert!(
            contract.checks.contains(&check),
            "the table of the {} lacks the check \"{check}\"",
            contract.name
        );
        self.checks += 1;
        self.held.insert(check);
    }

    fn broken(&self, check: Check, did: impl Display) -> Broken {
        Broken {
            contract: self.contract.name,
            check,
            did: did.to_string(),
        }
    }

    /// Attaches disks that the suite of another contract works on.
    pub(super) async fn attached(
        &mut self,
        transport: &dyn Transport,
        disks: &[Disk],
    ) -> Held<Vec<DeviceLocator>> {
        let mut locators = Vec::new();
        for disk in disks {
            let attach = transport.attach_identified(disk);
            let what = format!("attach of {disk}");
            locators.push(self.succeeds(ATTACHABLE, what, attach).await?);
        }
        Ok(locators)
    }

    /// Takes disks out again, in reverse.
    pub(super) async fn take_out(
        &mut self,
        fixture: &GuestFixture,
        disks: &[Disk],
        locators: &[DeviceLocator],
    ) -> Held {
        for (disk, locator) in disks.iter().zip(locators).rev() {
            let unplug = fixture.unplugger.unplug(locator);
            let what = format!("unplug of {locator}");
            self.succeeds(REMOVABLE, what, unplug).await?;
            let detach = fixture.transport.detach(disk);
            let what = format!("detach of {disk}");
            self.succeeds(REMOVABLE, what, detach).await?;
        }
        Ok(())
    }

    /// Takes disks out of a VM that has ended.
    pub(super) async fn take_out_of_ended(
        &mut self,
        fixture: &GuestFixture,
        disks: &[Disk],
        locators: &[DeviceLocator],
    ) -> Held {
        for (disk, locator) in disks.iter().zip(locators).rev() {
            let unplug = fixture.unplugger.unplug(locator);
            let what = format!("unplug of {locator}");
            self.done_or_gone(REMOVABLE, what, unplug).await?;
            let detach = fixture.transport.detach(disk);
            let what = format!("detach of {disk}");
            self.done_or_gone(REMOVABLE, what, detach).await?;
        }
        Ok(())
    }
}

fn difference(from: &[String], take: &[String]) -> Vec<String> {
    let take: HashSet<_> = take.iter().collect();
    from.iter()
        .filter(|line| !take.contains(line))
        .cloned()
        .collect()
}
