//! A run of the program: where the containers run, and the manager of their disks.

mod end;
mod formats;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockmount::{
    Binder, HolderName, LayerCombiner, Linger, Manager, ManagerBuilder, Mounter, Recovery, Stack,
    Transport, Unplugger, View,
};
use blockmount_containerd::service::{Activations, VmName};
use blockmount_journal::FileJournal;
use blockmount_linux::LinuxGuest;
use blockmount_loopback::{LoopTransport, LoopUnplugger, SCHEME};
use formats::Shown;
use rustix::thread::{CapabilitySet, CapabilitySets};

pub(crate) use formats::is_raw;
use tokio::sync::OnceCell;

use crate::failure::{Context, Failure};
use crate::guest::{Guest, MOUNTS, OtherFiles, Place, QemuGuest};
use crate::interrupt::{Further, Interrupt};
use crate::keys::KeyFile;
use crate::recorder::Recorder;
use crate::run::{ROOTS_RUNS, Run, is_root};
use crate::status::{self, Offered, Source};
use crate::terminal::say;

/// What a mount of the program is: a stack, and the views of it.
#[derive(Debug)]
pub(crate) struct Mounted {
    pub(crate) stack: Stack,
    pub(crate) views: Vec<View>,
}

/// The name by which a view of a named mount is found again.
pub(crate) fn name_of_view(name: &HolderName, index: usize) -> Result<HolderName, Failure> {
    HolderName::new(format!("{name}, view {index}"))
        .context(|| format!("the name {name} is too long for a mount with views"))
}

/// A run of the program: everything that it holds, and the way out.
#[derive(Debug)]
pub(crate) struct Machine {
    run: Run,
    guest: Guest,
    /// Does the main job; each call that it makes is recorded.
    manager: Manager,
    recorder: Recorder,
    /// Mounts on this machine.
    engine: LinuxGuest,
    /// Does on this machine what has to be done before, such as filling an image; recorded apart.
    helper: Manager,
    helper_recorder: Recorder,
    targets: Vec<PathBuf>,
    /// The errors of what was released, and has lost writes.
    lost: Vec<blockmount::Error>,
    /// The signals since the release has begun.
    further: Option<Further>,
    /// The signal that made the user's program give up on a guest that is somebody else's.
    gave_up: Option<&'static str>,
    /// What an earlier program of this run has left, until it is claimed.
    recovery: Option<Recovery>,
    /// Images of other formats than raw, once they are shown.
    shown: OnceCell<Shown>,
    /// The mount of an earlier program could not be resumed. Its files stay, and what uses its disks is no other user
    /// that would end, but mounts of its own that are not known any more.
    not_resumed: bool,
    /// Answers who asks how the run is doing.
    offered: Option<Offered>,
}

/// More than a stack has layers: what bounds it is the kernel.
const LOOP_DEVICES: u16 = 16_384;

/// Refuses early, and with advice, what the kernel would refuse late: mounts and loop devices of this machine.
pub(crate) fn require_root(command: &str) -> Result<(), Failure> {
    let what = format!(
        "\"blockmount {command}\" mounts and makes loop devices on this machine, which needs root with CAP_SYS_ADMIN"
    );
    if !is_root() {
        return Err(Failure::new(what).advise(format!(
            "run it with sudo: sudo blockmount {command} ...; or in a virtual machine, which needs neither: \
             blockmount {command} --guest qemu ..."
        )));
    }
    let capabilities = rustix::thread::capabilities(None);
    let may = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::SYS_ADMIN);
    match capabilities {
        Ok(sets) if !may(sets) => Err(Failure::new(what)
            .because("this root has no CAP_SYS_ADMIN, as in most containers")
            .advise("give it to the container, with the devices (docker: a privileged one)")),
        // A kernel that does not tell says it later.
        _ => Ok(()),
    }
}

