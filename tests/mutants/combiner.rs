//! Layer combiners that are wrong.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_combiner;
use blockmount::{
    BackendError, DeviceLocator, ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Usage,
};

use super::{Everywhere, Mutant, OF_GUESTS, Outcome, Tried, panics, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    HasDisksThatCannotBeMounted,
    HoldsLayersForEver,
    CannotSeparateTheAbsent,
    StopsAtAMissingLayer,
    CombinesNothing,
    TakesTakenTargets,
    CannotCombine,
    HasNoEffect,
    SeparatesNothing,
    CannotSeparateTwice,
    CannotTakeAScratch,
    HidesThatItIsInDoubt,
    ForgetsOverlaysInDoubt,
    SeparatesWhatIsBusy,
    CannotRepeatASeparate,
    CombinesLate,
    FailsInAnEndedVm,
    ForgetsOverlays,
    KeepsAdoptedOverlays,
    AdoptsAnyTarget,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 22] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (
        HasDisksThatCannotBeMounted,
        "the fixture's disks can be mounted",
    ),
    (HoldsLayersForEver, "layers are free after their overlay"),
    (
        CannotSeparateTheAbsent,
        "separating what was never combined succeeds",
    ),
    (
        StopsAtAMissingLayer,
        "a layer that is not there is not found and leaves nothing",
    ),
    (
        CombinesNothing,
        "an overlay without layers is invalid and leaves nothing",
    ),
    (
        TakesTakenTargets,
        "a taken target is a conflict and what is there stays as it was",
    ),
    (CannotCombine, "mounted layers can be combined"),
    (HasNoEffect, "combining shows in the tables"),
    (SeparatesNothing, "separating leaves nothing"),
    (CannotSeparateTwice, "separating twice succeeds"),
    (
        CannotTakeAScratch,
        "mounted layers and a scratch can be combined",
    ),
    (
        HidesThatItIsInDoubt,
        "a combine without an answer is uncertain or leaves nothing",
    ),
    (
        ForgetsOverlaysInDoubt,
        "separating after a combine in doubt succeeds and leaves nothing",
    ),
    (
        SeparatesWhatIsBusy,
        "an overlay that is busy stays as it was",
    ),
    (
        CannotRepeatASeparate,
        "a separate that failed can be repeated and leaves nothing",
    ),
    (
        CombinesLate,
        "a combine that was given up has no effect after the separate",
    ),
    (
        FailsInAnEndedVm,
        "a separate after the end of the VM is done or gone, and leaves nothing",
    ),
    (
        ForgetsOverlays,
        "an overlay that an earlier process made is present",
    ),
    (
        KeepsAdoptedOverlays,
        "an adopted overlay can be separated and leaves nothing",
    ),
    (
        AdoptsAnyTarget,
        "a target with nothing, or with a mount, is absent and stays as it was",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_GUESTS, Bug::None, run)
}

async fn run(bug: Bug, everywhere: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::new(), bug);
    let fixture = super::guest_fixture(&mutant.vm, &mutant.memory, everywhere, &looks, from);
    let next = mutant.clone();
    let fixture = fixture.next_combiner(move || next.clone());
    try_combiner(&mutant, &mutant, &fixture).await
}

impl Mutant<Bug> {
    fn is_combined(&self, target: &Path) -> bool {
        let overlay = format!("{} overlays", target.display());
        self.vm.left().iter().any(|line| line.starts_with(&overlay))
    }
}

#[async_trait]
impl LayerCombiner for Mutant<Bug> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let missing = overlay.layers.iter().any(|at| vm.device_at(at).is_none());
        let taken = vm.device_at(&overlay.target).is_some();
        let refused = missing || taken || overlay.layers.is_empty();
        match bug {
            Panics => panics(),
            Hangs => pending().await,
            StopsAtAMissingLayer if missing => memory.leave(),
            CombinesNothing if overlay.layers.is_empty() => return Ok(()),
            TakesTakenTargets if taken => vm.unmount(&overlay.target).await?,
            CannotCombine if !refused => return wrong(),
            HasNoEffect if !refused => return Ok(()),
            CannotTakeAScratch if overlay.scratch.is_some() => return wrong(),
            CombinesLate => {
                let (vm, overlay) = (vm.clone(), overlay.clone());
                let late = async move { vm.combine(&overlay).await };
                return tokio::spawn(late).await.unwrap();
            }
            _ => {}
        }
        let combined = vm.combine(overlay).await;
        let kind = combined.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (CannotSeparateTwice | CannotSeparateTheAbsent | HoldsLayersForEver, Option::None) => {
                memory.spoil();
            }
            (HidesThatItIsInDoubt, Some(ErrorKind::Uncertain)) => return wrong(),
            (ForgetsOverlaysInDoubt, Some(ErrorKind::Uncertain)) => memory.spoil(),
            (ForgetsOverlaysInDoubt, Option::None) => memory.mend(),
            _ => {}
        }
        combined
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let combined = self.is_combined(target);
        match bug {
            Panics => panics(),
            CannotSeparateTheAbsent if !memory.is_spoilt() => return wrong(),
            SeparatesNothing => return Ok(()),
            CannotSeparateTwice if !combined && memory.is_spoilt() => return wrong(),
            ForgetsOverlaysInDoubt | KeepsAdoptedOverlays if memory.is_spoilt() => return Ok(()),
            CannotRepeatASeparate if memory.is_spoilt() => return wrong(),
            _ => {}
        }
        let separated = vm.separate(target).await;
        let kind = separated.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (SeparatesWhatIsBusy, Some(ErrorKind::Busy)) => vm.separate(target).await?,
            (CannotRepeatASeparate, Some(_)) => memory.spoil(),
            (FailsInAnEndedVm, Some(ErrorKind::Gone)) => return wrong(),
            _ => {}
        }
        separated
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        let Mutant { vm, bug, memory } = self;
        match bug {
            ForgetsOverlays => Ok(Presence::Absent),
            AdoptsAnyTarget => Ok(Presence::Present(())),
            KeepsAdoptedOverlays => {
                memory.spoil();
                LayerCombiner::adopt(vm, overlay).await
            }
            _ => LayerCombiner::adopt(vm, overlay).await,
        }
    }
}

/// The layers are mounted by the guest that combines them.
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
            HoldsLayersForEver if self.memory.is_spoilt() => {
                Err(BackendError::busy("a layer of an overlay"))
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
