//! The checks of a mounter.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use super::check::{REMOVABLE, contract};
use super::faults::{Pair, PairChecks};
use super::fixture::{Fault, GuestFixture, Several, Successor};
use super::hostile::{foreign, hostile, impossible_targets};
use super::run::{Held, Run};
use super::{Broken, Passed};
use crate::ErrorKind::{Busy, Conflict, Invalid, NotFound, Unsuitable};
use crate::testing::VmStep;
use crate::{
    DeviceLocator, DeviceRole, Disk, ExtraDevice, MountOptions, MountOptionsBuilder, Mounter,
    Presence, Space, Usage,
};

contract! { "mounter" ATTACHABLE REMOVABLE {
    UNMOUNT_ABSENT = "unmounting what was never mounted succeeds";
    MOUNT = "an attached device can be mounted";
    MOUNT_SHOWS = "mounting shows in the tables";
    UNMOUNT = "unmounting leaves nothing";
    UNMOUNT_TWICE = "unmounting twice succeeds";
    TAKEN = "a taken target is a conflict and its mount stays as it was";
    NO_PARTITION = "a partition that is not there is not found and leaves nothing";
    FOREIGN = "a device of another transport is unsuitable or not found and leaves nothing";
    NONSENSE = "an address that makes no sense is invalid or not found and leaves nothing";
    TARGET = "a target that cannot be is refused and leaves nothing";
    UNMOUNT_TARGET = "unmounting a target that cannot be changes nothing";
    BLANK = "a filesystem that is not there is not found and leaves nothing";
    BLANK_REMOVABLE = "a device that could not be mounted can be taken out";
    NO_DEVICE = "a device that is not there is not found and leaves nothing";
    UNANSWERED = "a mount without an answer is uncertain or leaves nothing";
    DOUBT = "unmounting after a mount in doubt succeeds and leaves nothing";
    BUSY = "a mount that is busy stays as it was";
    REPEAT = "an unmount that failed can be repeated and leaves nothing";
    LATE = "a mount that was given up has no effect after the unmount";
    ADOPT = "a mount that an earlier process made is present";
    ADOPT_UNMOUNT = "an adopted mount can be unmounted and leaves nothing";
    ADOPT_ABSENT = "a target with nothing, or with another device, is absent and stays as it was";
    USAGE = "the usage of a mount makes sense or cannot be told, and asking changes nothing";
    USAGE_ABSENT = "usage, trim and growth where nothing is mounted are refused and change nothing";
    FURTHER = "a filesystem of several devices can be mounted";
    FURTHER_IN_USE = "a further device of a mount is busy as long as it is mounted";
    FURTHER_ADOPT = "a mount with other further devices is absent and stays as it was";
    FURTHER_RELEASED = "the further devices of a mount can be taken out after it";
    NO_FURTHER = "a further device that is not there is not found and leaves nothing";
    GONE = "an unmount after the end of the VM is done or gone, and leaves nothing";
}}

/// Runs a [`Mounter`] through its checks:
///
/// - unmount of a target where nothing was mounted succeeds and changes nothing
/// - mount shows in the snapshot; unmount leaves nothing, not even a directory that was made; it
///   succeeds a second time; the target can be mounted again
/// - the usage of a mount makes sense, or is `Unsuitable`; where nothing is mounted it is refused, as trim and growth are
/// - two devices can be mounted at once; unmounting one does not touch the other
/// - a taken target is `Conflict`, for another device and for the same, and the first mount is intact
/// - a device, a partition or a filesystem that is not there is `NotFound`; another transport is
///   `Unsuitable` or `NotFound`; an address or a target that makes no sense fails: each leaves nothing
/// - unmount of a target that makes no sense changes nothing
/// - with further devices: all devices of a mount are in use until it is unmounted; one that is not there is `NotFound`; a mount
///   with others is not the one that is adopted
/// - with a successor: a mount that an earlier process made is present, can be unmounted, and is absent for another device
/// - with faults: an unmount after a mount in doubt leaves nothing; after `Busy` the mount is as before,
///   and after any error the unmount can be repeated; a mount that was given up has no effect after the
///   unmount that follows it; after the end of the VM an unmount is done
///
/// # Panics
///
/// At the first check that does not hold, and if the fixture has too few disks.
pub async fn mounter(mounter: &dyn Mounter, fixture: &GuestFixture) -> Passed {
    match try_mounter(mounter, fixture).await {
        Ok(passed) => passed,
        Err(broken) => panic!("{broken}"),
    }
}

