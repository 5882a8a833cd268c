//! Finding and removing what killed runs have left: mounts first, then mapped devices, then loop devices, then files.
//!
//! Something is ours if it carries the mark of a run that root's own directory of runs knows, or is mounted from a device
//! that does; it is left over if the lock of that run is free. A mark of any other run may be that of a living one with
//! another directory (another container), or a forgery. Everything else is left alone, and shown where it is in the way.

mod in_machines;
mod remove;
mod report;
mod scan;

use blockmount::HolderName;

use crate::args::CleanupArgs;
use crate::failure::{FAILED, Failure};
use crate::guest::abandoned_state;
use crate::interrupt::{Interrupt, Stop};
use crate::run::Remembered;
use crate::terminal::{print, print_json};

use report::{Item, Outcome, Report};
use scan::Unwanted;

/// Cleans up, or only looks. `Ok` is the exit status: 1 if something had to be left.
pub(crate) async fn run(args: CleanupArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    interrupt.now("cleaning up");
    let dry_run = args.dry_run;
    let unwanted = match args.resumable {
        None => Unwanted::Nothing,
        Some(None) => Unwanted::All,
        Some(Some(name)) => Unwanted::Named(name),
    };
    let in_machines = in_machines::clean_up(dry_run, &unwanted, &interrupt).await?;
    let report = interrupt
        .blocking(move |stop| clean_up(dry_run, &unwanted, in_machines, stop))
        .await?;
    match args.json {
        true => print_json(&report)?,
        false => print(&report.to_text())?,
    }
    Ok(if dry_run || report.is_clean() {
        0
    } else {
        FAILED
    })
}

/// Removes what programs have left on this machine that were killed while nobody held what they had begun under this name, such as
/// a virtual machine that was coming up.
pub(crate) async fn remove_abandoned(
    name: &HolderName,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let name = name.clone();
    interrupt
        .blocking(move |stop| {
            let mut found = scan::scan(&Unwanted::Nothing)?;
            // What is in a machine of somebody else is taken out of it first.
            let is_meant = |run: Remembered| run.name == name && run.vm.is_none();
            let dead = &mut found.dead;
            dead.retain(|dead| dead.paths.remembered().is_some_and(is_meant));
            for item in remove::remove(&found, Vec::new(), stop)? {
                tracing::info!(?item, "left by a program that was killed at its start");
            }
            Ok(())
        })
        .await
}

fn clean_up(
    dry_run: bool,
    unwanted: &Unwanted,
    in_machines: Vec<Item>,
    stop: &Stop,
) -> Result<Report, Failure> {
    let found = scan::scan(unwanted)?;
    let mut items = match dry_run {
        true => remove::show(&found, in_machines),
        false => remove::remove(&found, in_machines, stop)?,
    };
    if let Some(draft) = abandoned_state(!dry_run)? {
        let outcome = if dry_run {
            Outcome::Found
        } else {
            Outcome::Removed
        };
        items.push(Item::state(&draft, outcome));
    }
    Ok(Report {
        dry_run,
        living_runs: found.living.len() + found.living_elsewhere,
        living: found.living,
        resumable: found.resumable,
        dead_runs: found.dead.len(),
        items,
    })
}
