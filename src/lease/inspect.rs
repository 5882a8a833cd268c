//! Looking at a table without touching it.

use super::entry::State;
use super::{Driver, Table};
use crate::inspect::{LeaseState, LeaseStatus};
use crate::sync::lock;

impl<D: Driver> Table<D> {
    /// Reads each entry, what is up of it, and how far it is. The entry's job is left alone: a task that finds it taken takes that for
    /// work under way.
    pub(crate) fn inspect<T>(
        &self,
        mut read: impl FnMut(&D::Key, Option<&D::Resource>, LeaseStatus) -> T,
    ) -> Vec<T> {
        let mut seen = Vec::new();
        for entry in self.entries.snapshot() {
            let resource = entry.resource.get();
            let status = match &lock(&entry.held).state {
                State::Gone(_) => continue,
                State::Idle => LeaseStatus::new(LeaseState::Starting, 0, 0, None),
                State::Up(shares) => LeaseStatus::new(LeaseState::Up, shares.count, 0, None),
                State::Lingering(_) => LeaseStatus::new(LeaseState::Lingering, 0, 0, None),
                State::Draining(failed) => {
                    let state = match failed {
                        Some(_) => LeaseState::Pending,
                        None if resource.is_some() => LeaseState::Ending,
                        None => LeaseState::Starting,
                    };
                    let attempts = failed.as_ref().map_or(0, |failed| failed.attempts);
                    LeaseStatus::new(
                        state,
                        0,
                        attempts,
                        failed.as_ref().map(|failed| &failed.error),
                    )
                }
            };
            seen.push(read(&entry.key, resource, status));
        }
        seen
    }
}
