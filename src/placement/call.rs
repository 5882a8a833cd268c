//! A call of the hypervisor for one disk, and what becomes of its allocation.

use std::fmt;

use super::{Allocation, Outcome, Placement};
use crate::{BackendError, Disk, ErrorKind, Presence};

/// A call of the hypervisor for one disk. No other call for this disk begins before it is dropped.
///
/// It is made before the call, and what becomes of the allocation is recorded when it is dropped. So a future that is
/// dropped and a panic leave the allocation [in doubt](Outcome::InDoubt), unless [`assume`](Self::assume) says otherwise.
#[must_use = "a call that is dropped leaves its allocation in doubt"]
pub struct Call<P: Allocation> {
    pub(super) placement: Placement<P>,
    pub(super) disk: Disk,
    pub(super) outcome: Outcome,
}

impl<P: Allocation> Call<P> {
    /// Where the disk is to be, or is to be taken from.
    pub fn address(&self) -> P::Address {
        self.update(|allocation| allocation.address())
    }

    /// Looks at the allocation, or changes it: for what is only known during the call. `work` runs with the lock held, and
    /// must not call the placement.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the record of a busy disk is removed by its call alone"
    )]
    pub fn update<T>(&self, work: impl FnOnce(&mut P) -> T) -> T {
        let mut table = self.placement.table();
        let record = table.disks.get_mut(&self.disk);
        work(&mut record.expect("the record of a busy disk stays").allocation)
    }

    /// Sets what is recorded if this is dropped before it is ended: [`Outcome::Absent`] where dropping the call's future
    /// takes the disk out.
    pub fn assume(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// Ends the call.
    pub fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// Ends an attach by the hypervisor's answer, which it returns.
    ///
    /// # Errors
    ///
    /// Those of the answer. After `Uncertain` the allocation is in doubt, after any other it is free.
    pub fn attached(self, answer: Result<(), BackendError>) -> Result<(), BackendError> {
        self.end(match answer.as_ref().map_err(BackendError::kind) {
            Ok(()) => Outcome::Present,
            Err(ErrorKind::Uncertain) => Outcome::InDoubt,
            Err(_) => Outcome::Absent,
        });
        answer
    }

    /// Ends a detach by the hypervisor's answer, which it returns.
    ///
    /// # Errors
    ///
    /// Those of the answer. After `Gone` and `LostWrites` the allocation is free, after any other it is in doubt.
    pub fn detached(self, answer: Result<(), BackendError>) -> Result<(), BackendError> {
        self.end(match answer.as_ref().map_err(BackendError::kind) {
            Ok(()) | Err(ErrorKind::Gone | ErrorKind::LostWrites) => Outcome::Absent,
            Err(_) => Outcome::InDoubt,
        });
        answer
    }

    /// Whether an attach was answered with `Conflict`. From then on what is at the address counts as
    /// [foreign](Outcome::Foreign) if this is dropped, because it must not be detached.
    pub fn met_conflict(&mut self, answer: &Result<(), BackendError>) -> bool {
        let kind = answer.as_ref().map_err(BackendError::kind);
        let is_conflict = kind == Err(ErrorKind::Conflict);
        if is_conflict {
            self.assume(Outcome::Foreign);
        }
        is_conflict
    }

    /// Ends an adoption by what was found, which it returns. Where something else was found at the address, end the call
    /// with [`Outcome::Foreign`] and answer [`Presence::Absent`].
    ///
    /// # Errors
    ///
    /// Those of `found`. After `Gone` the allocation is free, after any other it is in doubt.
    pub fn adopted<T>(
        self,
        found: Result<Presence<T>, BackendError>,
    ) -> Result<Presence<T>, BackendError> {
        self.end(match found.as_ref().map_err(BackendError::kind) {
            Ok(Presence::Present(_)) => Outcome::Present,
            Ok(Presence::Absent) | Err(ErrorKind::Gone) => Outcome::Absent,
            Ok(Presence::Unknown) | Err(_) => Outcome::InDoubt,
        });
        found
    }
}

impl<P: Allocation> Drop for Call<P> {
    fn drop(&mut self) {
        let mut table = self.placement.table();
        let Some(mut record) = table.disks.remove(&self.disk) else {
            return;
        };
        match self.outcome {
            Outcome::Absent => record.allocation.vacate(),
            Outcome::Retained => table.retained.push((self.disk.clone(), record.allocation)),
            Outcome::Foreign => table.foreign.push(record.allocation),
            Outcome::Present | Outcome::InDoubt => {
                record.busy = false;
                record.in_doubt = self.outcome == Outcome::InDoubt;
                table.disks.insert(self.disk.clone(), record);
            }
        }
    }
}

impl<P: Allocation> fmt::Debug for Call<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("disk", &self.disk)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}
