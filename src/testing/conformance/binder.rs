//! The checks of a binder.

use std::path::{Path, PathBuf};

use super::check::contract;
use super::faults::{Pair, PairChecks};
use super::fixture::{Fault, GuestFixture, Successor};
use super::hostile::impossible_targets;
use super::run::{Held, Run};
use super::{Broken, Passed};
use crate::ErrorKind::{Busy, Conflict, NotFound, Unsuitable};
use crate::testing::VmStep;
use crate::testing::names::MISSING;
use crate::{BindMount, Binder, IdMap, IdRange, Mounter, Presence, ViewOptions};

contract! { "binder" ATTACHABLE REMOVABLE {
    MOUNT = "the fixture's disks can be mounted";
    UNMOUNT = "a mount can be unmounted after its views";
    UNBIND_ABSENT = "unbinding what was never bound succeeds";
    NO_SOURCE = "a view of what is not mounted is not found and leaves nothing";
    NO_DIRECTORY = "a view of a directory that is not there is not found and leaves nothing";
    TARGET = "a target that cannot be is refused and leaves nothing";
    UNBIND_TARGET = "unbinding a target that cannot be changes nothing";
    BIND = "a mount can be shown at a further place";
    BIND_SHOWS = "binding shows in the tables";
    TAKEN = "a taken target is a conflict and what is there stays as it was";
    OPTIONS = "options of a view are honoured, or unsuitable and nothing is left";
    SHOWN = "a mount that is shown is busy and stays as it was";
    ALONE = "unbinding a view touches no other view of its mount";
    UNBIND = "unbinding leaves nothing";
    UNBIND_TWICE = "unbinding twice succeeds";
    UNANSWERED = "a bind without an answer is uncertain or leaves nothing";
    DOUBT = "unbinding after a bind in doubt succeeds and leaves nothing";
    BUSY = "a view that is busy stays as it was";
    REPEAT = "an unbind that failed can be repeated and leaves nothing";
    LATE = "a bind that was given up has no effect after the unbind";
    ADOPT = "a view that an earlier process made is present";
    ADOPT_UNBIND = "an adopted view can be unbound and leaves nothing";
    ADOPT_ABSENT = "a target with nothing, with a mount or with another view is absent and stays as it was";
    GONE = "an unbind after the end of the VM is done or gone, and leaves nothing";
}}

