//! Binders that are wrong.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_binder;
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, ErrorKind, MountOptions, Mounter, Presence,
    Usage, ViewOptions,
};

use super::{Everywhere, Mutant, OF_GUESTS, Outcome, Tried, panics, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    HasDisksThatCannotBeMounted,
    HoldsMountsForEver,
    CannotUnbindTheAbsent,
    ShowsWhatIsNotMounted,
    ShowsDirectoriesThatAreNotThere,
    LeavesImpossibleTargets,
    LeavesATraceOfImpossibleTargets,
    CannotBind,
    HasNoEffect,
    TakesTakenTargets,
    CannotMapIds,
    LetsShownMountsGo,
    UnbindsAllViews,
    UnbindsNothing,
    CannotUnbindTwice,
    HidesThatItIsInDoubt,
    ForgetsViewsInDoubt,
    UnbindsWhatIsBusy,
    CannotRepeatAnUnbind,
    BindsLate,
    FailsInAnEndedVm,
    ForgetsViews,
    KeepsAdoptedViews,
    AdoptsAnyOptions,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 26] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (
        HasDisksThatCannotBeMounted,
        "the fixture's disks can be mounted",
    ),
    (
        HoldsMountsForEver,
        "a mount can be unmounted after its views",
    ),
    (
        CannotUnbindTheAbsent,
        "unbinding what was never bound succeeds",
    ),
    (
        ShowsWhatIsNotMounted,
        "a view of what is not mounted is not found and leaves nothing",
    ),
    (
        ShowsDirectoriesThatAreNotThere,
        "a view of a directory that is not there is not found and leaves nothing",
    ),
    (
        LeavesImpossibleTargets,
        "a target that cannot be is refused and leaves nothing",
    ),
    (
        LeavesATraceOfImpossibleTargets,
        "unbinding a target that cannot be changes nothing",
    ),
    (CannotBind, "a mount can be shown at a further place"),
    (HasNoEffect, "binding shows in the tables"),
    (
        TakesTakenTargets,
        "a taken target is a conflict and what is there stays as it was",
    ),
    (
        CannotMapIds,
        "options of a view are honoured, or unsuitable and nothing is left",
    ),
    (
        LetsShownMountsGo,
        "a mount that is shown is busy and stays as it was",
    ),
    (
        UnbindsAllViews,
        "unbinding a view touches no other view of its mount",
    ),
    (UnbindsNothing, "unbinding leaves nothing"),
    (CannotUnbindTwice, "unbinding twice succeeds"),
    (
        HidesThatItIsInDoubt,
        "a bind without an answer is uncertain or leaves nothing",
    ),
    (
        ForgetsViewsInDoubt,
        "unbinding after a bind in doubt succeeds and leaves nothing",
    ),
    (UnbindsWhatIsBusy, "a view that is busy stays as it was"),
    (
        CannotRepeatAnUnbind,
        "an unbind that failed can be repeated and leaves nothing",
    ),
    (
        BindsLate,
        "a bind that was given up has no effect after the unbind",
    ),
    (
        FailsInAnEndedVm,
        "an unbind after the end of the VM is done or gone, and leaves nothing",
    ),
    (
        ForgetsViews,
        "a view that an earlier process made is present",
    ),
    (
        KeepsAdoptedViews,
        "an adopted view can be unbound and leaves nothing",
    ),
    (
        AdoptsAnyOptions,
        "a target with nothing, with a mount or with another view is absent and stays as it was",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_GUESTS, Bug::None, run)
}

async fn run(bug: Bug, everywhere: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::new(), bug);
    let fixture = super::guest_fixture(&mutant.vm, &mutant.memory, everywhere, &looks, from);
    let next = mutant.clone();
    let fixture = fixture.next_binder(move || next.clone());
    try_binder(&mutant, &mutant, &fixture).await
}

impl Mutant<Bug> {
    fn is_bound(&self, target: &Path) -> bool {
        let shows = format!("{} shows", target.display());
        self.vm.left().iter().any(|line| line.starts_with(&shows))
    }

