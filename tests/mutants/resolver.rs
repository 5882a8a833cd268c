//! Resolvers that are wrong.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::testing::conformance::try_resolver;
use blockmount::{BackendError, BlockDevice, DeviceLocator, ErrorKind, Resolver};

use super::{Everywhere, Mutant, OF_GUESTS, Outcome, Tried, panics, wrong};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bug {
    None,
    Panics,
    Hangs,
    CannotResolve,
    NamesARelativePath,
    NamesAnEmptyRange,
    NamesAnotherPathEachTime,
    OneDeviceForAll,
    LeavesATrace,
    SearchesForOtherTransports,
    HidesThatAnAddressIsInvalid,
    RemembersRemovedDevices,
    CannotMeasureWhatIsGone,
}

use Bug::*;

const MUTANTS: [(Bug, &str); 12] = [
    (Panics, "a backend never panics"),
    (Hangs, "every call ends"),
    (CannotResolve, "an attached device can be resolved"),
    (NamesARelativePath, "a device is at an absolute path"),
    (NamesAnEmptyRange, "a range is not empty"),
    (NamesAnotherPathEachTime, "a device resolves to one place"),
    (OneDeviceForAll, "two devices resolve to two places"),
    (LeavesATrace, "resolving changes nothing"),
    (
        SearchesForOtherTransports,
        "a locator of another transport is unsuitable",
    ),
    (
        HidesThatAnAddressIsInvalid,
        "an address that makes no sense is invalid or not found",
    ),
    (
        RemembersRemovedDevices,
        "a device that was taken out is not found",
    ),
    (
        CannotMeasureWhatIsGone,
        "to measure a device that was taken out finds nothing",
    ),
];

pub(super) fn try_all() -> Vec<Tried> {
    super::try_all(&MUTANTS, &OF_GUESTS, Bug::None, run)
}

async fn run(bug: Bug, everywhere: Everywhere, looks: Arc<AtomicUsize>, from: usize) -> Outcome {
    let mutant = Mutant::new(FakeVm::new(), bug);
    let fixture = super::guest_fixture(&mutant.vm, &mutant.memory, everywhere, &looks, from);
    try_resolver(&mutant, &fixture).await
}

#[async_trait]
impl Resolver for Mutant<Bug> {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        match self.bug {
            Panics => panics(),
            Hangs => pending().await,
            CannotResolve => return wrong(),
            _ => {}
        }
        let found = self.vm.resolve(device).await;
        let kind = found.as_ref().err().map(BackendError::kind);
        match (self.bug, kind) {
            (NamesARelativePath, Option::None) => Ok(BlockDevice::new(format!("dev/{device}"))),
            (NamesAnEmptyRange, Option::None) => {
                Ok(BlockDevice::new("/dev/sda").with_range(512..512))
            }
            (NamesAnotherPathEachTime, Option::None) => {
                Ok(BlockDevice::new(format!("/dev/{}", self.memory.count())))
            }
            (OneDeviceForAll, Option::None) => Ok(BlockDevice::new("/dev/sda")),
            (LeavesATrace, Option::None) => {
                self.memory.leave();
                found
            }
            (SearchesForOtherTransports, Some(ErrorKind::Unsuitable)) => {
                Err(BackendError::not_found("it has not appeared"))
            }
            (HidesThatAnAddressIsInvalid, Some(ErrorKind::Invalid)) => wrong(),
            (RemembersRemovedDevices, Option::None) => {
                self.memory.see(device);
                found
            }
            (RemembersRemovedDevices, Some(_)) if self.memory.has_seen(device) => {
                Ok(BlockDevice::new(format!("/dev/{device}")))
            }
            _ => found,
        }
    }

    async fn measure(&self, device: &DeviceLocator) -> Result<bool, BackendError> {
        match self.bug {
            CannotMeasureWhatIsGone => wrong(),
            _ => self.vm.measure(device).await,
        }
    }
}
