//! The checks of a mounter.

use std::num::NonZeroU32;
use std::path::Path;

use super::GuestFixture;
use super::checks::{Checks, Passed, attached, foreign, hostile, impossible_targets};
use crate::ErrorKind::{Conflict, Invalid, NotFound, Unsuitable};
use crate::{DeviceLocator, MountOptions, MountOptionsBuilder, Mounter};

/// Runs a [`Mounter`] through its checks:
///
/// - unmount of a target where nothing was mounted succeeds and changes nothing
/// - mount shows in the snapshot; unmount leaves nothing, not even a directory that was made; it
///   succeeds a second time; the target can be mounted again
/// - two devices can be mounted at once; unmounting one does not touch the other
/// - a taken target is `Conflict`, for another device and for the same, and the first mount is intact
/// - a device, a partition or a filesystem that is not there is `NotFound`; another transport is
///   `Unsuitable` or `NotFound`; an address or a target that makes no sense fails: each leaves nothing
/// - unmount of a target that makes no sense changes nothing
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn mounter(mounter: &dyn Mounter, fixture: &GuestFixture) -> Passed {
    let mut checks = Checks::of("mounter", &*fixture.snapshot);
    let before = checks.tables().await;
    let disks = fixture.two_disks();
    let locators = attached(&mut checks, &*fixture.transport, disks).await;

    round_trip(&mut checks, mounter, fixture, &locators[0]).await;
    taken(&mut checks, mounter, fixture, &locators).await;
    refused(&mut checks, mounter, fixture, &locators[0]).await;
    if let Some(blank) = &fixture.blank {
        let devices = attached(
            &mut checks,
            &*fixture.transport,
            std::slice::from_ref(blank),
        )
        .await;
        let target = fixture.directory.join("blank");
        let check = "a filesystem that is not there is not found and leaves nothing";
        let mount = mounter.mount(&devices[0], &target, &fixture.options);
        checks
            .fails(check, &[NotFound], format!("mount of {blank}"), mount)
            .await;
        let check = "a device that could not be mounted can be taken out";
        let unplug = fixture.unplugger.unplug(&devices[0]);
        checks
            .succeeds(check, format!("unplug of {blank}"), unplug)
            .await;
        checks
            .succeeds(
                check,
                format!("detach of {blank}"),
                fixture.transport.detach(blank),
            )
            .await;
    }

    fixture
        .take_out(&mut checks, disks, &locators, &before)
        .await;
    let check = "a device that is not there is not found and leaves nothing";
    let target = fixture.directory.join("absent");
    let mount = mounter.mount(&locators[0], &target, &fixture.options);
    checks
        .fails(
            check,
            &[NotFound],
            format!("mount of {}", locators[0]),
            mount,
        )
        .await;
    checks.passed()
}

/// Mounts a device where it must work.
pub(super) async fn mount(
    checks: &mut Checks<'_>,
    mounter: &dyn Mounter,
    device: &DeviceLocator,
    target: &Path,
    options: &MountOptions,
) {
    let before = checks.tables().await;
    let what = format!("mount of {device} at {}", target.display());
    let mount = mounter.mount(device, target, options);
    checks
        .succeeds("an attached device can be mounted", &what, mount)
        .await;
    checks
        .changed("mounting shows in the tables", &what, &before)
        .await;
}

/// Unmounts a target where it must work, back to the tables from before the mount.
pub(super) async fn unmount(
    checks: &mut Checks<'_>,
    mounter: &dyn Mounter,
    target: &Path,
    before: &[String],
) {
    let what = format!("unmount of {}", target.display());
    let check = "unmounting leaves nothing";
    checks.succeeds(check, &what, mounter.unmount(target)).await;
    checks.unchanged(check, &what, before).await;
    let check = "unmounting twice succeeds";
    checks
        .succeeds(check, format!("second {what}"), mounter.unmount(target))
        .await;
    checks
        .unchanged(check, format!("second {what}"), before)
        .await;
}

async fn round_trip(
    checks: &mut Checks<'_>,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    device: &DeviceLocator,
) {
    let before = checks.tables().await;
    let target = fixture.directory.join("one");
    let check = "unmounting what was never mounted succeeds";
    let what = format!("unmount of {}", target.display());
    checks
        .succeeds(check, &what, mounter.unmount(&target))
        .await;
    checks.unchanged(check, &what, &before).await;
    // The second round is the check that a target can be mounted again.
    for _ in 0..2 {
        mount(checks, mounter, device, &target, &fixture.options).await;
        unmount(checks, mounter, &target, &before).await;
    }
    let deep = fixture.directory.join("made/for/it");
    mount(checks, mounter, device, &deep, &fixture.options).await;
    unmount(checks, mounter, &deep, &before).await;
}

async fn taken(
    checks: &mut Checks<'_>,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    devices: &[DeviceLocator],
) {
    let before = checks.tables().await;
    let (one, other) = (
        fixture.directory.join("one"),
        fixture.directory.join("other"),
    );
    mount(checks, mounter, &devices[0], &one, &fixture.options).await;
    let with_one = checks.tables().await;
    for device in [&devices[1], &devices[0]] {
        let check = "a taken target is a conflict and its mount stays as it was";
        let what = format!("mount of {device} at a taken target");
        let mount = mounter.mount(device, &one, &fixture.options);
        checks.fails(check, &[Conflict], what, mount).await;
    }
    mount(checks, mounter, &devices[1], &other, &fixture.options).await;
    unmount(checks, mounter, &other, &with_one).await;
    unmount(checks, mounter, &one, &before).await;
}

async fn refused(
    checks: &mut Checks<'_>,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    device: &DeviceLocator,
) {
    let target = fixture.directory.join("refused");
    let partition = NonZeroU32::new(99).expect("99 is not zero");
    let options = MountOptionsBuilder::from(fixture.options.clone())
        .partition(partition)
        .build();
    let options = options.expect("a partition contradicts nothing");
    let check = "a partition that is not there is not found and leaves nothing";
    let what = format!("mount of partition {partition} of {device}");
    checks
        .fails(
            check,
            &[NotFound],
            what,
            mounter.mount(device, &target, &options),
        )
        .await;

    let options = &fixture.options;
    let check = "a device of another transport is unsuitable or not found and leaves nothing";
    let other = foreign();
    let mount = mounter.mount(&other, &target, options);
    checks
        .fails(
            check,
            &[Unsuitable, NotFound],
            format!("mount of {other}"),
            mount,
        )
        .await;
    for locator in hostile(device.transport()) {
        let check = "an address that makes no sense is invalid or not found and leaves nothing";
        let mount = mounter.mount(&locator, &target, options);
        checks
            .fails(
                check,
                &[Invalid, NotFound],
                format!("mount of {locator}"),
                mount,
            )
            .await;
    }
    for target in impossible_targets() {
        let shown: String = target.display().to_string().chars().take(40).collect();
        let check = "a target that cannot be is refused and leaves nothing";
        let what = format!("mount at {shown:?}");
        checks
            .fails(check, &[], what, mounter.mount(device, &target, options))
            .await;
        let check = "unmounting a target that cannot be changes nothing";
        checks
            .harmless(
                check,
                format!("unmount of {shown:?}"),
                mounter.unmount(&target),
            )
            .await;
    }
}
