//! The checks of an unplugger.

use super::check::contract;
use super::faults::{give_up, settle, tear_down_behind};
use super::fixture::{Fault, GuestFixture};
use super::hostile::{foreign, hostile};
use super::run::{Held, Run};
use super::{Broken, Check, Passed};
use crate::ErrorKind::Busy;
use crate::testing::VmStep;
use crate::{DeviceLocator, Disk, Mounter, Unplugger};

contract! { "unplugger" ATTACHABLE REMOVABLE {
    NONSENSE = "unplugging what cannot be changes nothing";
    MOUNTABLE = "the fixture's disks can be mounted";
    MOUNTED = "a mounted device is busy and stays as it was";
    MOUNTED_USABLE = "a device that was busy can be used on";
    UNPLUG = "an unused device can be unplugged";
    UNPLUG_TWICE = "unplugging twice succeeds";
    OTHERS = "unplugging touches no other device";
    ABSENT = "unplugging what is not there succeeds";
    BUSY = "a device that is busy stays as it was";
    REPEAT = "an unplug that failed can be repeated";
    LATE = "an unplug that was given up does not touch what is attached later";
    GONE = "an unplug after the end of the VM is done or gone";
}}

/// Runs an [`Unplugger`] through its checks, with a mounter of the same guest to make a device busy:
///
/// - an attached device can be unplugged, and again when it is unplugged already, and after its disk
///   was detached
/// - unplugging one device touches no other
/// - a mounted device is `Busy` and stays mounted; when it is unmounted, it can be unplugged
/// - addresses that make no sense and other transports change nothing
/// - with faults: after `Busy` the device is as before, and after any error the unplug can be repeated;
///   an unplug that was given up has no effect on the device that is attached there next; after the
///   end of the VM an unplug is done
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn unplugger(
    unplugger: &dyn Unplugger,
    mounter: Option<&dyn Mounter>,
    fixture: &GuestFixture,
) -> Passed {
    match try_unplugger(unplugger, mounter, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`unplugger()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_unplugger(
    unplugger: &dyn Unplugger,
    mounter: Option<&dyn Mounter>,
    fixture: &GuestFixture,
) -> Result<Passed, Broken> {
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;
    let disks = fixture.two_disks();
    let locators = run.attached(&*fixture.transport, disks).await?;
    let (one, other) = (&locators[0], &locators[1]);

    for locator in hostile(one.transport()).into_iter().chain([foreign()]) {
        let what = format!("unplug of {locator}");
        run.harmless(NONSENSE, what, unplugger.unplug(&locator))
            .await?;
    }
    let what = format!("unplug of {one}");
    if let Some(mounter) = mounter {
        mounted(&mut run, unplugger, mounter, fixture, one).await?;
    }
    run.succeeds(UNPLUG, &what, unplugger.unplug(one)).await?;
    run.succeeds(UNPLUG_TWICE, &what, unplugger.unplug(one))
        .await?;
    if let Some(mounter) = mounter {
        usable(&mut run, OTHERS, mounter, fixture, other).await?;
    }
    run.take_out(fixture, disks, &locators).await?;
    run.succeeds(ABSENT, &what, unplugger.unplug(one)).await?;
    run.unchanged(ABSENT, &what, &before).await?;
    after_faults(&mut run, unplugger, fixture, &disks[0]).await?;
    if let Some(mounter) = mounter {
        late(&mut run, unplugger, mounter, fixture, &disks[0]).await?;
    }
    gone(&mut run, unplugger, fixture, &disks[0]).await?;
    run.end(&before).await
}

/// A device can be mounted and unmounted.
async fn usable(
    run: &mut Run<'_>,
    check: Check,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    device: &DeviceLocator,
) -> Held {
    let target = fixture.directory.join("usable");
    let mount = mounter.mount(device, &target, &fixture.options);
    run.succeeds(check, format!("mount of {device}"), mount)
        .await?;
    run.succeeds(check, "unmount", mounter.unmount(&target))
        .await
}

async fn mounted(
    run: &mut Run<'_>,
    unplugger: &dyn Unplugger,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    device: &DeviceLocator,
) -> Held {
    let target = fixture.directory.join("busy");
    let mount = mounter.mount(device, &target, &fixture.options);
    run.succeeds(MOUNTABLE, format!("mount of {device}"), mount)
        .await?;
    let what = format!("unplug of {device}");
    run.fails(MOUNTED, &[Busy], what, unplugger.unplug(device))
        .await?;
    run.succeeds(MOUNTED_USABLE, "unmount", mounter.unmount(&target))
        .await?;
    usable(run, MOUNTED_USABLE, mounter, fixture, device).await
}

/// Each fault is followed by an unplug that must succeed.
async fn after_faults(
    run: &mut Run<'_>,
    unplugger: &dyn Unplugger,
    fixture: &GuestFixture,
    disk: &Disk,
) -> Held {
    let disks = std::slice::from_ref(disk);
    let in_doubt = |happens| Fault::Uncertain { happens };
    for fault in [Fault::Busy, in_doubt(false), in_doubt(true)] {
        let locators = run.attached(&*fixture.transport, disks).await?;
        if run.inject(VmStep::Unplug, fault).await {
            let what = format!("unplug of {}", locators[0]);
            let unplug = unplugger.unplug(&locators[0]);
            let met = match fault {
                Fault::Busy => run.fails(BUSY, &[Busy], &what, unplug).await,
                // The backend may have found out by itself; the next call is a repeated one all the same.
                _ => run.call(&what, unplug).await.map(drop),
            };
            run.clear().await;
            met?;
            run.succeeds(REPEAT, what, unplugger.unplug(&locators[0]))
                .await?;
        }
        run.take_out(fixture, disks, &locators).await?;
    }
    Ok(())
}

/// The device that an unplug was meant for is taken out, and the disk attached anew.
async fn late(
    run: &mut Run<'_>,
    unplugger: &dyn Unplugger,
    mounter: &dyn Mounter,
    fixture: &GuestFixture,
    disk: &Disk,
) -> Held {
    let disks = std::slice::from_ref(disk);
    let locators = run.attached(&*fixture.transport, disks).await?;
    let device = &locators[0];
    if !run.inject(VmStep::Unplug, Fault::Held).await {
        return run.take_out(fixture, disks, &locators).await;
    }
    give_up(unplugger.unplug(device)).await;
    tear_down_behind(run, LATE, VmStep::Unplug, &|| unplugger.unplug(device)).await?;
    run.take_out(fixture, disks, &locators).await?;
    let locators = run.attached(&*fixture.transport, disks).await?;
    settle().await;
    usable(run, LATE, mounter, fixture, &locators[0]).await?;
    run.take_out(fixture, disks, &locators).await
}

async fn gone(
    run: &mut Run<'_>,
    unplugger: &dyn Unplugger,
    fixture: &GuestFixture,
    disk: &Disk,
) -> Held {
    let disks = std::slice::from_ref(disk);
    let locators = run.attached(&*fixture.transport, disks).await?;
    if !run.inject(VmStep::Unplug, Fault::Gone).await {
        return run.take_out(fixture, disks, &locators).await;
    }
    for _ in 0..2 {
        let what = format!("unplug of {}", locators[0]);
        run.done_or_gone(GONE, what, unplugger.unplug(&locators[0]))
            .await?;
    }
    run.clear().await;
    run.take_out_of_ended(fixture, disks, &locators).await
}
