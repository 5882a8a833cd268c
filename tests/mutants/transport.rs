//! Transports that are wrong.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_transport;
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};

use super::{Everywhere, Mutant, OF_EVERY_SUITE, Outcome, Tried, panics, suite, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    CannotIdentify,
    NewIdEachTime,
    OneIdForAll,
    TakesNamesForDisks,
    LeavesATraceOfIdentify,
    IdentifiesTheMissing,
    CannotDetachTheAbsent,
    KeepsASlotForTheMissing,
    CannotDetachAfterAFailure,
    CannotAttach,
    AttachesNothing,
    DetachesNothing,
    CannotDetachTwice,
    ChangesItsScheme,
    OneLocatorForAll,
    DetachesOthersToo,
    AttachesOneAtATime,
    DetachesOneAtATime,
    HidesThatItIsFull,
    StaysFull,
    LosesTheLastSlot,
    NeedsTheSourceToDetach,
    HidesThatItIsInDoubt,
    ForgetsDisksInDoubt,
    DetachesWhatIsBusy,
    CannotRepeatADetach,
    AttachesLate,
    GivesAwaySlotsInDoubt,
    LosesSlotsThatWereInDoubt,
    MakesDisksSmaller,
    GrowsWhatIsAbsent,
    LeavesSomethingInAnEndedVm,
    ForgetsEverything,
    NeedsTheLocator,
    LeavesATraceOfAdoption,
    AdoptsWithoutKnowing,
    AdoptsWhatIsNotThere,
    AdoptsWhateverIsThere,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 40] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (CannotIdentify, "a disk that is there has an id"),
    (NewIdEachTime, "a disk has one id"),
    (OneIdForAll, "different disks have different ids"),
    (TakesNamesForDisks, "a disk has one id under all its names"),
    (LeavesATraceOfIdentify, "identify changes nothing"),
    (IdentifiesTheMissing, "a missing disk is not found"),
    (
        CannotDetachTheAbsent,
        "detaching what was never attached succeeds",
    ),
    (
        KeepsASlotForTheMissing,
        "attaching a missing disk is not found and leaves nothing",
    ),
    (
        CannotDetachAfterAFailure,
        "detaching after a failed attach succeeds",
    ),
    (CannotAttach, "a disk can be attached"),
    (AttachesNothing, "attaching shows in the tables"),
    (DetachesNothing, "detaching leaves nothing"),
    (CannotDetachTwice, "detaching twice succeeds"),
    (ChangesItsScheme, "all locators are of one transport"),
    (OneLocatorForAll, "two disks have two locators"),
    (DetachesOthersToo, "detaching touches no other disk"),
    (AttachesOneAtATime, "disks can be attached at once"),
    (DetachesOneAtATime, "disks can be detached at once"),
    (
        HidesThatItIsFull,
        "one disk more than fits is refused as full and leaves nothing",
    ),
    (StaysFull, "a detach frees a slot"),
    (LosesTheLastSlot, "a full transport can be emptied"),
    (
        NeedsTheSourceToDetach,
        "a disk whose source is gone can be detached",
    ),
    (
        HidesThatItIsInDoubt,
        "an attach without an answer is uncertain or leaves nothing",
    ),
    (
        ForgetsDisksInDoubt,
        "detaching after an attach in doubt succeeds and leaves nothing",
    ),
    (
        DetachesWhatIsBusy,
        "a disk whose detach is busy stays as it was",
    ),
    (
        CannotRepeatADetach,
        "a detach that failed can be repeated and leaves nothing",
    ),
    (
        AttachesLate,
        "an attach that was given up has no effect after the detach",
    ),
    (
        GivesAwaySlotsInDoubt,
        "the slot of a disk in doubt is not given to another",
    ),
    (
        LosesSlotsThatWereInDoubt,
        "detaching a disk in doubt frees its slot and touches no other disk",
    ),
    (MakesDisksSmaller, "a disk is never made smaller"),
    (
        GrowsWhatIsAbsent,
        "growing a disk that is not attached is refused and changes nothing",
    ),
    (
        LeavesSomethingInAnEndedVm,
        "a detach after the end of the VM is done or gone, and leaves nothing",
    ),
    (
        ForgetsEverything,
        "a disk that an earlier process attached is present where it was",
    ),
    (
        NeedsTheLocator,
        "a disk that an earlier process attached is found without its locator",
    ),
    (LeavesATraceOfAdoption, "an adoption changes nothing"),
    (
        AdoptsWithoutKnowing,
        "an adopted disk can be detached and leaves nothing",
    ),
    (
        AdoptsWhatIsNotThere,
        "a disk that is not attached is absent",
    ),
    (
        AdoptsWhateverIsThere,
        "a disk is absent where another one is, and a detach of it leaves that one alone",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_EVERY_SUITE, Bug::None, run)
}

async fn run(bug: Bug, _: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::with_slots(suite::CAPACITY), bug);
    let fixture = super::transport_fixture(&mutant.vm, &mutant.memory, &looks, from);
    let next = mutant.clone();
    let successor = move || Mutant {
        vm: next.vm.restart(),
        ..next.clone()
    };
    try_transport(&mutant, &fixture.successor(successor)).await
}

/// Counts the calls that run at once.
struct AtOnce<'a>(&'a AtomicUsize);

impl Drop for AtOnce<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Mutant<Bug> {
    async fn one_at_a_time(&self) -> Result<AtOnce<'_>, BackendError> {
        let others = self.memory.count();
        let guard = AtOnce(&self.memory.calls);
        tokio::task::yield_now().await;
        match others {
            0 => Ok(guard),
            _ => wrong(),
        }
    }

    fn is_missing(&self, disk: &Disk) -> bool {
        disk.source().ends_with("missing")
    }
}

