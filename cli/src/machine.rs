//! A run of the program: where the containers run, the manager of their disks, and the way out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockmount::{
    ErrorKind, HolderName, LayerCombiner, Manager, ManagerBuilder, Mounter, Recovery, Stack, Step,
    Transport, Unplugger,
};
use blockmount_journal::FileJournal;
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME};

use crate::failure::{Context, Failure, printable};
use crate::guest::{Guest, GuestKind, MOUNTS, QemuGuest, Transports};
use crate::interrupt::Interrupt;
use crate::kernel::Ours;
use crate::recorder::Recorder;
use crate::run::Run;
use crate::terminal::say;

/// A run of the program: everything that it holds, and the way out.
#[derive(Debug)]
pub(crate) struct Machine {
    run: Run,
    guest: Guest,
    /// Does the main job; each call that it makes is recorded.
    manager: Manager,
    recorder: Recorder,
    /// Does on this machine what has to be done before, such as filling an image; recorded apart.
    helper: Manager,
    helper_recorder: Recorder,
    targets: Vec<PathBuf>,
    /// The errors of what was released, and has lost writes.
    lost: Vec<blockmount::Error>,
    /// What an earlier program of this run has left, until it is claimed.
    recovery: Option<Recovery>,
    /// The mount of an earlier program could not be resumed. Its files stay, and what uses its disks is no other user
    /// that would end, but mounts of its own that are not known any more.
    not_resumed: bool,
}

/// How a run has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What was ours, for a look at the kernel's tables.
    pub(crate) ours: Ours,
    /// What was found in the guest and in its hypervisor that had not been there at the start.
    pub(crate) left_in_guest: Vec<String>,
    pub(crate) result: Result<(), Failure>,
    /// The image files of an earlier program's mount that could not be resumed.
    pub(crate) kept: Option<PathBuf>,
}

/// Between two attempts to release what somebody uses. The kernel has no event for the end of a use.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);
/// How often a tear-down is tried that fails for another reason than being in use.
const ATTEMPTS: u32 = 3;

/// Refuses early, and with advice, what the kernel would refuse late.
pub(crate) fn require_root(command: &str) -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let what = format!("\"blockmount {command}\" attaches and mounts disks, which only root may");
    Err(Failure::new(what).advise(format!("run it with sudo: sudo blockmount {command} ...")))
}

impl Machine {
    /// Starts a run, and the guest if it is no part of this machine. Nothing is attached or mounted yet.
    pub(crate) async fn start(
        kind: GuestKind,
        transports: Transports,
        run: impl FnOnce() -> Result<Run, Failure>,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        if let (GuestKind::Local, Some(scheme)) = (kind, transports.required())
            && scheme != Transports::DEFAULT
        {
            let name = scheme.to_uppercase();
            let what = format!("this machine has loop devices for disks, and no {name}");
            let advice = format!("use --guest qemu with --transport {scheme}");
            return Err(Failure::usage(what).advise(advice));
        }
        let run = run()?;
        tracing::info!(directory = %run.directory().display(), "run started");
        let loops = Arc::new(LoopTransport::builder().mark(run.mark()).build()?);
        // The transport knows which devices are its own, also when the kernel gives a number to others.
        let engine = LinuxGuest::builder()
            .resolver(SCHEME, loops.clone())
            .unplugger(SCHEME, Arc::new(LoopUnplugger::default()))
            .overlay_mark(run.mark());
        let journals = run.journals();
        let engine = match &journals {
            Some([_, journal]) => engine.journal(journal).await?,
            None => engine.build(),
        };
        let (recorder, helper_recorder) = (Recorder::default(), Recorder::default());
        let helper = build(
            &run.directory().join("helper"),
            [helper_recorder.watch(loops.clone())],
            helper_recorder.watch(engine.clone()),
            engine.clone(),
        )
        .build();
        let mut recovery = None;
        let (guest, manager) = match kind {
            GuestKind::Local => {
                let builder = build(
                    run.mount_root(),
                    [recorder.watch(loops.clone())],
                    recorder.watch(engine.clone()),
                    engine,
                );
                let manager = manage(builder, journals.as_ref(), &mut recovery).await?;
                (Guest::Local(loops), manager)
            }
            GuestKind::Qemu => {
                let (at, kept) = (run.work_dir(), journals.is_some());
                let starting = async {
                    match run.is_resumed() {
                        true => QemuGuest::resume(at, transports, interrupt).await,
                        false => QemuGuest::start(at, transports, kept, interrupt).await,
                    }
                };
                let guest = tokio::select! {
                    started = starting => started?,
                    signal = interrupt.requested() => return Err(Failure::interrupted(signal)),
                };
                let transports = guest.transports().iter().cloned();
                let builder = build(
                    Path::new(MOUNTS),
                    transports.map(|transport| recorder.watch(transport)),
                    recorder.watch(guest.agent().clone()),
                    guest.agent().clone(),
                );
                let manager = manage(builder, journals.as_ref(), &mut recovery).await?;
                (Guest::Qemu(Box::new(guest)), manager)
            }
        };
        Ok(Machine {
            run,
            guest,
            manager,
            recorder,
            helper,
            helper_recorder,
            targets: Vec::new(),
            lost: Vec::new(),
            recovery,
            not_resumed: false,
        })
    }