/// As [`mounter()`], without the panic.
///
/// # Errors
///
/// The first check that does not hold.
///
/// # Panics
///
/// If the fixture has too few disks.
pub async fn try_mounter(mounter: &dyn Mounter, fixture: &GuestFixture) -> Result<Passed, Broken> {
    let mut run = Run::of(&CONTRACT, &*fixture.snapshot, fixture.faults.as_deref());
    let before = run.tables().await;
    let disks = fixture.two_disks();
    let locators = run.attached(&*fixture.transport, disks).await?;
    let suite = Suite { mounter, fixture };

    suite.round_trip(&mut run, &locators[0]).await?;
    suite.taken(&mut run, &locators).await?;
    suite.refused(&mut run, &locators[0]).await?;
    suite.impossible(&mut run, &locators[0]).await?;
    if let Some(blank) = &fixture.blank {
        suite.blank(&mut run, blank).await?;
    }
    suite.after_faults(&mut run, &locators[0]).await?;
    if let Some(next) = &fixture.next_mounter {
        suite.adopt(&mut run, &locators, next).await?;
    }
    if let Some(several) = &fixture.several {
        suite.several(&mut run, several).await?;
    }

    run.take_out(fixture, disks, &locators).await?;
    let target = fixture.directory.join("absent");
    let mount = mounter.mount(&locators[0], &target, &fixture.options);
    let what = format!("mount of {}", locators[0]);
    run.fails(NO_DEVICE, &[NotFound], what, mount).await?;
    suite.gone(&mut run, &disks[0]).await?;
    run.end(&before).await
}

struct Suite<'a> {
    mounter: &'a dyn Mounter,
    fixture: &'a GuestFixture,
}

