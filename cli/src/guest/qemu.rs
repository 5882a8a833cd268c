//! A virtual machine of QEMU, and what its checker says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use blockmount_agent::{ARGUMENTS, PORT, PROGRAMS};
use blockmount_bridge::BridgeGuest;
use blockmount_checker::Checker;
use blockmount_checker::protocol::Tables;
use blockmount_checker::tree::Tree;
use blockmount_qemu::{
    AgentChannel, ENCRYPTION_MODULES, GuestImage, GuestImageBuilder, GuestKernel, GuestStream,
    VERITY_MODULES, Vm,
};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::failure::{Context, Failure, printable};
use crate::guest::transports::{self, Hardware, VmTransport};
use crate::interrupt::Interrupt;
use crate::report::SlotReport;
use crate::run::{ROOTS_RUNS, cache};
use crate::terminal::say;

/// Where saved states of guests are kept between runs.
fn states() -> PathBuf {
    cache().join("states")
}

/// The state that a killed run has begun to save; it is removed if `remove` says so. Blocks.
pub(crate) fn abandoned_state(remove: bool) -> Result<Option<PathBuf>, Failure> {
    let states = states();
    blockmount_qemu::abandoned_state(&states, remove)
        .context(|| format!("cannot clean up the saved states in {}", states.display()))
}

/// Below these the agent of such a guest may mount.
const ROOTS: [&str; 3] = [MOUNTS, ROOTS_RUNS, "/mnt"];
/// Refuses a target where the agent would, before there is a guest.
pub(crate) fn ensure_allowed(target: &Path) -> Result<(), Failure> {
    let is_below = |root: &&str| target.starts_with(root) && target != Path::new(root);
    if ROOTS.iter().any(is_below) {
        return Ok(());
    }
    let at = target.display();
    let what = format!(
        "a guest of QEMU mounts nothing at {at}, only below {}",
        ROOTS.join(", ")
    );
    Err(Failure::usage(what).advise("name a directory there, such as --at /mnt/tree"))
}

/// Below this, mounts without a path of the caller's.
pub(crate) const MOUNTS: &str = "/run/mounts";
/// How long the checker may take to open its port, in a guest that a busy machine emulates.
const OPENING: Duration = Duration::from_secs(60);

/// How long a VM stands still before it is given up.
const STANDING: Duration = Duration::from_secs(2);
/// How long a VM that is about to end may take until it has, and it is known how.
const ENDING: Duration = Duration::from_millis(500);

/// A VM that was started for this run.
#[derive(Debug)]
pub(crate) struct QemuGuest {
    vm: Vm,
    transports: Vec<Arc<dyn VmTransport>>,
    agent: BridgeGuest<AgentChannel>,
    /// It answers one question after the other.
    checker: Mutex<Checker<GuestStream>>,
    /// What the guest's kernel had before anything was asked of it; not known of a VM that was resumed.
    before: Option<Tables>,
    guard: Guard,
    /// Why its agent cannot be reached any more, once that is known.
    lost: OnceLock<String>,
}

/// Says what happens to a VM, and kills it when a second signal comes: its guest may hang.
#[derive(Debug)]
struct Guard {
    /// By which signal it was killed.
    killed: Arc<OnceLock<&'static str>>,
    task: JoinHandle<()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guard {
    fn start(vm: Vm, interrupt: &Interrupt) -> Self {
        let killed = Arc::<OnceLock<_>>::default();
        let kills = killed.clone();
        let mut further = interrupt.further();
        let task = tokio::spawn(async move {
            let mut health = vm.qmp().health();
            let mut told = 0;
            loop {
                tokio::select! {
                    signal = further.next() => {
                        say(format_args!("{signal}: giving up on the guest; its virtual machine is killed"));
                        // Before the end that it causes.
                        let _ = kills.set(signal);
                        return vm.kill();
                    }
                    Ok(()) = health.changed() => {
                        let health = health.borrow().clone();
                        let errors: Vec<&str> = health.io_errors().map(|(_, error)| error).collect();
                        for error in errors.iter().skip(told) {
                            say(format_args!("warning: in the virtual machine, {error}"));
                        }
                        told = errors.len();
                    }
                }
            }
        });
        Guard { killed, task }
    }

    async fn stop(&mut self) {
        self.task.abort();
        // An abort is what it ends by.
        let _ = (&mut self.task).await;
    }
}

/// What a guest has to be able to do besides mounting: what it is not asked for only makes it boot later.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    pub(crate) verity: bool,
    pub(crate) encryption: bool,
    pub(crate) filesystem_tools: bool,
}

