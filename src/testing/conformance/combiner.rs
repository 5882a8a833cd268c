//! The checks of a layer combiner.

use std::path::{Path, PathBuf};

use super::check::contract;
use super::faults::{Pair, PairChecks};
use super::fixture::{Fault, GuestFixture, Successor};
use super::run::{Held, Run};
use super::{Broken, Passed};
use crate::ErrorKind::{Conflict, Invalid, NotFound};
use crate::testing::VmStep;
use crate::{DeviceLocator, Disk, LayerCombiner, MountOptions, Mounter, Overlay, Presence};

contract! { "combiner" ATTACHABLE REMOVABLE {
    MOUNT = "the fixture's disks can be mounted";
    UNMOUNT = "layers are free after their overlay";
    SEPARATE_ABSENT = "separating what was never combined succeeds";
    NO_LAYER = "a layer that is not there is not found and leaves nothing";
    NO_LAYERS = "an overlay without layers is invalid and leaves nothing";
    TAKEN = "a taken target is a conflict and what is there stays as it was";
    COMBINE = "mounted layers can be combined";
    COMBINE_SHOWS = "combining shows in the tables";
    SEPARATE = "separating leaves nothing";
    SEPARATE_TWICE = "separating twice succeeds";
    WITH_SCRATCH = "mounted layers and a scratch can be combined";
    UNANSWERED = "a combine without an answer is uncertain or leaves nothing";
    DOUBT = "separating after a combine in doubt succeeds and leaves nothing";
    BUSY = "an overlay that is busy stays as it was";
    REPEAT = "a separate that failed can be repeated and leaves nothing";
    LATE = "a combine that was given up has no effect after the separate";
    ADOPT = "an overlay that an earlier process made is present";
    ADOPT_SEPARATE = "an adopted overlay can be separated and leaves nothing";
    ADOPT_ABSENT = "a target with nothing, or with a mount, is absent and stays as it was";
    GONE = "a separate after the end of the VM is done or gone, and leaves nothing";
}}