impl Suite<'_> {
    fn target(&self, name: &str) -> PathBuf {
        self.fixture.directory.join(name)
    }

    async fn mount(&self, run: &mut Run<'_>, device: &DeviceLocator, target: &Path) -> Held {
        let before = run.tables().await;
        let what = format!("mount of {device} at {}", target.display());
        let mount = self.mounter.mount(device, target, &self.fixture.options);
        run.succeeds(MOUNT, &what, mount).await?;
        run.changed(MOUNT_SHOWS, &what, &before).await
    }

    /// Unmounts a target, back to the tables from before the mount.
    async fn unmount(&self, run: &mut Run<'_>, target: &Path, before: &[String]) -> Held {
        let what = format!("unmount of {}", target.display());
        for check in [UNMOUNT, UNMOUNT_TWICE] {
            run.succeeds(check, &what, self.mounter.unmount(target))
                .await?;
            run.unchanged(check, &what, before).await?;
        }
        Ok(())
    }

    /// The next processes: what they adopt, and what they do not.
    async fn adopt(
        &self,
        run: &mut Run<'_>,
        devices: &[DeviceLocator],
        next: &Successor<dyn Mounter>,
    ) -> Held {
        let before = run.tables().await;
        let (target, options) = (self.target("adopted"), &self.fixture.options);
        self.mount(run, &devices[0], &target).await?;
        let mounted = run.tables().await;
        let what = |device| format!("adopt of {device} at {}", target.display());
        let absent = self.target("absent");
        for (device, target) in [(&devices[1], &target), (&devices[0], &absent)] {
            let process = next();
            let found = process.adopt(device, target, options);
            let found = run.succeeds(ADOPT_ABSENT, what(device), found).await?;
            let said = format!("{} answered {found:?}", what(device));
            run.holds(ADOPT_ABSENT, found == Presence::Absent, said)?;
            run.unchanged(ADOPT_ABSENT, what(device), &mounted).await?;
        }
        let (process, device) = (next(), &devices[0]);
        let found = process.adopt(device, &target, options);
        let found = run.succeeds(ADOPT, what(device), found).await?;
        let said = format!("{} answered {found:?}", what(device));
        run.holds(ADOPT, found == Presence::Present(()), said)?;
        run.unchanged(ADOPT, what(device), &mounted).await?;
        let unmount = process.unmount(&target);
        run.succeeds(ADOPT_UNMOUNT, "unmount of it", unmount)
            .await?;
        run.unchanged(ADOPT_UNMOUNT, "unmount of it", &before).await
    }

    async fn round_trip(&self, run: &mut Run<'_>, device: &DeviceLocator) -> Held {
        let before = run.tables().await;
        let target = self.target("one");
        let what = format!("unmount of {}", target.display());
        run.succeeds(UNMOUNT_ABSENT, &what, self.mounter.unmount(&target))
            .await?;
        run.unchanged(UNMOUNT_ABSENT, &what, &before).await?;
        // The second round is the check that a target can be mounted again.
        for target in [&target, &target, &self.target("made/for/it")] {
            self.mount(run, device, target).await?;
            self.usage(run, target).await?;
            self.unmount(run, target, &before).await?;
        }
        let (mounter, kinds) = (self.mounter, [NotFound, Unsuitable]);
        let what = |what| format!("{what} of {}", target.display());
        let usage = mounter.usage(&target);
        run.fails(USAGE_ABSENT, &kinds, what("usage"), usage)
            .await?;
        let trim = mounter.trim(&target);
        run.fails(USAGE_ABSENT, &kinds, what("trim"), trim).await?;
        let grow = mounter.grow(&target, 1);
        run.fails(USAGE_ABSENT, &kinds, what("growth"), grow).await
    }

    async fn usage(&self, run: &mut Run<'_>, target: &Path) -> Held {
        let before = run.tables().await;
        let what = format!("usage of {}", target.display());
        let answer = match run.call(&what, self.mounter.usage(target)).await? {
            Err(error) if error.kind() == Unsuitable => Ok(Usage::default()),
            answer => answer,
        };
        let usage = run.answered(USAGE, &what, answer)?;
        let is_sane = |space: Space| {
            let both = space.used.checked_add(space.available);
            both.is_some_and(|both| both <= space.total)
        };
        let is_sane = is_sane(usage.bytes) && is_sane(usage.inodes);
        run.holds(USAGE, is_sane, format!("{what} answered {usage:?}"))?;
        run.unchanged(USAGE, &what, &before).await
    }

    async fn taken(&self, run: &mut Run<'_>, devices: &[DeviceLocator]) -> Held {
        let before = run.tables().await;
        let (one, other) = (self.target("one"), self.target("other"));
        self.mount(run, &devices[0], &one).await?;
        let with_one = run.tables().await;
        for device in [&devices[1], &devices[0]] {
            let what = format!("mount of {device} at a taken target");
            let mount = self.mounter.mount(device, &one, &self.fixture.options);
            run.fails(TAKEN, &[Conflict], what, mount).await?;
        }
        self.mount(run, &devices[1], &other).await?;
        self.unmount(run, &other, &with_one).await?;
        self.unmount(run, &one, &before).await
    }

    async fn refused(&self, run: &mut Run<'_>, device: &DeviceLocator) -> Held {
        let target = self.target("refused");
        let partition = NonZeroU32::new(99).expect("99 is not zero");
        let options = MountOptionsBuilder::from(self.fixture.options.clone())
            .partition(partition)
            .build()
            .expect("a partition contradicts nothing");
        let what = format!("mount of partition {partition} of {device}");
        let mount = self.mounter.mount(device, &target, &options);
        run.fails(NO_PARTITION, &[NotFound], what, mount).await?;

        let options = &self.fixture.options;
        let other = foreign();
        let mount = self.mounter.mount(&other, &target, options);
        let what = format!("mount of {other}");
        run.fails(FOREIGN, &[Unsuitable, NotFound], what, mount)
            .await?;
        for locator in hostile(device.transport()) {
            let mount = self.mounter.mount(&locator, &target, options);
            let what = format!("mount of {locator}");
            run.fails(NONSENSE, &[Invalid, NotFound], what, mount)
                .await?;
        }
        Ok(())
    }

    async fn impossible(&self, run: &mut Run<'_>, device: &DeviceLocator) -> Held {
        for target in impossible_targets() {
            let shown: String = target.display().to_string().chars().take(40).collect();
            let mount = self.mounter.mount(device, &target, &self.fixture.options);
            run.fails(TARGET, &[], format!("mount at {shown:?}"), mount)
                .await?;
            let unmount = self.mounter.unmount(&target);
            let what = format!("unmount of {shown:?}");
            run.harmless(UNMOUNT_TARGET, what, unmount).await?;
        }
        Ok(())
    }

    async fn blank(&self, run: &mut Run<'_>, blank: &Disk) -> Held {
        let Suite { mounter, fixture } = self;
        let disks = std::slice::from_ref(blank);
        let devices = run.attached(&*fixture.transport, disks).await?;
        let target = self.target("blank");
        let mount = mounter.mount(&devices[0], &target, &fixture.options);
        run.fails(BLANK, &[NotFound], format!("mount of {blank}"), mount)
            .await?;
        let unplug = fixture.unplugger.unplug(&devices[0]);
        run.succeeds(BLANK_REMOVABLE, format!("unplug of {blank}"), unplug)
            .await?;
        let detach = fixture.transport.detach(blank);
        run.succeeds(BLANK_REMOVABLE, format!("detach of {blank}"), detach)
            .await
    }

    /// A filesystem of several devices.
    async fn several(&self, run: &mut Run<'_>, Several { disk, data }: &Several) -> Held {
        let Suite { mounter, fixture } = self;
        let before = run.tables().await;
        let further = run.attached(&*fixture.transport, data).await?;
        let disks = std::slice::from_ref(disk);
        let device = &run.attached(&*fixture.transport, disks).await?[0];
        let with_devices = run.tables().await;
        let (target, options) = (self.target("several"), self.with_data(&further));
        let what = format!("mount of {device} with {further:?}");
        let mount = mounter.mount(device, &target, &options);
        run.succeeds(FURTHER, &what, mount).await?;
        run.changed(FURTHER, &what, &with_devices).await?;
        for device in &further {
            let unplug = fixture.unplugger.unplug(device);
            let what = format!("unplug of further device {device}");
            run.fails(FURTHER_IN_USE, &[Busy], what, unplug).await?;
        }
        if let Some(next) = &fixture.next_mounter {
            let (mounted, process) = (run.tables().await, next());
            let (what, others) = ("adopt with other devices", self.with_data(&further[1..]));
            let found = process.adopt(device, &target, &others);
            let found = run.succeeds(FURTHER_ADOPT, what, found).await?;
            let said = format!("{what} answered {found:?}");
            run.holds(FURTHER_ADOPT, found == Presence::Absent, said)?;
            run.unchanged(FURTHER_ADOPT, what, &mounted).await?;
        }
        self.unmount(run, &target, &with_devices).await?;
        for (disk, device) in data.iter().zip(&further).rev() {
            let what = format!("unplug of further device {device}");
            let unplug = fixture.unplugger.unplug(device);
            run.succeeds(FURTHER_RELEASED, &what, unplug).await?;
            let (what_disk, detach) = (format!("detach of {disk}"), fixture.transport.detach(disk));
            run.succeeds(REMOVABLE, what_disk, detach).await?;
            let mount = mounter.mount(device, &target, &options);
            let what = format!("mount without further device {device}");
            run.fails(NO_FURTHER, &[NotFound], what, mount).await?;
        }
        let devices = std::slice::from_ref(device);
        run.take_out(fixture, disks, devices).await?;
        run.unchanged(FURTHER_RELEASED, "taking them out", &before)
            .await
    }

    /// The options of the fixture, with data on further devices.
    fn with_data(&self, devices: &[DeviceLocator]) -> MountOptions {
        let options = MountOptionsBuilder::from(self.fixture.options.clone());
        let data = |at: &DeviceLocator| ExtraDevice::new(DeviceRole::Data, at.clone());
        let options = devices
            .iter()
            .map(data)
            .fold(options, MountOptionsBuilder::device);
        options
            .build()
            .expect("different devices of a whole disk contradict nothing")
    }

    async fn after_faults(&self, run: &mut Run<'_>, device: &DeviceLocator) -> Held {
        let Suite { mounter, fixture } = *self;
        let target = &self.target("faults");
        let pair = Pair {
            up: (VmStep::Mount, &|| {
                mounter.mount(device, target, &fixture.options)
            }),
            down: (VmStep::Unmount, &|| mounter.unmount(target)),
            checks: PairChecks {
                up: MOUNT,
                unanswered: UNANSWERED,
                doubt: DOUBT,
                busy: BUSY,
                repeat: REPEAT,
                late: LATE,
            },
        };
        pair.check(run).await
    }

    async fn gone(&self, run: &mut Run<'_>, disk: &Disk) -> Held {
        let Suite { mounter, fixture } = self;
        let disks = std::slice::from_ref(disk);
        let locators = run.attached(&*fixture.transport, disks).await?;
        let with_device = run.tables().await;
        let target = self.target("gone");
        self.mount(run, &locators[0], &target).await?;
        if !run.inject(VmStep::Unmount, Fault::Gone).await {
            self.unmount(run, &target, &with_device).await?;
            return run.take_out(fixture, disks, &locators).await;
        }
        for _ in 0..2 {
            run.done_or_gone(GONE, "unmount", mounter.unmount(&target))
                .await?;
        }
        run.clear().await;
        run.take_out_of_ended(fixture, disks, &locators).await
    }
}