    /// Where there are views.
    fn views(&self) -> Vec<String> {
        let left = self.vm.left();
        let views = left.iter().filter_map(|line| line.split_once(" shows "));
        views.map(|(target, _)| target.to_owned()).collect()
    }
}

#[async_trait]
impl Binder for Mutant<Bug> {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let (source, target) = (&bind.source, &bind.target);
        let absent = vm.device_at(source).is_none();
        let taken = vm.device_at(target).is_some() || self.is_bound(target);
        let missing = bind.options.subpath().starts_with("missing");
        let refused = absent || taken || missing;
        let impossible = !target.starts_with("/run/suite");
        match bug {
            Panics => panics(),
            Hangs => pending().await,
            ShowsWhatIsNotMounted if absent => return Ok(()),
            ShowsDirectoriesThatAreNotThere if missing => {
                let bind = BindMount::new(source, target, ViewOptions::default());
                return vm.bind(&bind).await;
            }
            LeavesImpossibleTargets if impossible => memory.leave(),
            CannotBind if !refused && !impossible => return wrong(),
            HasNoEffect if !refused && !impossible => return Ok(()),
            TakesTakenTargets if self.is_bound(target) => vm.unbind(target).await?,
            CannotMapIds if bind.options.id_map().is_some() => return wrong(),
            // A copy of the mount holds the one that is shown no longer.
            LetsShownMountsGo => memory.see(&source.display()),
            BindsLate => {
                let (vm, bind) = (vm.clone(), bind.clone());
                let late = async move { vm.bind(&bind).await };
                return tokio::spawn(late).await.unwrap();
            }
            _ => {}
        }
        let bound = vm.bind(bind).await;
        let kind = bound.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (CannotUnbindTwice | CannotUnbindTheAbsent | HoldsMountsForEver, Option::None) => {
                memory.spoil();
            }
            (HidesThatItIsInDoubt, Some(ErrorKind::Uncertain)) => return wrong(),
            (ForgetsViewsInDoubt, Some(ErrorKind::Uncertain)) => memory.spoil(),
            (ForgetsViewsInDoubt, Option::None) => memory.mend(),
            _ => {}
        }
        bound
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let bound = self.is_bound(target);
        let impossible = !target.starts_with("/run/suite");
        match bug {
            Panics => panics(),
            CannotUnbindTheAbsent if !memory.is_spoilt() => return wrong(),
            LeavesATraceOfImpossibleTargets if impossible => memory.leave(),
            UnbindsAllViews => {
                for view in self.views() {
                    vm.unbind(Path::new(&view)).await?;
                }
            }
            UnbindsNothing => return Ok(()),
            CannotUnbindTwice if !bound && memory.is_spoilt() => return wrong(),
            ForgetsViewsInDoubt | KeepsAdoptedViews if memory.is_spoilt() => return Ok(()),
            CannotRepeatAnUnbind if memory.is_spoilt() => return wrong(),
            _ => {}
        }
        let unbound = vm.unbind(target).await;
        let kind = unbound.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (UnbindsWhatIsBusy, Some(ErrorKind::Busy)) => vm.unbind(target).await?,
            (CannotRepeatAnUnbind, Some(_)) => memory.spoil(),
            (FailsInAnEndedVm, Some(ErrorKind::Gone)) => return wrong(),
            _ => {}
        }
        unbound
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        let Mutant { vm, bug, memory } = self;
        match bug {
            ForgetsViews => Ok(Presence::Absent),
            AdoptsAnyOptions if self.is_bound(&bind.target) => Ok(Presence::Present(())),
            KeepsAdoptedViews => {
                memory.spoil();
                Binder::adopt(vm, bind).await
            }
            _ => Binder::adopt(vm, bind).await,
        }
    }
}

/// What is shown is mounted by the guest that shows it.
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
            _ => self.vm.mount(device, target, options).await,
        }
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        match self.bug {
            HoldsMountsForEver if self.memory.is_spoilt() => {
                Err(BackendError::busy("a view was there"))
            }
            LetsShownMountsGo if self.memory.has_seen(&target.display()) => {
                let _ = self.vm.unmount(target).await;
                Ok(())
            }
            _ => self.vm.unmount(target).await,
        }
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
