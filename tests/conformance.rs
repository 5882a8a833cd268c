//! The fake VM keeps the checks of every backend, and the suite catches backends that do not.

use blockmount::testing::AttachIdentified as _;
use std::future::pending;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::{self, GuestFixture, TransportFixture};
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, Disk, DiskId, ErrorKind, LayerCombiner, MountOptions,
    Mounter, Overlay, Resolver, Transport, Unplugger,
};

const CAPACITY: u32 = 3;

fn disk(name: &str) -> Disk {
    Disk::virtual_disk(format!("/images/{name}"))
}

fn transport_fixture(vm: &FakeVm) -> TransportFixture {
    vm.alias("/links/a", "/images/a");
    vm.remove_source("/images/missing");
    let (tables, host) = (vm.clone(), vm.clone());
    TransportFixture::new(["a", "b", "c", "d"].map(disk), disk("missing"), move || {
        tables.left()
    })
    .aliases(["/links/a", "images/a", "/images/../images/./a"].map(Disk::virtual_disk))
    .capacity(CAPACITY as usize)
    .remove_source(move |disk| host.remove_source(disk.source()))
}

fn guest_fixture(vm: &FakeVm) -> GuestFixture {
    let tables = vm.clone();
    GuestFixture::new(
        vm.clone(),
        vm.clone(),
        ["a", "b"].map(disk),
        "/run/suite",
        move || tables.left(),
    )
    .scratch(disk("scratch"))
}

#[tokio::test]
async fn the_fake_vm_keeps_the_laws_of_a_transport() {
    let vm = FakeVm::with_slots(CAPACITY);
    let passed = conformance::transport(&vm, &transport_fixture(&vm)).await;
    assert!(
        passed.successes >= 40 && passed.checks > passed.successes,
        "{passed:?}"
    );
    vm.assert_empty();
}

#[tokio::test]
async fn the_fake_vm_keeps_the_laws_of_a_guest() {
    let vm = FakeVm::new();
    let fixture = guest_fixture(&vm);
    let passed = [
        conformance::resolver(&vm, &fixture).await,
        conformance::unplugger(&vm, Some(&vm), &fixture).await,
        conformance::mounter(&vm, &fixture).await,
        conformance::combiner(&vm, &vm, &fixture).await,
    ];
    assert!(
        passed.iter().all(|passed| passed.successes >= 8),
        "{passed:?}"
    );
    vm.assert_empty();
}

#[tokio::test]
async fn an_unplugger_without_a_mounter_has_laws_too() {
    let vm = FakeVm::new();
    conformance::unplugger(&vm, None, &guest_fixture(&vm)).await;
    vm.assert_empty();
}

/// What a broken backend does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    RefusesEverything,
    DoesNothing,
    SecondTearDownFails,
    LeavesTheRestAfterAnError,
    ForgetsToTearDown,
    GivesOneAnswerToAll,
    CannotTellNamesApart,
    LosesTheSlot,
    NeedsTheSource,
    IgnoresWhoUsesIt,
    TakesTakenTargets,
    Guesses,
    Panics,
    Hangs,
}

use Fault::*;

/// The fake VM with one fault.
struct Broken {
    vm: FakeVm,
    fault: Fault,
    tear_downs: AtomicUsize,
}

impl Broken {
    fn new(vm: &FakeVm, fault: Fault) -> Self {
        Broken {
            vm: vm.clone(),
            fault,
            tear_downs: AtomicUsize::new(0),
        }
    }

    async fn spoil(&self) -> Result<(), BackendError> {
        match self.fault {
            RefusesEverything => Err(BackendError::busy("come back later")),
            Panics => panic!("out of order"),
            Hangs => pending().await,
            _ => Ok(()),
        }
    }

    /// Tearing down what is no longer up fails, if that is the fault.
    fn spoil_second(&self, is_up: bool) -> Result<(), BackendError> {
        if is_up {
            self.tear_downs.fetch_add(1, Ordering::Relaxed);
        } else if self.fault == SecondTearDownFails && self.tear_downs.load(Ordering::Relaxed) > 0 {
            return Err(BackendError::other("it is not there"));
        }
        Ok(())
    }
}