/// Runs a [`LayerCombiner`] through its checks, over layers that a mounter of the same guest mounts:
///
/// - separate of a target where nothing was combined succeeds and changes nothing
/// - layers can be combined, which shows in the snapshot; separate leaves nothing and succeeds a
///   second time; the target can be used again; so with a scratch, if there is one
/// - a taken target is `Conflict`, and what is there is intact
/// - a layer that is not there is `NotFound`; an overlay without layers is `Invalid`: each leaves
///   nothing
/// - with faults: a separate after a combine in doubt leaves nothing; after `Busy` the overlay is as
///   before, and after any error the separate can be repeated; a combine that was given up has no
///   effect after the separate that follows it; after the end of the VM a separate is done
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn combiner(
    combiner: &dyn LayerCombiner,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
) -> Passed {
    match try_combiner(combiner, mounter, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`combiner()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_combiner(
    combiner: &dyn LayerCombiner,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
) -> Result<Passed, Broken> {
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;
    let disks: Vec<Disk> = fixture
        .two_disks()
        .iter()
        .chain(&fixture.scratch)
        .cloned()
        .collect();
    let layers = Layers { mounter, fixture };
    let locators = run.attached(&*fixture.transport, &disks).await?;
    let with_devices = run.tables().await;
    let paths = layers.mount(&mut run, &locators).await?;
    let overlay = Overlay::new(&paths[..2], fixture.directory.join("overlay"));
    refused(&mut run, combiner, fixture, &overlay).await?;
    round_trips(&mut run, combiner, COMBINE, &overlay).await?;
    if let Some(scratch) = paths.get(2) {
        // What a combiner makes in a scratch stays there, and is no part of the tables.
        let overlay = overlay.clone().with_scratch(scratch);
        round_trips(&mut run, combiner, WITH_SCRATCH, &overlay).await?;
    }
    after_faults(&mut run, combiner, &overlay).await?;
    if let Some(next) = &fixture.next_combiner {
        adopt(&mut run, combiner, &overlay, next).await?;
    }
    if run.inject(VmStep::Separate, Fault::Gone).await {
        run.succeeds(COMBINE, "combine", combiner.combine(&overlay))
            .await?;
        gone(&mut run, combiner, &overlay.target).await?;
        layers.unmount_of_ended(&mut run, &paths).await?;
        run.take_out_of_ended(fixture, &disks, &locators).await?;
    } else {
        layers.unmount(&mut run, &paths).await?;
        run.unchanged(UNMOUNT, "unmounting them", &with_devices)
            .await?;
        run.take_out(fixture, &disks, &locators).await?;
    }
    run.end(&before).await
}

/// What the overlays are made of.
struct Layers<'a> {
    mounter: &'a dyn Mounter,
    fixture: &'a GuestFixture,
}

impl Layers<'_> {
    /// Mounts two layers and perhaps a scratch, which is the third.
    async fn mount(&self, run: &mut Run<'_>, devices: &[DeviceLocator]) -> Held<Vec<PathBuf>> {
        let read_write = MountOptions::default();
        let mut paths = Vec::new();
        for (number, device) in devices.iter().enumerate() {
            let target = self.fixture.directory.join(format!("layer-{number}"));
            let options = match number {
                0 | 1 => &self.fixture.options,
                _ => &read_write,
            };
            let mount = self.mounter.mount(device, &target, options);
            run.succeeds(MOUNT, format!("mount of {device}"), mount)
                .await?;
            paths.push(target);
        }
        Ok(paths)
    }

    async fn unmount(&self, run: &mut Run<'_>, paths: &[PathBuf]) -> Held {
        for path in paths.iter().rev() {
            let what = format!("unmount of {}", path.display());
            run.succeeds(UNMOUNT, what, self.mounter.unmount(path))
                .await?;
        }
        Ok(())
    }

    async fn unmount_of_ended(&self, run: &mut Run<'_>, paths: &[PathBuf]) -> Held {
        for path in paths.iter().rev() {
            let what = format!("unmount of {}", path.display());
            run.done_or_gone(UNMOUNT, what, self.mounter.unmount(path))
                .await?;
        }
        Ok(())
    }
}

async fn round_trips(
    run: &mut Run<'_>,
    combiner: &dyn LayerCombiner,
    check: super::Check,
    overlay: &Overlay,
) -> Held {
    let before = run.tables().await;
    let what = format!("combine at {}", overlay.target.display());
    // The second round is the check that a target can be used again.
    for _ in 0..2 {
        run.succeeds(check, &what, combiner.combine(overlay))
            .await?;
        run.changed(COMBINE_SHOWS, &what, &before).await?;
        let second = combiner.combine(overlay);
        run.fails(TAKEN, &[Conflict], format!("second {what}"), second)
            .await?;
        for check in [SEPARATE, SEPARATE_TWICE] {
            run.succeeds(check, "separate", combiner.separate(&overlay.target))
                .await?;
            run.unchanged(check, "separate", &before).await?;
        }
    }
    Ok(())
}

/// The next processes: what they adopt, and what they do not.
async fn adopt(
    run: &mut Run<'_>,
    combiner: &dyn LayerCombiner,
    overlay: &Overlay,
    next: &Successor<dyn LayerCombiner>,
) -> Held {
    let before = run.tables().await;
    let mut at_mount = overlay.clone();
    at_mount.target.clone_from(&overlay.layers[0]);
    for absent in [overlay, &at_mount] {
        let process = next();
        let found = run
            .succeeds(ADOPT_ABSENT, "adopt", process.adopt(absent))
            .await?;
        let said = format!("adopt at {} answered {found:?}", absent.target.display());
        run.holds(ADOPT_ABSENT, found == Presence::Absent, said)?;
        run.unchanged(ADOPT_ABSENT, "adopt", &before).await?;
    }
    run.succeeds(COMBINE, "combine", combiner.combine(overlay))
        .await?;
    let combined = run.tables().await;
    let process = next();
    let found = run.succeeds(ADOPT, "adopt", process.adopt(overlay)).await?;
    run.holds(
        ADOPT,
        found == Presence::Present(()),
        format!("adopt answered {found:?}"),
    )?;
    run.unchanged(ADOPT, "adopt", &combined).await?;
    let separate = process.separate(&overlay.target);
    run.succeeds(ADOPT_SEPARATE, "separate", separate).await?;
    run.unchanged(ADOPT_SEPARATE, "separate", &before).await
}

async fn refused(
    run: &mut Run<'_>,
    combiner: &dyn LayerCombiner,
    fixture: &GuestFixture,
    overlay: &Overlay,
) -> Held {
    let before = run.tables().await;
    let separate = combiner.separate(&overlay.target);
    run.succeeds(SEPARATE_ABSENT, "separate", separate).await?;
    run.unchanged(SEPARATE_ABSENT, "separate", &before).await?;

    let mut missing = overlay.clone();
    missing.layers.push(fixture.directory.join("no-such-layer"));
    let (what, combine) = ("combine of a missing layer", combiner.combine(&missing));
    run.fails(NO_LAYER, &[NotFound], what, combine).await?;

    let empty = Overlay {
        layers: Vec::new(),
        ..overlay.clone()
    };
    let (what, combine) = ("combine of no layers", combiner.combine(&empty));
    run.fails(NO_LAYERS, &[Invalid], what, combine).await?;

    let taken = Overlay {
        target: overlay.layers[0].clone(),
        ..overlay.clone()
    };
    let (what, combine) = ("combine at a layer's own path", combiner.combine(&taken));
    run.fails(TAKEN, &[Conflict], what, combine).await
}

async fn after_faults(run: &mut Run<'_>, combiner: &dyn LayerCombiner, overlay: &Overlay) -> Held {
    let pair = Pair {
        up: (VmStep::Combine, &|| combiner.combine(overlay)),
        down: (VmStep::Separate, &|| combiner.separate(&overlay.target)),
        checks: PairChecks {
            up: COMBINE,
            unanswered: UNANSWERED,
            doubt: DOUBT,
            busy: BUSY,
            repeat: REPEAT,
            late: LATE,
        },
    };
    pair.check(run).await
}

async fn gone(run: &mut Run<'_>, combiner: &dyn LayerCombiner, target: &Path) -> Held {
    for _ in 0..2 {
        run.done_or_gone(GONE, "separate", combiner.separate(target))
            .await?;
    }
    run.clear().await;
    Ok(())
}