impl Needs {
    fn equip(self, mut image: GuestImageBuilder) -> GuestImageBuilder {
        if !self.verity {
            image = image.without_modules(&VERITY_MODULES);
        }
        if !self.encryption {
            image = image.without_modules(&ENCRYPTION_MODULES);
        }
        match self.filesystem_tools {
            true => image.filesystem_tools(),
            false => image,
        }
    }
}

impl QemuGuest {
    /// Starts a VM with its files in a directory, which lives on if we are killed when it is to be `kept`.
    pub(crate) async fn start(
        directory: &Path,
        hardware: Hardware,
        kept: bool,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let what = || "cannot start a virtual machine".to_owned();
        let advice = "tests/setup.sh of the source fetches a kernel for guests";
        let kernel = GuestKernel::find().context(what);
        let kernel = kernel.map_err(|failure| failure.advise(advice))?;
        let image = GuestImage::builder(kernel)
            .file(ARGUMENTS, agent_arguments())
            .file(format!("{PROGRAMS}/checker"), checker_program());
        let image = hardware.needs.equip(image).build();
        let vm = transports::hardware(Vm::builder(image.await.context(what)?))
            .directory(directory)
            .saved_states(states());
        let vm = if kept { vm.detached() } else { vm };
        let vm = vm.start().await.context(what)?;
        let mut guest = Self::reach(vm, directory, hardware, interrupt).await?;
        guest.before = Some(guest.tables().await?);
        if kept {
            guest.vm.outlive();
        }
        Ok(guest)
    }

    /// Reaches the VM again that an earlier program has kept, with its files in a directory.
    pub(crate) async fn resume(
        directory: &Path,
        hardware: Hardware,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let ended = || Failure::new("the virtual machine of this mount has ended");
        let found = kept_vm(directory).ok_or_else(ended)?;
        let vm = Vm::reattach(found).await;
        let vm = vm.context(|| "cannot reach the virtual machine of this mount".to_owned())?;
        Self::reach(vm, directory, hardware, interrupt).await
    }