    /// The stack of an earlier program, by its name. All else that it has left is released.
    pub(crate) async fn claim(&mut self, name: &HolderName) -> Result<Stack, Failure> {
        let no_name = || Failure::new("a mount without a name cannot be resumed");
        let recovery = self.recovery.take().ok_or_else(no_name)?;
        let claimed = recovery.claim(name);
        match &claimed {
            Ok(_) => self.run.unmark_lost(),
            Err(_) => self.keep_if_resumed(),
        }
        let settled = recovery.settle().await;
        for error in &settled.failed {
            tracing::warn!(%error, "what was left half-way is not all released");
        }
        let what = || format!("the mount with the name {name} cannot be resumed");
        let stack = claimed.context(what)?.into_stack();
        stack.ok_or_else(|| Failure::new(what()).because("it is no stack"))
    }

    /// Says that the mount of an earlier program, if this is one, could not be resumed.
    pub(crate) fn keep_if_resumed(&mut self) {
        self.not_resumed = self.run.is_resumed();
        if self.not_resumed {
            self.run.mark_lost("its mount could not be resumed");
        }
    }

    /// Leaves everything to the next program that resumes the run, as if this one had been killed.
    pub(crate) fn leave(self, stack: Stack) {
        std::mem::forget((self, stack));
    }

    /// Where the containers run.
    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    pub(crate) fn manager(&self) -> &Manager {
        &self.manager
    }

    pub(crate) fn helper(&self) -> &Manager {
        &self.helper
    }

    pub(crate) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// A directory for image files, on a disk.
    pub(crate) fn work_dir(&self) -> &Path {
        self.run.work_dir()
    }

