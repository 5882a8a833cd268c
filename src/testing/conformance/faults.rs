//! The checks of what a backend does after a fault, for a set-up and its tear-down.

use std::future::Future;
use std::time::Duration;

use futures_util::future::{BoxFuture, join};

use super::Check;
use super::fixture::Fault;
use super::run::{Answer, Held, Run};
use crate::ErrorKind;
use crate::testing::VmStep;

/// How long a caller waits for a call that is held before it gives up.
const GIVE_UP: Duration = Duration::from_millis(100);

/// How long the tables must stay as they are for a late call to count as over.
const SETTLE: Duration = Duration::from_millis(300);

/// How often a tear-down is repeated while an earlier call for its key is still under way.
const REPEATS: usize = 20;

/// A set-up and its tear-down, for one key.
pub(super) struct Pair<'a> {
    pub(super) up: (VmStep, &'a Call<'a>),
    pub(super) down: (VmStep, &'a Call<'a>),
    pub(super) checks: PairChecks,
}

pub(super) type Call<'a> = dyn Fn() -> BoxFuture<'a, Answer<()>> + Send + Sync + 'a;

/// The names under which the checks of a pair are reported.
#[derive(Clone, Copy)]
pub(super) struct PairChecks {
    /// The set-up succeeds without a fault.
    pub(super) up: Check,
    /// A set-up that got no answer is `Uncertain`, or another error and leaves nothing.
    pub(super) unanswered: Check,
    /// The tear-down after a set-up in doubt succeeds and leaves nothing.
    pub(super) doubt: Check,
    /// A tear-down that is `Busy` changes nothing.
    pub(super) busy: Check,
    /// A tear-down that failed can be repeated and then leaves nothing.
    pub(super) repeat: Check,
    /// A set-up that was given up has no effect after the tear-down that follows it.
    pub(super) late: Check,
}

impl Pair<'_> {
    pub(super) async fn check(&self, run: &mut Run<'_>) -> Held {
        for happens in [false, true] {
            self.set_up_in_doubt(run, happens).await?;
            self.tear_down_in_doubt(run, happens).await?;
        }
        self.busy(run).await?;
        self.late(run).await
    }

    async fn set_up_in_doubt(&self, run: &mut Run<'_>, happens: bool) -> Held {
        let before = run.tables().await;
        if !run.inject(self.up.0, Fault::Uncertain { happens }).await {
            return Ok(());
        }
        let what = format!("{} without an answer", self.up.0);
        let answer = run.call(&what, self.up.1()).await?;
        run.clear().await;
        match answer {
            Err(error) if error.kind() != ErrorKind::Uncertain => {
                let what = format!("{what} answered {error} and");
                return run.unchanged(self.checks.unanswered, what, &before).await;
            }
            _ => run.holds(self.checks.unanswered, true, what)?,
        }
        self.torn_down(run, self.checks.doubt, &before).await
    }

    async fn tear_down_in_doubt(&self, run: &mut Run<'_>, happens: bool) -> Held {
        let before = run.tables().await;
        self.set_up(run).await?;
        if run.inject(self.down.0, Fault::Uncertain { happens }).await {
            let what = format!("{} without an answer", self.down.0);
            // The backend may have found out by itself; the next call is a repeated one all the same.
            let _ = run.call(&what, self.down.1()).await?;
            run.clear().await;
        }
        self.torn_down(run, self.checks.repeat, &before).await
    }

    async fn busy(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        self.set_up(run).await?;
        if run.inject(self.down.0, Fault::Busy).await {
            let what = format!("{} while busy", self.down.0);
            let busy = run
                .fails(self.checks.busy, &[ErrorKind::Busy], what, self.down.1())
                .await;
            run.clear().await;
            busy?;
        }
        self.torn_down(run, self.checks.repeat, &before).await
    }

    async fn late(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        if !run.inject(self.up.0, Fault::Held).await {
            return Ok(());
        }
        give_up(self.up.1()).await;
        tear_down_behind(run, self.checks.late, self.down.0, self.down.1).await?;
        let what = format!("{} after a late {}", self.down.0, self.up.0);
        run.unchanged(self.checks.late, &what, &before).await?;
        settle().await;
        run.unchanged(self.checks.late, what, &before).await
    }

    async fn set_up(&self, run: &mut Run<'_>) -> Held {
        run.succeeds(self.checks.up, self.up.0, self.up.1()).await
    }

    async fn torn_down(&self, run: &mut Run<'_>, check: Check, before: &[String]) -> Held {
        run.succeeds(check, self.down.0, self.down.1()).await?;
        run.unchanged(check, self.down.0, before).await
    }
}

/// Starts a call that is held, and drops it after a while.
pub(super) async fn give_up<T>(call: impl Future<Output = Answer<T>>) {
    // An answer in time is as good: the backend gave up by itself.
    let _ = tokio::time::timeout(GIVE_UP, call).await;
}

/// Time for a late call to have its effect.
pub(super) async fn settle() {
    tokio::time::sleep(SETTLE).await;
}

/// Makes a tear-down that must succeed behind a call that is held until a while after it began. As
/// callers do, it is repeated after an error.
pub(super) async fn tear_down_behind(
    run: &mut Run<'_>,
    check: Check,
    step: VmStep,
    call: &Call<'_>,
) -> Held {
    let what = format!("{step} behind a call that was given up");
    let release = async {
        tokio::time::sleep(GIVE_UP).await;
        run.clear().await;
    };
    let (answer, ()) = join(run.call(&what, call()), release).await;
    let mut answer = answer?;
    for _ in 1..REPEATS {
        if answer.is_ok() {
            break;
        }
        tokio::time::sleep(GIVE_UP).await;
        answer = run.call(&what, call()).await?;
    }
    run.answered(check, what, answer)
}
