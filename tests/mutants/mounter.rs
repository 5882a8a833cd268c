//! Mounters that are wrong.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_mounter;
use blockmount::{BackendError, DeviceLocator, ErrorKind, MountOptions, Mounter, Presence, Usage};

use super::{Everywhere, HIDDEN, Mutant, OF_GUESTS, Outcome, Tried, panics, suite, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    CannotUnmountTheAbsent,
    CannotMount,
    MountsNothing,
    UnmountsNothing,
    CannotUnmountTwice,
    TakesTakenTargets,
    HidesThatAPartitionIsMissing,
    HidesThatATransportIsAnother,
    HidesThatAnAddressIsInvalid,
    LeavesImpossibleTargets,
    LeavesATraceOfImpossibleTargets,
    HidesThatADiskIsBlank,
    HoldsBlankDisks,
    HidesThatADeviceIsMissing,
    HidesThatItIsInDoubt,
    ForgetsMountsInDoubt,
    UnmountsWhatIsBusy,
    CannotRepeatAnUnmount,
    MountsLate,
    TellsMoreUsageThanThereIs,
    TellsUsageOfNothing,
    FailsInAnEndedVm,
    ForgetsMounts,
    KeepsWhatItAdopts,
    AdoptsAnyDevice,
    CannotMountSeveralDevices,
    IgnoresFurtherDevices,
    AdoptsOtherFurtherDevices,
    KeepsFurtherDevices,
    HidesThatAFurtherDeviceIsMissing,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 32] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (
        CannotUnmountTheAbsent,
        "unmounting what was never mounted succeeds",
    ),
    (CannotMount, "an attached device can be mounted"),
    (MountsNothing, "mounting shows in the tables"),
    (UnmountsNothing, "unmounting leaves nothing"),
    (CannotUnmountTwice, "unmounting twice succeeds"),
    (
        TakesTakenTargets,
        "a taken target is a conflict and its mount stays as it was",
    ),
    (
        HidesThatAPartitionIsMissing,
        "a partition that is not there is not found and leaves nothing",
    ),
    (
        HidesThatATransportIsAnother,
        "a device of another transport is unsuitable or not found and leaves nothing",
    ),
    (
        HidesThatAnAddressIsInvalid,
        "an address that makes no sense is invalid or not found and leaves nothing",
    ),
    (
        LeavesImpossibleTargets,
        "a target that cannot be is refused and leaves nothing",
    ),
    (
        LeavesATraceOfImpossibleTargets,
        "unmounting a target that cannot be changes nothing",
    ),
    (
        HidesThatADiskIsBlank,
        "a filesystem that is not there is not found and leaves nothing",
    ),
    (
        HoldsBlankDisks,
        "a device that could not be mounted can be taken out",
    ),
    (
        HidesThatADeviceIsMissing,
        "a device that is not there is not found and leaves nothing",
    ),
    (
        HidesThatItIsInDoubt,
        "a mount without an answer is uncertain or leaves nothing",
    ),
    (
        ForgetsMountsInDoubt,
        "unmounting after a mount in doubt succeeds and leaves nothing",
    ),
    (UnmountsWhatIsBusy, "a mount that is busy stays as it was"),
    (
        CannotRepeatAnUnmount,
        "an unmount that failed can be repeated and leaves nothing",
    ),
    (
        MountsLate,
        "a mount that was given up has no effect after the unmount",
    ),
    (
        TellsMoreUsageThanThereIs,
        "the usage of a mount makes sense or cannot be told, and asking changes nothing",
    ),
    (
        TellsUsageOfNothing,
        "usage, trim and growth where nothing is mounted are refused and change nothing",
    ),
    (
        FailsInAnEndedVm,
        "an unmount after the end of the VM is done or gone, and leaves nothing",
    ),
    (
        ForgetsMounts,
        "a mount that an earlier process made is present",
    ),
    (
        KeepsWhatItAdopts,
        "an adopted mount can be unmounted and leaves nothing",
    ),
    (
        AdoptsAnyDevice,
        "a target with nothing, or with another device, is absent and stays as it was",
    ),
    (
        CannotMountSeveralDevices,
        "a filesystem of several devices can be mounted",
    ),
    (
        IgnoresFurtherDevices,
        "a further device of a mount is busy as long as it is mounted",
    ),
    (
        AdoptsOtherFurtherDevices,
        "a mount with other further devices is absent and stays as it was",
    ),
    (
        KeepsFurtherDevices,
        "the further devices of a mount can be taken out after it",
    ),
    (
        HidesThatAFurtherDeviceIsMissing,
        "a further device that is not there is not found and leaves nothing",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_GUESTS, Bug::None, run)
}

async fn run(bug: Bug, everywhere: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::new(), bug);
    let fixture = super::guest_fixture(&mutant.vm, &mutant.memory, everywhere, &looks, from);
    let next = mutant.clone();
    let fixture = fixture.blank(suite::disk("blank"));
    try_mounter(&mutant, &fixture.next_mounter(move || next.clone())).await
}