/// Runs a [`Binder`] through its checks, over mounts that a mounter of the same guest makes:
///
/// - unbind of a target where nothing was bound succeeds and changes nothing
/// - a mount can be shown at further places, which shows in the snapshot; unbind leaves nothing, not even a directory that
///   was made, succeeds a second time, and touches no other view; the target can be used again
/// - while there is a view of a mount, unmounting it is `Busy`
/// - options of a view, an id map among them, are honoured or `Unsuitable`
/// - a taken target is `Conflict`, and what is there is intact
/// - a source that is not mounted is `NotFound`, and so is a directory that a mount does not have; a target that makes no sense
///   fails: each leaves nothing
/// - with a successor: a view that an earlier process made is present, can be unbound, and is absent for another mount or
///   other options
/// - with faults: an unbind after a bind in doubt leaves nothing; after `Busy` the view is as before, and after any error the
///   unbind can be repeated; a bind that was given up has no effect after the unbind that follows it; after the end of
///   the VM an unbind is done
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn binder(binder: &dyn Binder, mounter: &dyn Mounter, fixture: &GuestFixture) -> Passed {
    match try_binder(binder, mounter, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`binder()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_binder(
    binder: &dyn Binder,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
) -> Result<Passed, Broken> {
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;
    let disks = fixture.two_disks();
    let locators = run.attached(&*fixture.transport, disks).await?;
    let with_devices = run.tables().await;
    let mounts = ["one", "other"].map(|name| fixture.directory.join(name));
    for (device, target) in locators.iter().zip(&mounts) {
        let mount = mounter.mount(device, target, &fixture.options);
        run.succeeds(MOUNT, format!("mount of {device}"), mount)
            .await?;
    }
    let suite = Suite {
        binder,
        mounter,
        fixture,
        mounts: &mounts,
    };
    suite.refused(&mut run).await?;
    suite.impossible(&mut run).await?;
    suite.round_trips(&mut run).await?;
    suite.options(&mut run).await?;
    suite.several(&mut run).await?;
    suite.after_faults(&mut run).await?;
    if let Some(next) = &fixture.next_binder {
        suite.adopt(&mut run, next).await?;
    }
    if run.inject(VmStep::Unbind, Fault::Gone).await {
        suite.gone(&mut run).await?;
        run.take_out_of_ended(fixture, disks, &locators).await?;
    } else {
        for target in mounts.iter().rev() {
            let what = format!("unmount of {}", target.display());
            run.succeeds(UNMOUNT, what, mounter.unmount(target)).await?;
        }
        run.unchanged(UNMOUNT, "unmounting them", &with_devices)
            .await?;
        run.take_out(fixture, disks, &locators).await?;
    }
    run.end(&before).await
}

struct Suite<'a> {
    binder: &'a dyn Binder,
    mounter: &'a dyn Mounter,
    fixture: &'a GuestFixture,
    /// Where the two disks are mounted.
    mounts: &'a [PathBuf; 2],
}

impl Suite<'_> {
    fn target(&self, name: &str) -> PathBuf {
        self.fixture.directory.join(name)
    }

    /// A view of the first mount.
    fn view(&self, name: &str) -> BindMount {
        BindMount::new(&self.mounts[0], self.target(name), ViewOptions::default())
    }

    async fn bind(&self, run: &mut Run<'_>, bind: &BindMount) -> Held {
        let before = run.tables().await;
        let what = shown(bind);
        run.succeeds(BIND, &what, self.binder.bind(bind)).await?;
        run.changed(BIND_SHOWS, &what, &before).await
    }

    /// Unbinds a view, back to the tables from before it.
    async fn unbind(&self, run: &mut Run<'_>, target: &Path, before: &[String]) -> Held {
        let what = format!("unbind of {}", target.display());
        for check in [UNBIND, UNBIND_TWICE] {
            run.succeeds(check, &what, self.binder.unbind(target))
                .await?;
            run.unchanged(check, &what, before).await?;
        }
        Ok(())
    }

    async fn refused(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        let target = self.target("refused");
        let unbind = self.binder.unbind(&target);
        run.succeeds(UNBIND_ABSENT, "unbind", unbind).await?;
        run.unchanged(UNBIND_ABSENT, "unbind", &before).await?;

        let absent = self.target("absent");
        let absent = BindMount::new(absent, &target, ViewOptions::default());
        let bind = self.binder.bind(&absent);
        run.fails(NO_SOURCE, &[NotFound], shown(&absent), bind)
            .await?;

        let mut below = self.view("refused");
        below.options = below
            .options
            .with_subpath(MISSING)
            .expect("a name is a plain path");
        let bind = self.binder.bind(&below);
        let what = format!("{} of directory {MISSING}", shown(&below));
        run.fails(NO_DIRECTORY, &[NotFound], what, bind).await
    }

    async fn impossible(&self, run: &mut Run<'_>) -> Held {
        for target in impossible_targets() {
            let path: String = target.display().to_string().chars().take(40).collect();
            let bind = BindMount::new(&self.mounts[0], &target, ViewOptions::default());
            let what = format!("bind at {path:?}");
            run.fails(TARGET, &[], what, self.binder.bind(&bind))
                .await?;
            let unbind = self.binder.unbind(&target);
            run.harmless(UNBIND_TARGET, format!("unbind of {path:?}"), unbind)
                .await?;
        }
        Ok(())
    }

    async fn round_trips(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        // The second round is the check that a target can be used again.
        for name in ["view", "view", "made/for/it"] {
            let view = self.view(name);
            self.bind(run, &view).await?;
            let mut of_other = view.clone();
            of_other.source.clone_from(&self.mounts[1]);
            for taken in [&view, &of_other] {
                let what = format!("{} at a taken target", shown(taken));
                let bind = self.binder.bind(taken);
                run.fails(TAKEN, &[Conflict], what, bind).await?;
            }
            self.unbind(run, &view.target, &before).await?;
        }
        let mut over = self.view("view");
        over.target.clone_from(&self.mounts[1]);
        let (what, bind) = ("bind at a mount's own path", self.binder.bind(&over));
        run.fails(TAKEN, &[Conflict], what, bind).await
    }

    async fn options(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        let flags = ["ro", "nosuid", "nodev", "noexec", "noatime", "rslave"];
        let flags = ViewOptions::new(flags).expect("a view has these");
        let mapped = ViewOptions::default().with_id_map(some_map());
        for options in [flags, mapped] {
            let mut view = self.view("with-options");
            view.options = options;
            let what = format!("{} with {:?}", shown(&view), view.options);
            let answer = run.call(&what, self.binder.bind(&view)).await?;
            match answer {
                Err(error) if error.kind() == Unsuitable => {
                    run.unchanged(OPTIONS, &what, &before).await?;
                }
                answer => run.answered(OPTIONS, &what, answer)?,
            }
            self.unbind(run, &view.target, &before).await?;
        }
        Ok(())
    }

    /// Two views of one mount.
    async fn several(&self, run: &mut Run<'_>) -> Held {
        let before = run.tables().await;
        let [one, two] = ["view-1", "view-2"].map(|name| self.view(name));
        self.bind(run, &one).await?;
        let with_one = run.tables().await;
        self.bind(run, &two).await?;
        let source = &one.source;
        let what = format!("unmount of {}, which is shown", source.display());
        let unmount = self.mounter.unmount(source);
        run.fails(SHOWN, &[Busy], what, unmount).await?;
        let unbind = self.binder.unbind(&two.target);
        run.succeeds(UNBIND, "unbind of the second view", unbind)
            .await?;
        run.unchanged(ALONE, "unbind of the second view", &with_one)
            .await?;
        self.unbind(run, &one.target, &before).await
    }

    async fn after_faults(&self, run: &mut Run<'_>) -> Held {
        let (binder, view) = (self.binder, &self.view("faults"));
        let pair = Pair {
            up: (VmStep::Bind, &|| binder.bind(view)),
            down: (VmStep::Unbind, &|| binder.unbind(&view.target)),
            checks: PairChecks {
                up: BIND,
                unanswered: UNANSWERED,
                doubt: DOUBT,
                busy: BUSY,
                repeat: REPEAT,
                late: LATE,
            },
        };
        pair.check(run).await
    }

    /// The next processes: what they adopt, and what they do not.
    async fn adopt(&self, run: &mut Run<'_>, next: &Successor<dyn Binder>) -> Held {
        let before = run.tables().await;
        let view = self.view("adopted");
        self.bind(run, &view).await?;
        let bound = run.tables().await;
        let (mut at_mount, mut of_other) = (view.clone(), view.clone());
        at_mount.target.clone_from(&self.mounts[1]);
        of_other.source.clone_from(&self.mounts[1]);
        let mut with_others = view.clone();
        with_others.options = ViewOptions::new(["ro"]).expect("a view has this");
        for absent in [&self.view("absent"), &at_mount, &of_other, &with_others] {
            let process = next();
            let found = process.adopt(absent);
            let found = run.succeeds(ADOPT_ABSENT, "adopt", found).await?;
            let said = format!("adopt of {} answered {found:?}", shown(absent));
            run.holds(ADOPT_ABSENT, found == Presence::Absent, said)?;
            run.unchanged(ADOPT_ABSENT, "adopt", &bound).await?;
        }
        let process = next();
        let found = run.succeeds(ADOPT, "adopt", process.adopt(&view)).await?;
        let said = format!("adopt of {} answered {found:?}", shown(&view));
        run.holds(ADOPT, found == Presence::Present(()), said)?;
        run.unchanged(ADOPT, "adopt", &bound).await?;
        let unbind = process.unbind(&view.target);
        run.succeeds(ADOPT_UNBIND, "unbind of it", unbind).await?;
        run.unchanged(ADOPT_UNBIND, "unbind of it", &before).await
    }

    async fn gone(&self, run: &mut Run<'_>) -> Held {
        let view = self.view("gone");
        run.succeeds(BIND, "bind", self.binder.bind(&view)).await?;
        for _ in 0..2 {
            run.done_or_gone(GONE, "unbind", self.binder.unbind(&view.target))
                .await?;
        }
        run.clear().await;
        for target in self.mounts.iter().rev() {
            let what = format!("unmount of {}", target.display());
            run.done_or_gone(UNMOUNT, what, self.mounter.unmount(target))
                .await?;
        }
        Ok(())
    }
}

fn shown(bind: &BindMount) -> String {
    format!(
        "bind of {} at {}",
        bind.source.display(),
        bind.target.display()
    )
}

fn some_map() -> IdMap {
    let range = IdRange {
        stored: 0,
        shown: 100_000,
        count: 65_536,
    };
    IdMap::new(vec![range], vec![range]).expect("one range of each kind is a map")
}
