//! What killed runs have left in virtual machines of others, which go on: it is released there, as a program that goes on with the
//! run would do.

use super::report::{Item, Outcome};
use super::scan::{self, Unwanted};
use crate::failure::Failure;
use crate::guest::{ForeignVm, OtherFiles, Place};
use crate::interrupt::Interrupt;
use crate::machine::Machine;
use crate::run::{Remembered, Run, RunPaths};

/// A run that has ended, and may have left something in such a machine.
struct Left {
    paths: RunPaths,
    remembered: Remembered,
    vm: ForeignVm,
}

/// Says what would be released, or releases it.
pub(super) async fn clean_up(
    dry_run: bool,
    unwanted: &Unwanted,
    interrupt: &Interrupt,
) -> Result<Vec<Item>, Failure> {
    let wanted = unwanted.clone();
    let left = interrupt.blocking(move |_| find(&wanted)).await?;
    let mut items = Vec::new();
    for left in left {
        interrupt.check()?;
        let outcome = match dry_run {
            true => Outcome::Found,
            false => match release(&left, interrupt).await {
                Ok(()) => Outcome::Removed,
                Err(failure) => Outcome::Left(failure.on_one_line()),
            },
        };
        items.push(Item::in_machine(&left.paths.id, &left.vm.monitor, outcome));
    }
    Ok(items)
}

/// Nobody is shut out any longer when this returns: whoever takes over a run has its lock.
fn find(unwanted: &Unwanted) -> Result<Vec<Left>, Failure> {
    let found = scan::scan(unwanted)?;
    let left = found.dead.iter().filter_map(|dead| {
        let remembered = dead.paths.remembered()?;
        Some(Left {
            paths: dead.paths.clone(),
            vm: remembered.vm.clone()?,
            remembered,
        })
    });
    Ok(left.collect())
}

async fn release(left: &Left, interrupt: &Interrupt) -> Result<(), Failure> {
    if left.vm.has_ended().await {
        return Ok(());
    }
    let run = || Run::resume_dead(&left.paths, &left.remembered);
    let place = Place::Foreign(left.vm.clone(), OtherFiles::Refused);
    let mut machine = Machine::start(place, run, interrupt).await?;
    if let Some(recovery) = machine.take_recovery() {
        for error in recovery.settle().await.failed {
            // The end of the run tries it again, and says what stays.
            tracing::info!(%error, "what a run has left is not all released at once");
        }
    }
    machine.end(interrupt).await.result
}