#[async_trait]
impl Transport for Mutant<Bug> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        match self.bug {
            Panics => panics(),
            Hangs => pending().await,
            CannotIdentify => wrong(),
            NewIdEachTime => Ok(DiskId::name(&self.memory.count().to_string())),
            OneIdForAll => Ok(DiskId::name("the disk")),
            TakesNamesForDisks => Ok(DiskId::name(&disk.source().display().to_string())),
            LeavesATraceOfIdentify => {
                self.memory.leave();
                self.vm.identify(disk).await
            }
            IdentifiesTheMissing if self.is_missing(disk) => Ok(DiskId::name("missing")),
            _ => self.vm.identify(disk).await,
        }
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let Mutant { vm, bug, memory } = self;
        match bug {
            CannotAttach if !self.is_missing(disk) => return wrong(),
            AttachesNothing if !self.is_missing(disk) => return Ok("fake:0".parse().unwrap()),
            StaysFull if memory.is_spoilt() => return Err(BackendError::full("for ever")),
            LosesSlotsThatWereInDoubt if memory.is_spoilt() && vm.left().len() == 2 => {
                return Err(BackendError::full("one slot is lost"));
            }
            AttachesOneAtATime => {
                let _alone = self.one_at_a_time().await?;
                return vm.attach(disk, id).await;
            }
            AttachesLate => {
                let (vm, disk, id) = (vm.clone(), disk.clone(), id.clone());
                let late = tokio::spawn(async move { vm.attach(&disk, &id).await });
                return late.await.unwrap();
            }
            _ => {}
        }
        let attached = vm.attach(disk, id).await;
        let kind = attached.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (CannotDetachTwice, Option::None) => memory.see(disk),
            (KeepsASlotForTheMissing, Some(ErrorKind::NotFound)) => memory.leave(),
            (CannotDetachAfterAFailure, Some(_)) => memory.spoil(),
            (ChangesItsScheme, Option::None) if memory.count() > 0 => {
                return Ok("other:0".parse().unwrap());
            }
            (OneLocatorForAll, Option::None) => return Ok("fake:0".parse().unwrap()),
            (HidesThatItIsFull, Some(ErrorKind::Full)) => return wrong(),
            (StaysFull, Some(ErrorKind::Full)) => memory.spoil(),
            (HidesThatItIsInDoubt, Some(ErrorKind::Uncertain)) => return wrong(),
            (ForgetsDisksInDoubt, Some(ErrorKind::Uncertain)) => memory.spoil(),
            (GivesAwaySlotsInDoubt, Some(ErrorKind::Uncertain)) => vm.detach(disk).await?,
            (LosesSlotsThatWereInDoubt, Some(ErrorKind::Uncertain)) => memory.see(disk),
            _ => {}
        }
        attached
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Mutant { vm, bug, memory } = self;
        let at = vm.locator_of(disk);
        let in_last_slot = at.as_ref().is_some_and(|at| at.address() == "2");
        match bug {
            CannotDetachTheAbsent if at.is_none() => return wrong(),
            CannotDetachAfterAFailure if memory.is_spoilt() => return wrong(),
            CannotDetachTwice if at.is_none() && memory.has_seen(disk) => return wrong(),
            CannotRepeatADetach if memory.is_spoilt() => return wrong(),
            DetachesNothing => return Ok(()),
            ForgetsDisksInDoubt if memory.is_spoilt() => return Ok(()),
            NeedsTheSourceToDetach if !self.is_missing(disk) => drop(vm.identify(disk).await?),
            DetachesOthersToo if disk.source().ends_with("b") => {
                vm.detach(&suite::disk("a")).await?;
            }
            DetachesOneAtATime => {
                let _alone = self.one_at_a_time().await?;
                return vm.detach(disk).await;
            }
            LosesSlotsThatWereInDoubt if memory.has_seen(disk) && vm.left().len() > 1 => {
                memory.spoil();
            }
            LosesTheLastSlot if in_last_slot => memory.leave(),
            _ => {}
        }
        let detached = vm.detach(disk).await;
        let kind = detached.as_ref().err().map(BackendError::kind);
        match (bug, kind) {
            (DetachesWhatIsBusy, Some(ErrorKind::Busy)) => vm.detach(disk).await?,
            (CannotRepeatADetach, Some(_)) => memory.spoil(),
            (LeavesSomethingInAnEndedVm, Some(ErrorKind::Gone)) => memory.leave(),
            _ => {}
        }
        detached
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        let resized = self.vm.resize(disk, bytes).await;
        let kind = resized.as_ref().err().map(BackendError::kind);
        match (self.bug, kind) {
            (MakesDisksSmaller, Some(ErrorKind::Invalid)) => Ok(()),
            (GrowsWhatIsAbsent, Some(ErrorKind::NotFound)) => Ok(()),
            _ => resized,
        }
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let Mutant { vm, bug, memory } = self;
        match (bug, locator) {
            (ForgetsEverything, _) | (NeedsTheLocator, Option::None) => Ok(Presence::Absent),
            (AdoptsWithoutKnowing, _) => match vm.locator_of(disk) {
                Some(there) => Ok(Presence::Present(there)),
                Option::None => Ok(Presence::Absent),
            },
            (LeavesATraceOfAdoption, _) => {
                memory.leave();
                vm.adopt(disk, id, locator).await
            }
            (AdoptsWhatIsNotThere, Some(at)) if vm.left().is_empty() => {
                Ok(Presence::Present(at.clone()))
            }
            (AdoptsWhateverIsThere, Some(at))
                if !vm.left().is_empty() && vm.locator_of(disk).as_ref() != Some(at) =>
            {
                Ok(Presence::Present(at.clone()))
            }
            _ => vm.adopt(disk, id, locator).await,
        }
    }
}
