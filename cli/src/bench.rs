//! How long disks take on this machine or in a virtual one, step by step, beside the least that they can take.

mod plot;
#[cfg(feature = "png")]
mod png;
#[cfg(not(feature = "png"))]
#[path = "bench/no_png.rs"]
mod png;
mod report;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockmount::{Linger, Manager, Step};

use crate::args::BenchArgs;
use crate::failure::Failure;
use crate::guest::{Guest, GuestKind, Place};
use crate::interrupt::Interrupt;
use crate::machine::{Machine, require_root};
use crate::run::Run;
use crate::speed::{self, Passed, floor};
use crate::terminal::{Progress, note, print, print_json};
use plot::Plot;
use report::{BenchReport, Measured, Rounds, SizeReport};

/// When disks of new images linger at the latest.
const OLD_BY: Duration = Duration::from_secs(10);

/// Measures, and says what came of it. `Ok` is the exit status.
pub(crate) async fn run(args: BenchArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    if args.guest == GuestKind::Local {
        require_root("bench")?;
    }
    let plot = args.plot.as_deref().map(Plot::new).transpose()?;
    let progress = Progress::new();
    let place = Place::of(args.guest, None, None, false)?;
    let machine = Machine::start(place, Run::start, &interrupt).await?;
    let measured = job(&args, &machine, &interrupt, &progress).await;
    progress.stage("releasing everything");
    let ended = machine.end(&interrupt).await;
    progress.done();
    let report = measured?;
    ended.result?;
    if let Some(plot) = &plot {
        plot.draw(&report)?;
        note(format_args!("the plot is {}", plot.file().display()));
    }
    match args.json {
        true => print_json(&report)?,
        false => print(&report.to_text())?,
    }
    Ok(0)
}

async fn job(
    args: &BenchArgs,
    machine: &Machine,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<BenchReport, Failure> {
    let mut numbers = args.disks.clone();
    numbers.sort_unstable();
    numbers.dedup();
    let most = numbers.last().copied().unwrap_or_default();
    progress.stage(format!("making {most} disks to measure with"));
    let images = speed::make(machine.work_dir()?, most, interrupt).await?;
    // The first has the kernel load what it needs, and counts for nothing.
    pass(machine, &images[..1]).await?;
    bare(machine, &images[..1], interrupt).await?;
    let mut sizes = Vec::new();
    for disks in numbers {
        let mut measured = Measured::default();
        for round in 1..=args.rounds {
            interrupt.check()?;
            progress.stage(format!(
                "measuring {disks} disks, round {round} of {}",
                args.rounds
            ));
            let images = &images[..disks];
            measured.floor.add(bare(machine, images, interrupt).await?);
            measured.ours.add(pass(machine, images).await?);
        }
        if args.linger {
            progress.stage(format!("measuring {disks} disks that linger"));
            let images = &images[..disks];
            measured.lingering = Some(lingering(machine, images, args.rounds, interrupt).await?);
        }
        sizes.push(SizeReport::of(disks, &measured));
    }
    Ok(BenchReport {
        guest: machine.guest().name(),
        rounds: args.rounds,
        sizes,
    })
}

/// By a manager that keeps what is released, once it has them all.
async fn lingering(
    machine: &Machine,
    images: &[PathBuf],
    rounds: usize,
    interrupt: &Interrupt,
) -> Result<Rounds, Failure> {
    let manager = machine.manager_that_keeps(Linger {
        at_most: Duration::from_secs(3600),
        how_many: images.len(),
    });
    let measured = async {
        speed::pass(&manager, images).await?;
        // A file that was changed just now might change again unseen, and its disk does not linger yet. How long a pass takes
        // says nothing: only those count that begin with old files, of which the first may attach the disks anew.
        let (old_by, mut passes) = (Instant::now() + OLD_BY, 0);
        loop {
            let is_old = Instant::now() > old_by;
            if passes_by_sharing(machine, &manager, images).await? {
                break;
            }
            interrupt.check()?;
            passes += u32::from(is_old);
            if passes > 1 {
                return Err(Failure::new("the disks do not linger after their release"));
            }
        }
        let mut measured = Rounds::default();
        for _ in 0..rounds {
            interrupt.check()?;
            measured.add(speed::pass(&manager, images).await?);
        }
        Ok(measured)
    };
    let measured = measured.await;
    // In any case: nobody else takes them out.
    let drained = manager.drain().await;
    let measured = measured?;
    match drained.failed.into_iter().next() {
        Some(error) => Err(error.into()),
        None => Ok(measured),
    }
}

/// Whether disks come and go without a call of a backend.
async fn passes_by_sharing(
    machine: &Machine,
    manager: &Manager,
    images: &[PathBuf],
) -> Result<bool, Failure> {
    machine.recorder().take_times();
    speed::pass(manager, images).await?;
    Ok(machine.recorder().take_times().is_empty())
}

/// By the manager, with each of its calls.
async fn pass(machine: &Machine, images: &[PathBuf]) -> Result<Passed, Failure> {
    machine.recorder().take_times();
    let passed = speed::pass(machine.manager(), images).await?;
    let steps: HashMap<Step, Vec<Duration>> = machine.recorder().take_times();
    Ok(Passed { steps, ..passed })
}

/// By bare system calls and commands.
async fn bare(
    machine: &Machine,
    images: &[PathBuf],
    interrupt: &Interrupt,
) -> Result<Passed, Failure> {
    match machine.guest() {
        Guest::Qemu(guest) => floor::in_vm(guest, images).await,
        Guest::Local(_) => {
            let (images, mark) = (images.to_vec(), machine.mark());
            let mount_root = machine.mount_root().to_owned();
            interrupt
                .blocking(move |_| floor::here(&images, &mark, &mount_root))
                .await
        }
    }
}