impl Machine {
    /// Starts a run, and the guest if it is no part of this machine. Nothing is attached or mounted yet.
    pub(crate) async fn start(
        place: Place,
        run: impl FnOnce() -> Result<Run, Failure>,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let run = run()?;
        tracing::info!(directory = %blockmount::printable(run.directory().display()), "run started");
        let loops = LoopTransport::builder()
            .mark(run.mark())
            .max_devices(LOOP_DEVICES);
        let loops = Arc::new(loops.build()?);
        // The transport knows which devices are its own, also when the kernel gives a number to others.
        let engine = LinuxGuest::builder()
            .resolver(SCHEME, loops.clone())
            .unplugger(SCHEME, Arc::new(LoopUnplugger::default()))
            .overlay_mark(run.mark())
            .device_mark(run.mark())
            .key_directory(run.keys());
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
            helper_recorder.watch(engine.clone()),
        )
        .build();
        let mut recovery = None;
        let (guest, manager) = match place {
            Place::Local => {
                let builder = build(
                    run.mount_root(),
                    [recorder.watch(loops.clone())],
                    recorder.watch(engine.clone()),
                    recorder.watch(engine.clone()),
                );
                let guest = Guest::Local(loops);
                let builder = builder.slots(guest.slot_source());
                let manager = manage(builder, journals.as_ref(), &mut recovery).await?;
                (guest, manager)
            }
            Place::Qemu(hardware) => {
                let kept = journals.is_some();
                let at = match run.is_resumed() {
                    true => run.work_dir(),
                    false => run.make_work_dir()?,
                };
                let starting = async {
                    match run.is_resumed() {
                        true => QemuGuest::resume(at, hardware, interrupt).await,
                        false => QemuGuest::start(at, hardware, kept, interrupt).await,
                    }
                };
                let guest = tokio::select! {
                    started = starting => started?,
                    signal = interrupt.requested() => return Err(Failure::interrupted(signal)),
                };
                let builder = build_vm(Path::new(MOUNTS), &guest, &recorder);
                let manager = manage(builder, journals.as_ref(), &mut recovery).await?;
                (Guest::Qemu(Box::new(guest)), manager)
            }
            Place::Foreign(vm, others) => {
                let allows_backing = others == OtherFiles::Allowed;
                let guest = tokio::select! {
                    connected = QemuGuest::connect(&vm, allows_backing, interrupt) => connected?,
                    signal = interrupt.requested() => return Err(Failure::interrupted(signal)),
                };
                // Other runs, one after the other, have the same guest.
                let root = Path::new(MOUNTS).join(run.id());
                let builder = build_vm(&root, &guest, &recorder);
                let manager = manage(builder, journals.as_ref(), &mut recovery).await?;
                (Guest::Qemu(Box::new(guest)), manager)
            }
        };
        Ok(Machine {
            run,
            guest,
            manager,
            recorder,
            engine,
            helper,
            helper_recorder,
            targets: Vec::new(),
            lost: Vec::new(),
            further: None,
            gave_up: None,
            recovery,
            shown: OnceCell::new(),
            not_resumed: false,
            offered: None,
        })
    }

    /// The stack of an earlier program and its views, by its name. All else that it has left is released.
    pub(crate) async fn claim(
        &mut self,
        name: &HolderName,
        views: usize,
    ) -> Result<Mounted, Failure> {
        let no_name = || Failure::new("a mount without a name cannot be resumed");
        let recovery = self.recovery.take().ok_or_else(no_name)?;
        let claimed = recovery.claim(name);
        match &claimed {
            Ok(_) => self.run.unmark_lost(),
            Err(_) => self.keep_if_resumed(),
        }
        let views = match &claimed {
            Ok(_) => claim_views(&recovery, name, views),
            Err(_) => Vec::new(),
        };
        let settled = recovery.settle().await;
        for error in &settled.failed {
            tracing::warn!(%error, "what was left half-way is not all released");
        }
        let what = || format!("the mount with the name {name} cannot be resumed");
        let stack = claimed.context(what)?.into_stack();
        let stack = stack.ok_or_else(|| Failure::new(what()).because("it is no stack"))?;
        Ok(Mounted { stack, views })
    }

    /// What an earlier program of this run has left; nothing for one that cannot be resumed. The manager is used by many from
    /// now on, for as long as they like.
    pub(crate) fn take_recovery(&mut self) -> Option<Recovery> {
        self.recorder.be_brief();
        self.recovery.take()
    }

    /// The directory for the records of activations, in the run's own.
    pub(crate) fn records(&self) -> PathBuf {
        self.run.records()
    }

    /// Leaves everything to the next program of this run, which may be this one: its locks are let go.
    pub(crate) fn leave_activations(self) {
        self.run.leave();
    }

    /// Ends a run whose guest is lost, and in which nothing is to be kept: nothing of it stays. False if the guest may be alive, as
    /// one of somebody else whose agent has ended is: what is in it stays for the next program then.
    pub(crate) async fn discard(mut self) -> Result<bool, Failure> {
        let is_gone = match &mut self.guest {
            Guest::Qemu(guest) if guest.is_own() => {
                guest.end().await;
                true
            }
            Guest::Qemu(guest) => guest.has_ended(),
            Guest::Local(_) => false,
        };
        if !is_gone {
            self.run.leave();
            return Ok(false);
        }
        drop(self.guest);
        self.run.finish().map(|()| true)
    }

    /// Says that the mount of an earlier program, if this is one, could not be resumed.
    fn keep_if_resumed(&mut self) {
        self.not_resumed = self.run.is_resumed();
        if self.not_resumed {
            self.run.mark_lost("its mount could not be resumed");
        }
    }

    /// Whether an earlier program has started this run.
    pub(crate) fn is_resumed(&self) -> bool {
        self.run.is_resumed()
    }

    /// The mount is up: from now on a clean-up keeps it, if it has a name.
    pub(crate) fn mark_held(&self) -> Result<(), Failure> {
        self.run.mark_held()
    }

    /// From now on whoever asks is told how the run is doing: a mount of a tree, or a server at a socket, with the name of the
    /// virtual machine if it has several.
    pub(crate) fn offer_status(
        &mut self,
        command: &'static str,
        name: Option<&HolderName>,
        at: &Path,
        activations: Option<(Activations, Option<&VmName>)>,
    ) -> Source {
        let (activations, vm) = match activations {
            Some((activations, vm)) => (Some(activations), vm),
            None => (None, None),
        };
        let source = Source {
            run: self.run.id().to_owned(),
            command,
            name: name.map(ToString::to_string),
            vm: vm.map(ToString::to_string),
            guest: self.guest.name(),
            at: at.display().to_string(),
            since: Instant::now(),
            lost: Arc::default(),
            manager: self.manager.clone(),
            activations,
        };
        match status::offer(&self.run.status_socket(), source.clone()) {
            Ok(offered) => self.offered = Some(offered),
            // What is held is held all the same.
            Err(error) => tracing::warn!(%error, "\"blockmount status\" will not see this run"),
        }
        source
    }

    /// Leaves everything to the next program that resumes the run, as if this one had been killed.
    pub(crate) fn leave(self, mounted: Mounted) {
        std::mem::forget((self, mounted));
    }

    /// Does something while keys are where the guest looks for them, and takes them away again.
    ///
    /// Not cancel safe: they stay until the end of the run then.
    pub(crate) async fn with_keys<T, E: Into<Failure>>(
        &self,
        keys: &[KeyFile],
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let directory = self.run.keys();
        let mut placed = Ok(());
        for key in keys {
            if placed.is_ok() {
                placed = self.guest.place_key(&directory, key).await;
            }
        }
        let done = match placed {
            Ok(()) => work.await.map_err(Into::into),
            Err(failure) => Err(failure),
        };
        let mut removed = Ok(());
        for key in keys {
            removed = removed.and(self.guest.remove_key(&directory, key).await);
        }
        // After a failure a key may not be there, or its guest.
        let done = done?;
        removed.map(|()| done)
    }

    /// Where the containers run.
    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    pub(crate) fn manager(&self) -> &Manager {
        &self.manager
    }

    /// One more manager for the main job, which keeps what is released. Whoever asks for it drains it.
    pub(crate) fn manager_that_keeps(&self, linger: Linger) -> Manager {
        const LINGERING: &str = "lingering";
        let recorder = &self.recorder;
        let builder = match &self.guest {
            Guest::Local(loops) => build(
                &self.run.mount_root().join(LINGERING),
                [recorder.watch(loops.clone())],
                recorder.watch(self.engine.clone()),
                recorder.watch(self.engine.clone()),
            ),
            Guest::Qemu(guest) => build_vm(&Path::new(MOUNTS).join(LINGERING), guest, recorder),
        };
        builder.linger(linger).build()
    }

    pub(crate) fn helper(&self) -> &Manager {
        &self.helper
    }

    pub(crate) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// What the loop devices of this run are marked with.
    pub(crate) fn mark(&self) -> String {
        self.run.mark()
    }

    /// Below this, what this machine mounts without a path of the caller's.
    pub(crate) fn mount_root(&self) -> &Path {
        self.run.mount_root()
    }

    /// A directory for image files, on a disk, which is made if it is not there.
    pub(crate) fn work_dir(&self) -> Result<&Path, Failure> {
        self.run.make_work_dir()
    }

    /// The image for what is written to a stack, if it has one.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.run.work_dir().join("scratch.ext4")
    }

    /// A path of this run's own in the guest, for an overlay.
    pub(crate) fn own_target(&self, name: &str) -> PathBuf {
        match self.guest {
            Guest::Local(_) => self.run.directory().join(name),
            // Where its agent may mount, whatever the runs of this user are below.
            Guest::Qemu(_) if self.guest.is_foreign() => {
                Path::new(ROOTS_RUNS).join(self.run.id()).join(name)
            }
            Guest::Qemu(_) => Path::new(ROOTS_RUNS).join(name),
        }
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
}

/// The views that are there still. One that somebody has taken away is no reason to lose the others.
fn claim_views(recovery: &Recovery, name: &HolderName, views: usize) -> Vec<View> {
    let claim = |index| {
        let claimed = recovery.claim(&name_of_view(name, index).ok()?);
        let claimed = claimed.inspect_err(|error| {
            say(format_args!("view {} is gone: {error}", index + 1));
        });
        claimed.ok()?.into_view()
    };
    (0..views).filter_map(claim).collect()
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

/// The manager of what is in a virtual machine.
fn build_vm(mount_root: &Path, guest: &QemuGuest, recorder: &Recorder) -> ManagerBuilder {
    let transports = guest.transports().iter().cloned();
    build(
        mount_root,
        transports.map(|transport| recorder.watch(transport)),
        recorder.watch(guest.agent().clone()),
        recorder.watch(guest.agent().clone()),
    )
    .slots(guest.slot_source())
}

fn build<T: Transport, G: Mounter + LayerCombiner + Binder + Clone>(
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
        .combiner(guest.clone())
        .binder(guest)
        .mount_root(mount_root)
}