impl Mutant<Bug> {
    /// The fake VM has no blank disks.
    fn is_blank(&self, device: &DeviceLocator) -> bool {
        self.vm.locator_of(&suite::disk("blank")).as_ref() == Some(device)
    }
}

/// What a correct mounter says of a blank disk.
fn blank() -> Result<(), BackendError> {
    Err(BackendError::not_found("no filesystem"))
}

fn is_possible(target: &Path) -> bool {
    target.starts_with("/run/suite")
}

#[async_trait]
impl Mounter for Mutant<Bug> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        match bug {
            Panics => panics(),
            Hangs => pending().await,
            CannotMount => return wrong(),
            MountsNothing => return Ok(()),
            CannotMountSeveralDevices if !options.devices().is_empty() => return wrong(),
            IgnoresFurtherDevices if !options.devices().is_empty() => {
                return vm.mount(device, target, &MountOptions::read_only()).await;
            }
            KeepsFurtherDevices if !options.devices().is_empty() => {
                vm.mount(device, target, options).await?;
                let (kept, plain) = (&options.devices()[0].locator, MountOptions::read_only());
                return vm.mount(kept, Path::new(HIDDEN), &plain).await;
            }
            TakesTakenTargets => vm.unmount(target).await?,
            HidesThatADiskIsBlank if self.is_blank(device) => return wrong(),
            HoldsBlankDisks if self.is_blank(device) => {
                vm.mount(device, Path::new(HIDDEN), options).await?;
                return blank();
            }
            MountsLate if !self.is_blank(device) => {
                let (vm, device) = (vm.clone(), device.clone());
                let (target, options) = (target.to_owned(), options.clone());
                let late = async move { vm.mount(&device, &target, &options).await };
                return tokio::spawn(late).await.unwrap();
            }
            _ if self.is_blank(device) => return blank(),
            _ => {}
        }
        let mounted = vm.mount(device, target, options).await;
        let kind = mounted.as_ref().err().map(BackendError::kind);
        let numbered = device.address().parse::<u8>().is_ok();
        match (bug, kind) {
            (CannotUnmountTwice | CannotUnmountTheAbsent, Option::None) => {
                memory.see(&target.display());
            }
            (HidesThatAPartitionIsMissing, Some(_)) if options.partition().is_some() => {
                return wrong();
            }
            (HidesThatATransportIsAnother, Some(ErrorKind::Unsuitable)) => return wrong(),
            (HidesThatAnAddressIsInvalid, Some(ErrorKind::Invalid)) if !numbered => return wrong(),
            (LeavesImpossibleTargets, Some(_)) if !is_possible(target) => memory.leave(),
            (HidesThatAFurtherDeviceIsMissing, Some(_)) if !options.devices().is_empty() => {
                return wrong();
            }
            (HidesThatADeviceIsMissing, Some(_)) if target.ends_with("absent") => return wrong(),
            (HidesThatItIsInDoubt, Some(ErrorKind::Uncertain)) => return wrong(),
            (ForgetsMountsInDoubt, Some(ErrorKind::Uncertain)) => memory.spoil(),
            (ForgetsMountsInDoubt, Option::None) => memory.mend(),
            _ => {}
        }
        mounted
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let absent = vm.device_at(target).is_none();
        let seen = memory.has_seen(&target.display());
        match bug {
            Panics => panics(),
            CannotUnmountTheAbsent if !seen => return wrong(),
            UnmountsNothing => return Ok(()),
            CannotUnmountTwice if absent && seen => return wrong(),
            LeavesATraceOfImpossibleTargets if !is_possible(target) => memory.leave(),
            ForgetsMountsInDoubt | KeepsWhatItAdopts if memory.is_spoilt() => return Ok(()),
            CannotRepeatAnUnmount if memory.is_spoilt() => return wrong(),
            _ => {}
        }
        let unmounted = vm.unmount(target).await;
        let kind = unmounted.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (UnmountsWhatIsBusy, Some(ErrorKind::Busy)) => vm.unmount(target).await?,
            (CannotRepeatAnUnmount, Some(_)) => memory.spoil(),
            (FailsInAnEndedVm, Some(ErrorKind::Gone)) => return wrong(),
            _ => {}
        }
        unmounted
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        match (self.bug, self.vm.usage(target).await) {
            (TellsUsageOfNothing, Err(_)) => Ok(Usage::default()),
            (TellsMoreUsageThanThereIs, Ok(mut usage)) => {
                usage.bytes.used = usage.bytes.total + 1;
                Ok(usage)
            }
            (_, told) => told,
        }
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.vm.trim(target).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.vm.grow(target, bytes).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let Mutant { vm, bug, memory } = self;
        match bug {
            ForgetsMounts => Ok(Presence::Absent),
            AdoptsAnyDevice if vm.device_at(target).is_some() => Ok(Presence::Present(())),
            AdoptsOtherFurtherDevices if vm.device_at(target).as_ref() == Some(device) => {
                Ok(Presence::Present(()))
            }
            KeepsWhatItAdopts => {
                memory.spoil();
                Mounter::adopt(vm, device, target, options).await
            }
            _ => Mounter::adopt(vm, device, target, options).await,
        }
    }
}