    async fn reach(
        vm: Vm,
        directory: &Path,
        hardware: Hardware,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let what = || "cannot reach the guest of a virtual machine".to_owned();
        let transports = hardware.start(&vm, directory)?;
        let agent = vm.guest(PORT).await.context(what)?;
        let stream = vm
            .connect(blockmount_checker::PORT, OPENING)
            .await
            .context(what)?;
        let checker = Checker::new(stream);
        Ok(QemuGuest {
            before: None,
            transports,
            agent,
            checker: Mutex::new(checker),
            guard: Guard::start(vm.clone(), interrupt),
            lost: OnceLock::new(),
            vm,
        })
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Its transports, in the order in which disks are offered to them.
    pub(crate) fn transports(&self) -> &[Arc<dyn VmTransport>] {
        &self.transports
    }

    /// The one that takes every disk.
    pub(crate) fn last_transport(&self) -> Arc<dyn VmTransport> {
        let last = self.transports.last();
        last.expect("a VM has at least one transport").clone()
    }

    /// Its agent, which mounts, unplugs and combines layers.
    pub(crate) fn agent(&self) -> &BridgeGuest<AgentChannel> {
        &self.agent
    }

    pub(crate) fn checker(&self) -> &Mutex<Checker<GuestStream>> {
        &self.checker
    }

    /// What its kernel has.
    pub(super) async fn tables(&self) -> Result<Tables, Failure> {
        self.checker
            .lock()
            .await
            .tables()
            .await
            .map_err(Failure::of_io)
    }

    pub(super) async fn tree(&self, root: &Path) -> Result<Tree, Failure> {
        self.checker
            .lock()
            .await
            .tree(root)
            .await
            .map_err(Failure::of_io)
    }

    /// The first names in a directory, and how many there are.
    pub(super) async fn names(
        &self,
        directory: &Path,
        most: usize,
    ) -> Result<(Vec<String>, usize), Failure> {
        let mut checker = self.checker.lock().await;
        checker.names(directory, most).await.map_err(Failure::of_io)
    }

    pub(super) async fn write(&self, path: &Path, text: &str) -> Result<(), Failure> {
        self.checker
            .lock()
            .await
            .write(path, text)
            .await
            .map_err(Failure::of_io)
    }

    pub(super) async fn remove(&self, path: &Path) -> Result<(), Failure> {
        self.checker
            .lock()
            .await
            .remove(path)
            .await
            .map_err(Failure::of_io)
    }

    pub(super) fn slots(&self) -> Vec<SlotReport> {
        let slots = self.transports.iter().map(|transport| transport.slots());
        slots.flatten().collect()
    }

    /// What the guest's kernel and QEMU have that they had not at the start, one line each. Nothing is left of a
    /// VM that is gone.
    pub(crate) async fn left_over(&self) -> Result<Vec<String>, Failure> {
        if self.vm.qmp().is_closed() || self.guard.killed.get().is_some() {
            return Ok(Vec::new());
        }
        let in_qemu = self.vm.scsi().left().await;
        let in_qemu = in_qemu.context(|| "cannot ask QEMU what it has".to_owned())?;
        let mut left: Vec<String> = in_qemu
            .into_iter()
            .map(|what| format!("{what} in QEMU"))
            .collect();
        let slots = self.slots().into_iter();
        left.extend(slots.map(|slot| format!("disk in slot {}", slot.slot)));
        if let Some(before) = &self.before {
            let (before, after) = (lines(before), lines(&self.tables().await?));
            let more = after.difference(&before);
            left.extend(more.map(|what| format!("{what} in the guest")));
        }
        Ok(left)
    }

    /// Waits until the agent cannot be reached any more though the VM lives, and says why. Cancel safe.
    async fn agent_lost(&self) -> String {
        let lost = self.agent.channel().lost().await;
        if lost.kind() == ErrorKind::Gone {
            // Whoever watches the VM says how it has ended.
            std::future::pending::<()>().await;
        }
        let why = describe(&lost);
        self.lost.get_or_init(|| why).clone()
    }

    pub(crate) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Waits until the VM has ended, was reset, has crashed or stands still, or its agent does not come back, and says why.
    /// Cancel safe.
    pub(crate) async fn failed(&self) -> String {
        let qmp = self.vm.qmp();
        let mut health = qmp.health();
        let health = tokio::select! {
            ended = health.wait_for(|health| health.ended().is_some()) => {
                ended.expect("a connection keeps the state of its VM").to_string()
            }
            stopped = qmp.stands_still(STANDING) => stopped.to_string(),
            lost = self.agent_lost() => return lost,
        };
        match timeout(ENDING, self.vm.ended()).await {
            Ok(how) => format!("{health} ({how})"),
            Err(_) => health,
        }
    }

    /// Whether the VM and its disks were well until now.
    pub(crate) async fn verdict(&self) -> Result<(), Failure> {
        let failure =
            Failure::new("the virtual machine did not live until everything was released");
        let advice = "what was not yet written to its disks is lost";
        if let Some(signal) = self.guard.killed.get() {
            let cause =
                format!("{signal} was the second signal, and made blockmount give up on it");
            return Err(failure.because(cause).advise(advice));
        }
        let health = self.vm.qmp().health().borrow().clone();
        if health.ended().is_some() || health.stopped().is_some() {
            let cause = self.failed().await;
            return Err(failure.because(cause).advise(advice));
        }
        match health.is_good() {
            true => Ok(()),
            false => Err(Failure::new(
                "the guest met errors of its disks, which may have lost data",
            )
            .because(health.to_string())
            .advise("check the host's disks, and that they are not full")),
        }
    }

    /// Ends the VM.
    pub(crate) async fn end(&mut self) {
        self.vm.shut_down().await;
        self.guard.stop().await;
    }
}

/// An error with its causes, on one line.
fn describe(error: &BackendError) -> String {
    let mut said = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        said = format!("{said}: {cause}");
        source = cause.source();
    }
    printable(said).to_string()
}

/// Where the files of a VM are that a run has kept with its image files, if it still runs.
pub(crate) fn kept_vm(directory: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let mut found = entries.map(|entry| entry.path());
    found.find(|path| Vm::is_alive_in(path))
}

/// The checker, which this program is too, as the guest's init starts it.
fn checker_program() -> String {
    format!("/init\nchecker\n{}\n", ROOTS.join("\n"))
}

/// What the agent of the guest is told, one argument a line.
fn agent_arguments() -> String {
    let roots = ROOTS.map(|root| ["--root".to_owned(), root.to_owned()]);
    let mut arguments: Vec<String> = roots.into_iter().flatten().collect();
    arguments.extend(transports::agent_arguments());
    arguments.join("\n") + "\n"
}

/// What there is in a guest, one line each.
fn lines(tables: &Tables) -> BTreeSet<String> {
    let mounts = tables
        .mounts
        .iter()
        .map(|mount| format!("mount of {} at {}", mount.filesystem, mount.mount_point));
    // A packed device of persistent memory stays for as long as its VM; what was on it must not.
    let disks = tables.block_devices.iter();
    let disks = disks
        .filter(|disk| !disk.name.starts_with("pmem"))
        .map(|disk| format!("disk {}", disk.name));
    let scsi = tables
        .scsi_devices
        .iter()
        .map(|address| format!("SCSI device {address}"));
    let mapped = tables
        .dm_devices
        .iter()
        .map(|device| format!("mapped device {}", device.name));
    let directories = tables
        .directories
        .iter()
        .map(|directory| format!("directory {directory}"));
    mounts
        .chain(disks)
        .chain(scsi)
        .chain(mapped)
        .chain(directories)
        .collect()
}
