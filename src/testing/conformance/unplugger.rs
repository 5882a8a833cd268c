//! The checks of an unplugger.

use super::GuestFixture;
use super::checks::{Checks, Passed, attached, foreign, hostile};
use crate::ErrorKind::Busy;
use crate::{Mounter, Unplugger};

/// Runs an [`Unplugger`] through its checks, with a mounter of the same guest to make a device busy:
///
/// - an attached device can be unplugged, and again when it is unplugged already, and after its disk
///   was detached
/// - unplugging one device touches no other
/// - a mounted device is `Busy` and stays mounted; when it is unmounted, it can be unplugged
/// - addresses that make no sense and other transports change nothing
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn unplugger(
    unplugger: &dyn Unplugger,
    mounter: Option<&dyn Mounter>,
    fixture: &GuestFixture,
) -> Passed {
    let mut checks = Checks::of("unplugger", &*fixture.snapshot);
    let before = checks.tables().await;
    let disks = fixture.two_disks();
    let locators = attached(&mut checks, &*fixture.transport, disks).await;
    let (one, other) = (&locators[0], &locators[1]);

    for locator in hostile(one.transport()).into_iter().chain([foreign()]) {
        let check = "unplugging what cannot be changes nothing";
        checks
            .harmless(
                check,
                format!("unplug of {locator}"),
                unplugger.unplug(&locator),
            )
            .await;
    }
    let what = format!("unplug of {one}");
    if let Some(mounter) = mounter {
        let target = fixture.directory.join("busy");
        let mount = mounter.mount(one, &target, &fixture.options);
        checks
            .succeeds(
                "the fixture's disks can be mounted",
                format!("mount of {one}"),
                mount,
            )
            .await;
        let check = "a mounted device is busy and stays as it was";
        checks
            .fails(check, &[Busy], &what, unplugger.unplug(one))
            .await;
        let check = "a device that was busy can be used on";
        checks
            .succeeds(check, "unmount", mounter.unmount(&target))
            .await;
        let mount = mounter.mount(one, &target, &fixture.options);
        checks
            .succeeds(check, format!("mount of {one}"), mount)
            .await;
        checks
            .succeeds(check, "unmount", mounter.unmount(&target))
            .await;
    }

    checks
        .succeeds(
            "an unused device can be unplugged",
            &what,
            unplugger.unplug(one),
        )
        .await;
    checks
        .succeeds("unplugging twice succeeds", &what, unplugger.unplug(one))
        .await;
    if let Some(mounter) = mounter {
        let check = "unplugging touches no other device";
        let target = fixture.directory.join("other");
        let mount = mounter.mount(other, &target, &fixture.options);
        checks
            .succeeds(check, format!("mount of {other}"), mount)
            .await;
        checks
            .succeeds(check, "unmount", mounter.unmount(&target))
            .await;
    }
    fixture
        .take_out(&mut checks, disks, &locators, &before)
        .await;
    let check = "unplugging what is not there succeeds";
    checks.succeeds(check, &what, unplugger.unplug(one)).await;
    checks.unchanged(check, &what, &before).await;
    checks.passed()
}
