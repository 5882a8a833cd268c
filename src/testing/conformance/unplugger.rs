//! The laws of an unplugger.

use super::GuestFixture;
use super::laws::{Laws, Passed, attached, foreign, hostile};
use crate::ErrorKind::Busy;
use crate::{Mounter, Unplugger};

/// Runs an [`Unplugger`] through its laws, with a mounter of the same guest to make a device busy:
///
/// - an attached device can be unplugged, and again when it is unplugged already, and after its disk
///   was detached
/// - unplugging one device touches no other
/// - a mounted device is `Busy` and stays mounted; when it is unmounted, it can be unplugged
/// - addresses that make no sense and other transports change nothing
///
/// # Panics
///
/// At the first law that does not hold, and if the fixture has too few disks.
pub async fn unplugger(
    unplugger: &dyn Unplugger,
    mounter: Option<&dyn Mounter>,
    fixture: &GuestFixture,
) -> Passed {
    let mut laws = Laws::of("unplugger", &fixture.snapshot);
    let before = laws.tables();
    let disks = fixture.two_disks();
    let locators = attached(&mut laws, &*fixture.transport, disks).await;
    let (one, other) = (&locators[0], &locators[1]);

    for locator in hostile(one.transport()).into_iter().chain([foreign()]) {
        let law = "unplugging what cannot be changes nothing";
        laws.harmless(
            law,
            format!("unplug of {locator}"),
            unplugger.unplug(&locator),
        )
        .await;
    }
    let what = format!("unplug of {one}");
    if let Some(mounter) = mounter {
        let target = fixture.directory.join("busy");
        let mount = mounter.mount(one, &target, &fixture.options);
        laws.succeeds(
            "the fixture's disks can be mounted",
            format!("mount of {one}"),
            mount,
        )
        .await;
        let law = "a mounted device is busy and stays as it was";
        laws.fails(law, &[Busy], &what, unplugger.unplug(one)).await;
        let law = "a device that was busy can be used on";
        laws.succeeds(law, "unmount", mounter.unmount(&target))
            .await;
        let mount = mounter.mount(one, &target, &fixture.options);
        laws.succeeds(law, format!("mount of {one}"), mount).await;
        laws.succeeds(law, "unmount", mounter.unmount(&target))
            .await;
    }

    laws.succeeds(
        "an unused device can be unplugged",
        &what,
        unplugger.unplug(one),
    )
    .await;
    laws.succeeds("unplugging twice succeeds", &what, unplugger.unplug(one))
        .await;
    if let Some(mounter) = mounter {
        let law = "unplugging touches no other device";
        let target = fixture.directory.join("other");
        let mount = mounter.mount(other, &target, &fixture.options);
        laws.succeeds(law, format!("mount of {other}"), mount).await;
        laws.succeeds(law, "unmount", mounter.unmount(&target))
            .await;
    }
    fixture.take_out(&mut laws, disks, &locators, &before).await;
    let law = "unplugging what is not there succeeds";
    laws.succeeds(law, &what, unplugger.unplug(one)).await;
    laws.unchanged(law, &what, &before);
    laws.passed()
}
