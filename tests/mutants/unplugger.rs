//! Unpluggers that are wrong.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_unplugger;
use blockmount::{
    BackendError, DeviceLocator, ErrorKind, MountOptions, Mounter, Presence, Resolver as _,
    Unplugger, Usage,
};

use super::{Everywhere, Mutant, OF_GUESTS, Outcome, Tried, panics, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    LeavesATraceOfNonsense,
    HasDisksThatCannotBeMounted,
    UnplugsWhatIsMounted,
    BreaksWhatIsMounted,
    CannotUnplug,
    CannotUnplugTwice,
    UnplugsOthersToo,
    CannotUnplugTheAbsent,
    LeavesATraceOfBusy,
    CannotRepeat,
    UnplugsLate,
    FailsInAnEndedVm,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 14] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (
        LeavesATraceOfNonsense,
        "unplugging what cannot be changes nothing",
    ),
    (
        HasDisksThatCannotBeMounted,
        "the fixture's disks can be mounted",
    ),
    (
        UnplugsWhatIsMounted,
        "a mounted device is busy and stays as it was",
    ),
    (BreaksWhatIsMounted, "a device that was busy can be used on"),
    (CannotUnplug, "an unused device can be unplugged"),
    (CannotUnplugTwice, "unplugging twice succeeds"),
    (UnplugsOthersToo, "unplugging touches no other device"),
    (
        CannotUnplugTheAbsent,
        "unplugging what is not there succeeds",
    ),
    (LeavesATraceOfBusy, "a device that is busy stays as it was"),
    (CannotRepeat, "an unplug that failed can be repeated"),
    (
        UnplugsLate,
        "an unplug that was given up does not touch what is attached later",
    ),
    (
        FailsInAnEndedVm,
        "an unplug after the end of the VM is done or gone",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_GUESTS, Bug::None, run)
}

async fn run(bug: Bug, everywhere: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::new(), bug);
    let fixture = super::guest_fixture(&mutant.vm, &mutant.memory, everywhere, &looks, from);
    try_unplugger(&mutant, Some(&mutant), &fixture).await
}

impl Mutant<Bug> {
    fn is_attached(&self, device: &DeviceLocator) -> bool {
        let slot = format!("{device} ");
        self.vm.left().iter().any(|line| line.starts_with(&slot))
    }

    fn is_mounted(&self, device: &DeviceLocator) -> bool {
        let mount = format!(" mounts {device}");
        self.vm.left().iter().any(|line| line.ends_with(&mount))
    }
}

#[async_trait]
impl Unplugger for Mutant<Bug> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let mounted = self.is_mounted(device);
        match bug {
            Panics => panics(),
            Hangs => pending().await,
            CannotUnplug if !mounted => return wrong(),
            CannotUnplugTwice if self.is_attached(device) && vm.resolve(device).await.is_err() => {
                return wrong();
            }
            CannotUnplugTheAbsent if !self.is_attached(device) => return wrong(),
            CannotRepeat if memory.is_spoilt() => return wrong(),
            UnplugsLate => {
                let (vm, device) = (vm.clone(), device.clone());
                let late = tokio::spawn(async move { vm.unplug(&device).await });
                return late.await.unwrap();
            }
            _ => {}
        }
        let unplugged = vm.unplug(device).await;
        let kind = unplugged.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (LeavesATraceOfNonsense, Some(ErrorKind::Invalid)) => memory.leave(),
            (UnplugsWhatIsMounted, Some(ErrorKind::Busy)) if mounted => return Ok(()),
            (BreaksWhatIsMounted, Some(ErrorKind::Busy)) => memory.spoil(),
            (UnplugsOthersToo, Option::None) => vm.unplug(&"fake:1".parse().unwrap()).await?,
            (LeavesATraceOfBusy, Some(ErrorKind::Busy)) if !mounted => memory.leave(),
            (CannotRepeat, Some(_)) if !mounted && self.is_attached(device) => memory.spoil(),
            (FailsInAnEndedVm, Some(ErrorKind::Gone)) => return wrong(),
            _ => {}
        }
        unplugged
    }
}

#[async_trait]
impl Mounter for Mutant<Bug> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        match self.bug {
            HasDisksThatCannotBeMounted => wrong(),
            BreaksWhatIsMounted if self.memory.is_spoilt() => wrong(),
            _ => self.vm.mount(device, target, options).await,
        }
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.vm.unmount(target).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.vm.usage(target).await
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
        Mounter::adopt(&self.vm, device, target, options).await
    }
}