    /// The image for what is written to a stack, if it has one.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.work_dir().join("scratch.ext4")
    }

    /// A path of this run's own in the guest, for an overlay.
    pub(crate) fn own_target(&self, name: &str) -> PathBuf {
        self.run.directory().join(name)
    }

    /// Notes that an overlay is going to be at a path of the user's, so that a clean-up after us knows. A guest
    /// that is a VM takes its paths along.
    pub(crate) fn note_target(&mut self, target: &Path) -> Result<(), Failure> {
        if let Guest::Local(_) = self.guest {
            self.run.journal_dir(target)?;
            self.targets.push(target.to_owned());
        }
        Ok(())
    }

    /// Releases a stack. What fails stays pending in the manager: the end of the run retries it, or says who uses it.
    pub(crate) async fn release(&mut self, stack: Stack) {
        if self.guest.lost().is_some() {
            // Nobody is there who could release it.
            return std::mem::forget(stack);
        }
        if let Err(error) = stack.release().await {
            tracing::info!(%error, "the stack could not be released at once");
            self.lost.extend(lost_writes(error.errors()));
        }
    }

    /// Ends the run: waits for work under way, tears down whatever is still there, ends the guest, removes the files.
    ///
    /// What somebody uses is waited for; a further signal makes it give up, with an error that names what stays.
    /// Writes that were lost are an error too, though nothing stays.
    pub(crate) async fn end(mut self, interrupt: &Interrupt) -> Ended {
        let ours = self.ours();
        let kept = self.not_resumed.then(|| self.run.work_dir().to_owned());
        let scratch = Some(self.scratch()).filter(|scratch| scratch.exists());
        interrupt.now("waiting for the work under way to stop");
        interrupt.settled().await;
        interrupt.now("releasing disks and mounts");
        let lost_guest = self.guest.lost().map(str::to_owned);
        let mut result = match &lost_guest {
            Some(why) => Err(Failure::new("nothing could be released").because(why.clone())),
            None => self.drain(interrupt).await,
        };
        let mut left_in_guest = Vec::new();
        if let Guest::Qemu(guest) = &mut self.guest {
            interrupt.now("ending the virtual machine");
            if lost_guest.is_none() {
                match guest.left_over().await {
                    Ok(left) => left_in_guest = left,
                    Err(failure) => result = result.and(Err(failure)),
                }
            }
            // A VM that did not live explains whatever else has failed.
            result = guest.verdict().await.and(result);
            // What it has mounted, unknown to us or out of reach, is not all written yet.
            let may_be_resumed = lost_guest.is_some() && self.run.is_named();
            let is_empty = result.is_ok() && left_in_guest.is_empty();
            if is_empty || !self.not_resumed && !may_be_resumed {
                guest.end().await;
            }
        }
        // A VM that is gone has taken along whatever could not be released; what it has written to a scratch stays for
        // whoever knows its name.
        let gone = matches!(self.guest, Guest::Qemu(_)) && !self.run.is_named();
        let lost_writes = !self.lost.is_empty();
        if lost_writes && scratch.is_some() {
            self.run.mark_lost("writes to its scratch were lost");
            std::mem::forget(self.run);
        } else if !self.not_resumed && (result.is_ok() || gone) {
            interrupt.now("removing this run's files");
            drop(self.guest);
            result = result.and(self.run.finish());
        } else {
            // What a clean-up needs to know stays as it is. The lock goes with the process.
            std::mem::forget(self.run);
        }
        if result.is_ok() && lost_writes {
            result = Err(lost_writes_failure(&self.lost, scratch.as_deref()));
        }
        Ended {
            ours,
            left_in_guest,
            result,
            kept,
        }
    }

    fn ours(&self) -> Ours {
        let recorders = [&self.recorder, &self.helper_recorder].into_iter();
        let attached = recorders.flat_map(Recorder::all_attached);
        let attached = attached.filter(|(_, at)| at.locator.transport() == SCHEME);
        Ours {
            directories: vec![
                self.run.directory().to_owned(),
                self.run.work_dir().to_owned(),
            ],
            targets: self.targets.clone(),
            loops: attached
                .map(|(source, at)| {
                    let file = source.canonicalize().unwrap_or(source);
                    (format!("{SCHEME}{}", at.locator.address()), file)
                })
                .collect(),
        }
    }

    async fn drain(&mut self, interrupt: &Interrupt) -> Result<(), Failure> {
        let mut attempts = 0;
        let mut said = String::new();
        let mut further = interrupt.further();
        loop {
            let (helper, main) = (self.helper.drain().await, self.manager.drain().await);
            let in_use = helper.in_use + main.in_use;
            // A journal that cannot be told of what is torn down is removed with the other files of this run.
            let failed = helper.failed.into_iter().chain(main.failed);
            let failed = failed.filter(|error| error.step() != Step::Record);
            let failed: Vec<blockmount::Error> = failed.collect();
            if failed.is_empty() && in_use == 0 {
                return Ok(());
            }
            self.lost.extend(lost_writes(&failed));
            let in_use_elsewhere = failed.iter().any(|error| error.kind() == ErrorKind::Busy);
            let busy = !self.not_resumed && in_use_elsewhere;
            attempts += u32::from(!busy);
            let waiting = describe(&failed, in_use);
            if attempts >= ATTEMPTS {
                return Err(self.stays(&waiting));
            }
            interrupt.now(format!("waiting for another user: {waiting}"));
            if busy && waiting != said {
                say(format_args!("waiting: {waiting}"));
                say(format_args!(
                    "  until they release it; another signal (Ctrl-C) gives up and leaves it"
                ));
                said = waiting.clone();
            }
            tokio::select! {
                () = tokio::time::sleep(BETWEEN_ATTEMPTS) => {}
                _ = further.next(), if busy => return Err(self.stays(&waiting)),
            }
        }
    }

    fn stays(&self, what: &str) -> Failure {
        let named = if self.run.is_named() {
            " --resumable"
        } else {
            ""
        };
        Failure::new("not everything could be released")
            .because(what.to_owned())
            .advise(format!(
                "when it is no longer in use, run: sudo blockmount cleanup{named}"
            ))
    }
}