#[async_trait]
impl Transport for Broken {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.spoil().await?;
        match self.fault {
            GivesOneAnswerToAll => Ok(DiskId::name("the disk")),
            CannotTellNamesApart => Ok(DiskId::name(&disk.source().display().to_string())),
            _ => self.vm.identify(disk).await,
        }
    }

    async fn attach(&self, disk: &Disk, _: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.spoil().await?;
        match self.fault {
            DoesNothing => self
                .vm
                .identify(disk)
                .await
                .map(|_| "fake:0".parse().expect("a locator")),
            LeavesTheRestAfterAnError => {
                let attached = self.vm.attach_identified(disk).await;
                if attached.is_err() {
                    self.vm
                        .attach_identified(&Disk::virtual_disk("/left/over"))
                        .await
                        .ok();
                }
                attached
            }
            _ => self.vm.attach_identified(disk).await,
        }
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        self.spoil().await?;
        self.spoil_second(self.vm.locator_of(disk).is_some())?;
        match self.fault {
            DoesNothing | ForgetsToTearDown => return Ok(()),
            NeedsTheSource if disk.source() != Path::new("/images/missing") => {
                self.vm.identify(disk).await?;
            }
            LosesTheSlot
                if self
                    .vm
                    .locator_of(disk)
                    .is_some_and(|at| at.address() == "2") =>
            {
                self.vm.detach(disk).await?;
                self.vm
                    .attach_identified(&Disk::virtual_disk("/left/over"))
                    .await?;
                return Ok(());
            }
            _ => {}
        }
        self.vm.detach(disk).await
    }
}

#[async_trait]
impl Unplugger for Broken {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.spoil().await?;
        self.spoil_second(self.vm.resolve(device).await.is_ok())?;
        match (self.fault, self.vm.unplug(device).await) {
            (IgnoresWhoUsesIt, Err(error)) if error.kind() == ErrorKind::Busy => Ok(()),
            (_, answer) => answer,
        }
    }
}

#[async_trait]
impl Resolver for Broken {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        self.spoil().await?;
        match self.fault {
            GivesOneAnswerToAll => Ok(BlockDevice::new("/dev/sda")),
            Guesses => Ok(BlockDevice::new(format!("/dev/{}", device.address()))),
            _ => self.vm.resolve(device).await,
        }
    }
}

#[async_trait]
impl Mounter for Broken {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.spoil().await?;
        if self.fault == DoesNothing {
            return Ok(());
        }
        if self.fault == TakesTakenTargets {
            self.vm.unmount(target).await?;
        }
        let mounted = self.vm.mount(device, target, options).await;
        if mounted.is_err() && self.fault == LeavesTheRestAfterAnError {
            self.vm
                .mount(device, target, &MountOptions::default())
                .await
                .ok();
        }
        mounted
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.spoil().await?;
        self.spoil_second(self.vm.device_at(target).is_some())?;
        match self.fault {
            DoesNothing | ForgetsToTearDown => Ok(()),
            _ => self.vm.unmount(target).await,
        }
    }
}

#[async_trait]
impl LayerCombiner for Broken {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.spoil().await?;
        match self.fault {
            DoesNothing => return Ok(()),
            TakesTakenTargets => self.vm.separate(&overlay.target).await?,
            LeavesTheRestAfterAnError => {
                // Takes the layers one after the other and stops at the one that is missing.
                let mut part = overlay.clone();
                part.layers
                    .retain(|layer| self.vm.device_at(layer).is_some());
                self.vm.combine(&part).await?;
                if part != *overlay {
                    return Err(BackendError::not_found("a layer is missing"));
                }
                return Ok(());
            }
            _ => {}
        }
        self.vm.combine(overlay).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.spoil().await?;
        let overlay = format!("{} overlays", target.display());
        self.spoil_second(self.vm.left().iter().any(|line| line.starts_with(&overlay)))?;
        match self.fault {
            ForgetsToTearDown | DoesNothing => Ok(()),
            _ => self.vm.separate(target).await,
        }
    }
}

