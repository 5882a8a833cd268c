//! What a VM has, as its hypervisor shows it: which disks of an earlier process are there, and what is foreign.

use super::{Allocation, Call, Outcome, Placement};
use crate::{BackendError, Disk, DiskId, ErrorKind, Presence};

/// A disk that a VM has, attached by any process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Occupant<A> {
    /// Where it is.
    pub address: A,
    /// Which disk it is, as [`Transport::identify`](crate::Transport::identify) would answer; none if the hypervisor does
    /// not show that.
    pub id: Option<DiskId>,
    /// Whether all of it is there, so that the guest has the disk.
    pub is_whole: bool,
}

impl<A> Occupant<A> {
    /// A disk at an address.
    pub fn new(address: A, id: Option<DiskId>) -> Self {
        let is_whole = true;
        Occupant {
            address,
            id,
            is_whole,
        }
    }

    /// What is left of a disk whose attachment or detachment was cut off, such as an open image without its device. It is
    /// adopted as [`Presence::Unknown`], so that it is detached before its address is used.
    #[must_use]
    pub fn half_done(self) -> Self {
        let is_whole = false;
        Occupant { is_whole, ..self }
    }
}

impl<P: Allocation> Placement<P> {
    /// Keeps from all disks what the VM has that is not of this placement. Call it before each attach: `list` is awaited
    /// until it has answered once. `allocate` sets an address aside, and answers nothing for one that is set aside already.
    ///
    /// # Errors
    ///
    /// Those of `list`, but none if it is `Unsuitable`, because the hypervisor shows nothing.
    pub async fn survey(
        &self,
        list: impl Future<Output = Result<Vec<Occupant<P::Address>>, BackendError>>,
        allocate: impl Fn(&P::Address) -> Option<P>,
    ) -> Result<(), BackendError> {
        let survey = async || {
            let occupants = match list.await {
                Err(error) if error.kind() == ErrorKind::Unsuitable => return Ok(()),
                // Nothing was attached yet that could be in doubt.
                Err(error) if error.kind() == ErrorKind::Uncertain => {
                    let message = "cannot find out what the VM has already";
                    return Err(BackendError::other(message).with_source(error));
                }
                occupants => occupants?,
            };
            let foreign = occupants
                .iter()
                .filter_map(|found| allocate(&found.address));
            foreign.for_each(|allocation| self.add_foreign(allocation));
            Ok(())
        };
        self.0.surveyed.get_or_try_init(survey).await.map(drop)
    }

    /// As [`attach`](Self::attach), and where nothing is free, once more after the foreign allocations are free whose occupant
    /// `list` does not show any more. `list` is awaited only then. `is_in` says whether what is at its first address is in
    /// the way of its second.
    ///
    /// # Errors
    ///
    /// `Conflict` if the disk is attached, or may be. Where `list` fails, all foreign allocations stay.
    pub async fn attach_or_vacate(
        &self,
        disk: &Disk,
        allocate: impl Fn() -> Option<P>,
        list: impl Future<Output = Result<Vec<Occupant<P::Address>>, BackendError>>,
        is_in: impl Fn(&P::Address, &P::Address) -> bool,
    ) -> Result<Option<Call<P>>, BackendError> {
        if let Some(call) = self.attach(disk, &allocate)? {
            return Ok(Some(call));
        }
        if !self.foreign().is_empty()
            && let Ok(list) = list.await
        {
            let is_there = |at: &P::Address| list.iter().any(|found| is_in(&found.address, at));
            self.vacate_foreign(|kept| !is_there(&kept.address()));
        }
        self.attach(disk, allocate)
    }

    /// Adopts a disk by what the hypervisor lists; see [`Transport::adopt`](crate::Transport::adopt). `at` is where a journal
    /// has it. `allocate` sets an address aside, and answers nothing for one that cannot be or is set aside already;
    /// `is_in` says whether what is at its first address is in the way of its second.
    ///
    /// # Errors
    ///
    /// `Conflict` if the disk is attached.
    pub fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        at: Option<P::Address>,
        list: Result<Vec<Occupant<P::Address>>, BackendError>,
        allocate: impl Fn(&P::Address) -> Option<P>,
        is_in: impl Fn(&P::Address, &P::Address) -> bool,
    ) -> Result<Presence<P::Address>, BackendError> {
        let list = match list {
            Err(error) if error.kind() == ErrorKind::Gone => return Ok(Presence::Absent),
            list => list.ok(),
        };
        let is_ours = |found: &&Occupant<P::Address>| found.id.as_ref() == Some(id);
        let shown = || list.iter().flatten().find(is_ours);
        let Some(at) = at.or_else(|| Some(shown()?.address.clone())) else {
            let is_known = list.is_some_and(|list| list.iter().all(|found| found.id.is_some()));
            return Ok(match is_known {
                true => Presence::Absent,
                false => Presence::Unknown,
            });
        };
        let Some(call) = self.attach(disk, || allocate(&at))? else {
            return Ok(Presence::Absent);
        };
        let Some(list) = list else {
            return call.adopted(Ok(Presence::Unknown));
        };
        match list.iter().find(|found| is_in(&found.address, &at)) {
            None => call.adopted(Ok(Presence::Absent)),
            Some(found) if found.id.is_none() => call.adopted(Ok(Presence::Unknown)),
            Some(found) if found.address == at && is_ours(&found) => {
                call.adopted(Ok(match found.is_whole {
                    true => Presence::Present(at),
                    false => Presence::Unknown,
                }))
            }
            Some(_) => {
                call.end(Outcome::Foreign);
                Ok(Presence::Absent)
            }
        }
    }
}