/// The manager of a run, and what it has recovered if the run can be resumed.
async fn manage(
    builder: ManagerBuilder,
    journals: Option<&[PathBuf; 2]>,
    recovery: &mut Option<Recovery>,
) -> Result<Manager, Failure> {
    let Some([journal, _]) = journals else {
        return Ok(builder.build());
    };
    let found = builder.recover(FileJournal::open(journal)?).await?;
    Ok(recovery.insert(found).manager().clone())
}

fn build<T: Transport, G: Mounter + LayerCombiner + Clone>(
    mount_root: &Path,
    transports: impl IntoIterator<Item = T>,
    guest: G,
    unplugger: impl Unplugger,
) -> ManagerBuilder {
    let builder = Manager::builder();
    let builder = transports
        .into_iter()
        .fold(builder, |builder, transport| builder.transport(transport));
    builder
        .unplugger(unplugger)
        .mounter(guest.clone())
        .combiner(guest)
        .mount_root(mount_root)
}

fn lost_writes<'a>(
    errors: impl IntoIterator<Item = &'a blockmount::Error>,
) -> impl Iterator<Item = blockmount::Error> {
    let errors = errors.into_iter().cloned();
    errors.filter(|error| error.kind() == ErrorKind::LostWrites)
}

/// Everything is released, but not all that was written has reached the image.
fn lost_writes_failure(lost: &[blockmount::Error], scratch: Option<&Path>) -> Failure {
    let failure = Failure::new("everything is released, but writes were lost");
    let advice =
        "see the kernel's log, and free some space where the image is: a scratch is below /var/tmp";
    let advice = match scratch {
        None => advice.to_owned(),
        Some(scratch) => {
            let scratch = printable(&scratch.display().to_string());
            format!(
                "{advice}; this one is kept as {scratch} with what has reached it; to discard it: \
                 sudo blockmount cleanup --resumable"
            )
        }
    };
    failure.because(describe(lost, 0)).advise(advice)
}

/// What keeps a tear-down from being done, on one line.
fn describe(failed: &[blockmount::Error], in_use: usize) -> String {
    let mut lines: Vec<String> = failed
        .iter()
        .map(|error| printable(&format!("{error}: {}", error.cause())))
        .collect();
    if in_use > 0 {
        lines.push(format!("{in_use} still held by this program"));
    }
    lines.join("; ")
}
