//! An activation that is there, of this process or of an earlier one.

use std::sync::Arc;

use blockmount::{ErrorKind, Recovery};

use super::record::{Progress, Record};
use super::vm::Vm;
use crate::{Performed, Unreleased};

/// An activation that is there.
#[derive(Debug)]
pub(super) struct Entry {
    /// Where it is.
    pub(super) vm: Arc<Vm>,
    pub(super) record: Record,
    pub(super) held: Holding,
    /// Whether it is of an earlier process, and no client has asked for it since.
    pub(super) unclaimed: bool,
}

/// What holds it.
#[derive(Debug)]
pub(super) enum Holding {
    Up(Performed),
    /// It could not be taken back, or not all of it.
    Unreleased(Unreleased),
    /// Whoever is at work has it.
    Taken,
}

/// The activation of a record, if it is whole and to be kept; what is there of any other is released.
pub(super) async fn take_over(recovery: &Recovery, vm: &Arc<Vm>, record: Record) -> Option<Entry> {
    let points = record
        .info
        .active
        .iter()
        .map(|mount| mount.mount_point.clone());
    let claimed = Performed::claim(recovery, &record.holders, points.collect());
    let (namespace, name) = (&record.info.namespace, &record.info.name);
    let rest = match claimed {
        Ok(performed) if record.progress == Progress::Up && !record.temporary => {
            return Some(Entry {
                vm: vm.clone(),
                record,
                held: Holding::Up(performed),
                unclaimed: true,
            });
        }
        Ok(performed) => performed,
        Err(lost) => {
            if record.progress == Progress::Up {
                let error = &lost.errors[0];
                tracing::warn!(namespace, name, %error, "an activation is not there in whole any more; the rest of it is released");
            }
            lost.rest
        }
    };
    match rest.release().await {
        Ok(()) => None,
        Err(error) if error.kind() == ErrorKind::LostWrites => {
            tracing::warn!(namespace, name, %error, "an activation is released, and writes were lost");
            None
        }
        Err(error) => {
            tracing::warn!(namespace, name, %error, "an activation cannot be released yet");
            Some(Entry {
                vm: vm.clone(),
                record,
                held: Holding::Unreleased(error),
                unclaimed: false,
            })
        }
    }
}
