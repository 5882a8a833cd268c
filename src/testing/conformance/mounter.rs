//! The laws of a mounter.

use std::num::NonZeroU32;
use std::path::Path;

use super::GuestFixture;
use super::laws::{Laws, Passed, attached, foreign, hostile, impossible_targets};
use crate::ErrorKind::{Conflict, Invalid, NotFound, Unsuitable};
use crate::{DeviceLocator, MountOptions, MountOptionsBuilder, Mounter};

/// Runs a [`Mounter`] through its laws:
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
/// At the first law that does not hold, and if the fixture has too few disks.
pub async fn mounter(mounter: &dyn Mounter, fixture: &GuestFixture) -> Passed {
    let mut laws = Laws::of("mounter", &fixture.snapshot);
    let before = laws.tables();
    let disks = fixture.two_disks();
    let locators = attached(&mut laws, &*fixture.transport, disks).await;

    round_trip(&mut laws, mounter, fixture, &locators[0]).await;
    taken(&mut laws, mounter, fixture, &locators).await;
    refused(&mut laws, mounter, fixture, &locators[0]).await;
    if let Some(blank) = &fixture.blank {
        let devices = attached(&mut laws, &*fixture.transport, std::slice::from_ref(blank)).await;
        let target = fixture.directory.join("blank");
        let law = "a filesystem that is not there is not found and leaves nothing";
        let mount = mounter.mount(&devices[0], &target, &fixture.options);
        laws.fails(law, &[NotFound], format!("mount of {blank}"), mount)
            .await;
        let law = "a device that could not be mounted can be taken out";
        let unplug = fixture.unplugger.unplug(&devices[0]);
        laws.succeeds(law, format!("unplug of {blank}"), unplug)
            .await;
        laws.succeeds(
            law,
            format!("detach of {blank}"),
            fixture.transport.detach(blank),
        )
        .await;
    }

    fixture.take_out(&mut laws, disks, &locators, &before).await;
    let law = "a device that is not there is not found and leaves nothing";
    let target = fixture.directory.join("absent");
    let mount = mounter.mount(&locators[0], &target, &fixture.options);
    laws.fails(law, &[NotFound], format!("mount of {}", locators[0]), mount)
        .await;
    laws.passed()
}

/// Mounts a device where it must work.
pub(super) async fn mount(
    laws: &mut Laws<'_>,
    mounter: &dyn Mounter,
    device: &DeviceLocator,
    target: &Path,
    options: &MountOptions,
) {
    let before = laws.tables();
    let what = format!("mount of {device} at {}", target.display());
    let mount = mounter.mount(device, target, options);
    laws.succeeds("an attached device can be mounted", &what, mount)
        .await;
    laws.changed("mounting shows in the tables", &what, &before);
}

/// Unmounts a target where it must work, back to the tables from before the mount.
pub(super) async fn unmount(
    laws: &mut Laws<'_>,
    mounter: &dyn Mounter,
    target: &Path,
    before: &[String],
) {
    let what = format!("unmount of {}", target.display());
    let law = "unmounting leaves nothing";
    laws.succeeds(law, &what, mounter.unmount(target)).await;
    laws.unchanged(law, &what, before);
    let law = "unmounting twice succeeds";
    laws.succeeds(law, format!("second {what}"), mounter.unmount(target))
        .await;
    laws.unchanged(law, format!("second {what}"), before);
}

async fn round_trip(
    laws: &mut Laws<'_>,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    device: &DeviceLocator,
) {
    let before = laws.tables();
    let target = fixture.directory.join("one");
    let law = "unmounting what was never mounted succeeds";
    let what = format!("unmount of {}", target.display());
    laws.succeeds(law, &what, mounter.unmount(&target)).await;
    laws.unchanged(law, &what, &before);
    // The second round is the law that a target can be mounted again.
    for _ in 0..2 {
        mount(laws, mounter, device, &target, &fixture.options).await;
        unmount(laws, mounter, &target, &before).await;
    }
    let deep = fixture.directory.join("made/for/it");
    mount(laws, mounter, device, &deep, &fixture.options).await;
    unmount(laws, mounter, &deep, &before).await;
}

async fn taken(
    laws: &mut Laws<'_>,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    devices: &[DeviceLocator],
) {
    let before = laws.tables();
    let (one, other) = (
        fixture.directory.join("one"),
        fixture.directory.join("other"),
    );
    mount(laws, mounter, &devices[0], &one, &fixture.options).await;
    let with_one = laws.tables();
    for device in [&devices[1], &devices[0]] {
        let law = "a taken target is a conflict and its mount stays as it was";
        let what = format!("mount of {device} at a taken target");
        let mount = mounter.mount(device, &one, &fixture.options);
        laws.fails(law, &[Conflict], what, mount).await;
    }
    mount(laws, mounter, &devices[1], &other, &fixture.options).await;
    unmount(laws, mounter, &other, &with_one).await;
    unmount(laws, mounter, &one, &before).await;
}

async fn refused(
    laws: &mut Laws<'_>,
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
    let law = "a partition that is not there is not found and leaves nothing";
    let what = format!("mount of partition {partition} of {device}");
    laws.fails(
        law,
        &[NotFound],
        what,
        mounter.mount(device, &target, &options),
    )
    .await;

    let options = &fixture.options;
    let law = "a device of another transport is unsuitable or not found and leaves nothing";
    let other = foreign();
    let mount = mounter.mount(&other, &target, options);
    laws.fails(
        law,
        &[Unsuitable, NotFound],
        format!("mount of {other}"),
        mount,
    )
    .await;
    for locator in hostile(device.transport()) {
        let law = "an address that makes no sense is invalid or not found and leaves nothing";
        let mount = mounter.mount(&locator, &target, options);
        laws.fails(
            law,
            &[Invalid, NotFound],
            format!("mount of {locator}"),
            mount,
        )
        .await;
    }
    for target in impossible_targets() {
        let shown: String = target.display().to_string().chars().take(40).collect();
        let law = "a target that cannot be is refused and leaves nothing";
        let what = format!("mount at {shown:?}");
        laws.fails(law, &[], what, mounter.mount(device, &target, options))
            .await;
        let law = "unmounting a target that cannot be changes nothing";
        laws.harmless(
            law,
            format!("unmount of {shown:?}"),
            mounter.unmount(&target),
        )
        .await;
    }
}