/// Each broken backend must be caught, for the check that it breaks.
macro_rules! caught {
    ($suite:ident: $($name:ident $fault:ident $check:literal;)*) => {
        mod $suite {
            use super::*;
            $(
                #[tokio::test(start_paused = true)]
                #[should_panic(expected = $check)]
                async fn $name() {
                    run::$suite($fault).await;
                }
            )*
        }
    };
}

mod run {
    use super::*;

    pub(super) async fn transport(fault: Fault) {
        let vm = FakeVm::with_slots(CAPACITY);
        conformance::transport(&Broken::new(&vm, fault), &transport_fixture(&vm)).await;
    }

    pub(super) async fn resolver(fault: Fault) {
        let vm = FakeVm::new();
        conformance::resolver(&Broken::new(&vm, fault), &guest_fixture(&vm)).await;
    }

    pub(super) async fn unplugger(fault: Fault) {
        let vm = FakeVm::new();
        conformance::unplugger(&Broken::new(&vm, fault), Some(&vm), &guest_fixture(&vm)).await;
    }

    pub(super) async fn mounter(fault: Fault) {
        let vm = FakeVm::new();
        conformance::mounter(&Broken::new(&vm, fault), &guest_fixture(&vm)).await;
    }

    pub(super) async fn combiner(fault: Fault) {
        let vm = FakeVm::new();
        conformance::combiner(&Broken::new(&vm, fault), &vm, &guest_fixture(&vm)).await;
    }
}

caught! { transport:
    refuses_everything RefusesEverything "a disk that is there has an id";
    does_nothing DoesNothing "attaching shows in the tables";
    errors_on_the_second_detach SecondTearDownFails "detaching twice succeeds";
    leaves_a_slot_after_an_error LeavesTheRestAfterAnError "attaching a missing disk is not found and leaves nothing";
    forgets_to_detach ForgetsToTearDown "detaching leaves nothing";
    one_id_for_all GivesOneAnswerToAll "different disks have different ids";
    takes_names_for_disks CannotTellNamesApart "a disk has one id under all its names";
    loses_a_slot LosesTheSlot "a full transport can be emptied";
    needs_the_source_to_detach NeedsTheSource "a disk whose source is gone can be detached";
    panics Panics "a backend never panics";
    hangs Hangs "every call ends";
}

caught! { resolver:
    refuses_everything RefusesEverything "an attached device can be resolved";
    one_device_for_all GivesOneAnswerToAll "two devices resolve to two places";
    guesses_names Guesses "a locator of another transport is unsuitable";
    panics Panics "a backend never panics";
    hangs Hangs "every call ends";
}

caught! { unplugger:
    refuses_everything RefusesEverything "an unused device can be unplugged";
    errors_on_the_second_unplug SecondTearDownFails "unplugging twice succeeds";
    ignores_who_uses_it IgnoresWhoUsesIt "a mounted device is busy and stays as it was";
    panics Panics "a backend never panics";
    hangs Hangs "every call ends";
}

caught! { mounter:
    refuses_everything RefusesEverything "unmounting what was never mounted succeeds";
    does_nothing DoesNothing "mounting shows in the tables";
    errors_on_the_second_unmount SecondTearDownFails "unmounting twice succeeds";
    leaves_the_mount_after_an_error LeavesTheRestAfterAnError "a partition that is not there is not found and leaves nothing";
    forgets_to_unmount ForgetsToTearDown "unmounting leaves nothing";
    takes_taken_targets TakesTakenTargets "a taken target is a conflict and its mount stays as it was";
    panics Panics "a backend never panics";
    hangs Hangs "every call ends";
}

caught! { combiner:
    refuses_everything RefusesEverything "separating what was never combined succeeds";
    does_nothing DoesNothing "a layer that is not there is not found and leaves nothing";
    errors_on_the_second_separate SecondTearDownFails "separating twice succeeds";
    leaves_the_overlay_after_an_error LeavesTheRestAfterAnError "a layer that is not there is not found and leaves nothing";
    forgets_to_separate ForgetsToTearDown "separating leaves nothing";
    takes_taken_targets TakesTakenTargets "a taken target is a conflict and what is there stays as it was";
    panics Panics "a backend never panics";
    hangs Hangs "every call ends";
}
