//! The checks of a layer combiner.

use std::path::PathBuf;

use super::GuestFixture;
use super::checks::{Checks, Passed, attached};
use super::mounter::{mount, unmount};
use crate::ErrorKind::{Conflict, Invalid, NotFound};
use crate::{Disk, LayerCombiner, MountOptions, Mounter, Overlay};

/// Runs a [`LayerCombiner`] through its checks, over layers that a mounter of the same guest mounts:
///
/// - separate of a target where nothing was combined succeeds and changes nothing
/// - layers can be combined, which shows in the snapshot; separate leaves nothing and succeeds a
///   second time; the target can be used again; so with a scratch, if there is one
/// - a taken target is `Conflict`, and what is there is intact
/// - a layer that is not there is `NotFound`; an overlay without layers is `Invalid`: each leaves
///   nothing
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn combiner(
    combiner: &dyn LayerCombiner,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
) -> Passed {
    let mut checks = Checks::of("combiner", &*fixture.snapshot);
    let before = checks.tables().await;
    let disks: Vec<Disk> = fixture
        .two_disks()
        .iter()
        .chain(&fixture.scratch)
        .cloned()
        .collect();
    let locators = attached(&mut checks, &*fixture.transport, &disks).await;
    let with_devices = checks.tables().await;

    let read_write = MountOptions::default();
    let mut mounted: Vec<(PathBuf, Vec<String>)> = Vec::new();
    for (number, locator) in locators.iter().enumerate() {
        let target = fixture.directory.join(format!("layer-{number}"));
        let options = if number < 2 {
            &fixture.options
        } else {
            &read_write
        };
        mounted.push((target.clone(), checks.tables().await));
        mount(&mut checks, mounter, locator, &target, options).await;
    }
    let paths: Vec<PathBuf> = mounted.iter().map(|(path, _)| path.clone()).collect();
    let overlay = Overlay {
        layers: paths[..2].to_vec(),
        scratch: None,
        target: fixture.directory.join("overlay"),
    };
    refused(&mut checks, combiner, fixture, &overlay).await;
    round_trips(&mut checks, combiner, &overlay).await;
    if let Some(scratch) = paths.get(2) {
        // What a combiner makes in a scratch stays there, and is no part of the tables.
        let overlay = Overlay {
            scratch: Some(scratch.clone()),
            ..overlay
        };
        round_trips(&mut checks, combiner, &overlay).await;
    }

    for (target, before) in mounted.iter().rev() {
        unmount(&mut checks, mounter, target, before).await;
    }
    checks
        .unchanged(
            "layers are free after their overlay",
            "unmounting them",
            &with_devices,
        )
        .await;
    fixture
        .take_out(&mut checks, &disks, &locators, &before)
        .await;
    checks.passed()
}

async fn round_trips(checks: &mut Checks<'_>, combiner: &dyn LayerCombiner, overlay: &Overlay) {
    let before = checks.tables().await;
    let what = format!("combine at {}", overlay.target.display());
    // The second round is the check that a target can be used again.
    for _ in 0..2 {
        checks
            .succeeds(
                "mounted layers can be combined",
                &what,
                combiner.combine(overlay),
            )
            .await;
        checks
            .changed("combining shows in the tables", &what, &before)
            .await;
        let check = "a taken target is a conflict and what is there stays as it was";
        checks
            .fails(
                check,
                &[Conflict],
                format!("second {what}"),
                combiner.combine(overlay),
            )
            .await;
        let check = "separating leaves nothing";
        checks
            .succeeds(check, "separate", combiner.separate(&overlay.target))
            .await;
        checks.unchanged(check, "separate", &before).await;
        let check = "separating twice succeeds";
        checks
            .succeeds(check, "second separate", combiner.separate(&overlay.target))
            .await;
        checks.unchanged(check, "second separate", &before).await;
    }
}

async fn refused(
    checks: &mut Checks<'_>,
    combiner: &dyn LayerCombiner,
    fixture: &GuestFixture,
    overlay: &Overlay,
) {
    let before = checks.tables().await;
    let check = "separating what was never combined succeeds";
    checks
        .succeeds(check, "separate", combiner.separate(&overlay.target))
        .await;
    checks.unchanged(check, "separate", &before).await;

    let check = "a layer that is not there is not found and leaves nothing";
    let mut missing = overlay.clone();
    missing.layers.push(fixture.directory.join("no-such-layer"));
    checks
        .fails(
            check,
            &[NotFound],
            "combine of a missing layer",
            combiner.combine(&missing),
        )
        .await;

    let check = "an overlay without layers is invalid and leaves nothing";
    let empty = Overlay {
        layers: Vec::new(),
        ..overlay.clone()
    };
    checks
        .fails(
            check,
            &[Invalid],
            "combine of no layers",
            combiner.combine(&empty),
        )
        .await;

    let check = "a taken target is a conflict and what is there stays as it was";
    let taken = Overlay {
        target: overlay.layers[0].clone(),
        ..overlay.clone()
    };
    checks
        .fails(
            check,
            &[Conflict],
            "combine at a layer's own path",
            combiner.combine(&taken),
        )
        .await;
}
