//! A virtual machine of QEMU, our own or somebody else's, and what its checker says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, ErrorKind};
use blockmount_agent::{ARGUMENTS, PORT, PROGRAMS};
use blockmount_bridge::{BridgeGuest, GuestChannel, Reply, Request};
use blockmount_checker::Checker;
use blockmount_checker::protocol::Tables;
use blockmount_checker::tree::Tree;
use blockmount_qemu::{
    AEAD_MODULES, AgentChannel, ENCRYPTION_MODULES, GuestImage, GuestImageBuilder, GuestKernel,
    QemuScsi, Qmp, VERITY_MODULES, Vm,
};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::failure::{Context, Failure, printable};
use crate::guest::SlotSource;
use crate::guest::foreign::{AgentSocket, ForeignVm, Stream};
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
/// Where the agent looks for keys by their names: in memory.
const KEYS: &str = "/run/keys";
/// How long the checker may take to open its port, in a guest that a busy machine emulates.
const OPENING: Duration = Duration::from_secs(60);

/// How long a VM stands still before it is given up.
const STANDING: Duration = Duration::from_secs(2);
/// How long a VM that is about to end may take until it has, and it is known how.
const ENDING: Duration = Duration::from_millis(500);

/// A VM that was started for this run, or that somebody else has started.
#[derive(Debug)]
pub(crate) struct QemuGuest {
    qmp: Qmp,
    scsi: QemuScsi,
    /// Its process, if it is ours.
    vm: Option<Vm>,
    transports: Vec<Arc<dyn VmTransport>>,
    agent: BridgeGuest<Agent>,
    /// It answers one question after the other. Few guests of others have one.
    checker: Option<Mutex<Checker<Box<dyn Stream>>>>,
    /// What the guest's kernel had before anything was asked of it; not known of a VM that was resumed.
    before: Option<Tables>,
    guard: Guard,
    /// Why its agent cannot be reached any more, once that is known.
    lost: OnceLock<String>,
}

/// The agent of a VM: behind a port of one that is ours, or behind a socket.
#[derive(Debug)]
pub(crate) enum Agent {
    Port(BridgeGuest<AgentChannel>),
    Socket(AgentSocket),
}

impl Agent {
    async fn lost(&self) -> BackendError {
        match self {
            Agent::Port(guest) => guest.channel().lost().await,
            Agent::Socket(channel) => channel.lost().await,
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl GuestChannel for Agent {
    async fn call(&self, request: Request) -> Result<Reply, BackendError> {
        match self {
            Agent::Port(guest) => guest.channel().call(request).await,
            Agent::Socket(channel) => channel.call(request).await,
        }
    }
}

/// Says what happens to a VM, and kills one that is ours when a second signal comes: its guest may hang.
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
    fn start(qmp: &Qmp, vm: Option<Vm>, interrupt: &Interrupt) -> Self {
        let killed = Arc::<OnceLock<_>>::default();
        let kills = killed.clone();
        let mut further = interrupt.further();
        let mut health = qmp.health();
        let task = tokio::spawn(async move {
            let (mut told, mut was_stopped) = (0, false);
            loop {
                tokio::select! {
                    signal = further.next(), if vm.is_some() => {
                        say(format_args!("{signal}: giving up on the guest; its virtual machine is killed"));
                        // Before the end that it causes.
                        let _ = kills.set(signal);
                        return vm.iter().for_each(Vm::kill);
                    }
                    Ok(()) = health.changed() => {
                        let health = health.borrow().clone();
                        let errors: Vec<&str> = health.io_errors().map(|(_, error)| error).collect();
                        for error in errors.iter().skip(told) {
                            say(format_args!("warning: in the virtual machine, {error}"));
                        }
                        told = errors.len();
                        // Whoever has started a machine may let it stand still; one of ours is lost then.
                        let is_stopped = health.stopped().is_some() && vm.is_none();
                        if is_stopped && !was_stopped {
                            say(format_args!("the virtual machine stands still; blockmount waits until it goes on"));
                        }
                        was_stopped = is_stopped;
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
    /// Ciphers that not every kernel has.
    pub(crate) more_ciphers: bool,
    /// What opens volumes of LUKS2.
    pub(crate) encryption_tools: bool,
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
        if self.more_ciphers {
            image = image.modules_if_there(&AEAD_MODULES);
        }
        if self.encryption_tools {
            image = image.encryption_tools();
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
        guest.before = guest.tables().await?;
        if kept && let Some(vm) = &guest.vm {
            vm.outlive();
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
        let checker: Checker<Box<dyn Stream>> = Checker::new(Box::new(stream));
        Ok(QemuGuest {
            qmp: vm.qmp().clone(),
            scsi: vm.scsi(),
            before: None,
            transports,
            agent: BridgeGuest::new(Agent::Port(agent)),
            checker: Some(Mutex::new(checker)),
            guard: Guard::start(vm.qmp(), Some(vm.clone()), interrupt),
            lost: OnceLock::new(),
            vm: Some(vm),
        })
    }

    /// Reaches a VM that somebody else has started.
    pub(crate) async fn connect(
        foreign: &ForeignVm,
        allows_backing: bool,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let qmp = foreign.qmp().await?;
        foreign.ensure_controllers(&qmp).await?;
        let what = || "cannot use the SCSI controllers of the virtual machine".to_owned();
        let scsi = QemuScsi::new(qmp.clone(), &foreign.controllers).context(what)?;
        let transport = transports::scsi(scsi.clone(), allows_backing)?;
        let agent = foreign.agent(qmp.clone()).await?;
        let checker = match &foreign.checker {
            None => None,
            Some(at) => {
                let what = || format!("cannot reach the checker of the virtual machine at {at}");
                Some(Mutex::new(Checker::new(at.connect().await.context(what)?)))
            }
        };
        let mut guest = QemuGuest {
            scsi,
            vm: None,
            transports: vec![transport],
            agent: BridgeGuest::new(Agent::Socket(agent)),
            checker,
            before: None,
            guard: Guard::start(&qmp, None, interrupt),
            lost: OnceLock::new(),
            qmp,
        };
        guest.before = guest.tables().await?;
        Ok(guest)
    }

    pub(crate) fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    pub(crate) fn scsi(&self) -> &QemuScsi {
        &self.scsi
    }

    /// Whether it was started for this run, and ends with it.
    pub(crate) fn is_own(&self) -> bool {
        self.vm.is_some()
    }

    /// Whether nothing of what was in the guest is there any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.qmp.is_closed() || self.qmp.health().borrow().ended().is_some()
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
    pub(crate) fn agent(&self) -> &BridgeGuest<Agent> {
        &self.agent
    }

    pub(crate) fn has_checker(&self) -> bool {
        self.checker.is_some()
    }

    pub(crate) fn checker(&self) -> Result<&Mutex<Checker<Box<dyn Stream>>>, Failure> {
        let none = || Failure::new("no checker runs in the guest of this virtual machine");
        self.checker.as_ref().ok_or_else(none)
    }

    /// What its kernel has, where somebody can be asked.
    pub(super) async fn tables(&self) -> Result<Option<Tables>, Failure> {
        let Some(checker) = &self.checker else {
            return Ok(None);
        };
        let tables = checker.lock().await.tables().await;
        tables.map(Some).map_err(Failure::of_io)
    }

    pub(super) async fn tree(&self, root: &Path) -> Result<Tree, Failure> {
        let mut checker = self.checker()?.lock().await;
        checker.tree(root).await.map_err(Failure::of_io)
    }

    /// The first names in a directory, and how many there are.
    pub(super) async fn names(
        &self,
        directory: &Path,
        most: usize,
    ) -> Result<(Vec<String>, usize), Failure> {
        let mut checker = self.checker()?.lock().await;
        checker.names(directory, most).await.map_err(Failure::of_io)
    }

    pub(super) async fn write(&self, path: &Path, text: &str) -> Result<(), Failure> {
        let mut checker = self.checker()?.lock().await;
        checker.write(path, text).await.map_err(Failure::of_io)
    }

    /// Puts a key where the agent finds it by its name. It goes the way of the checker: this program has made the guest.
    pub(super) async fn place_key(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let mut checker = self.checker()?.lock().await;
        let placed = checker.write_key(Path::new(KEYS).join(name), bytes).await;
        placed.map_err(Failure::of_io)
    }

    pub(super) async fn remove_key(&self, name: &str) -> Result<(), Failure> {
        self.remove(&Path::new(KEYS).join(name)).await
    }

    pub(super) async fn remove(&self, path: &Path) -> Result<(), Failure> {
        let mut checker = self.checker()?.lock().await;
        checker.remove(path).await.map_err(Failure::of_io)
    }

    pub(super) fn slots(&self) -> Vec<SlotReport> {
        let slots = self.transports.iter().map(|transport| transport.slots());
        slots.flatten().collect()
    }

    /// Reads what is in its slots for inspections, which outlive this value.
    pub(crate) fn slot_source(&self) -> SlotSource {
        let transports = self.transports.clone();
        Box::new(move || {
            let slots = transports.iter().map(|transport| transport.status());
            slots.flatten().collect()
        })
    }

    /// What the guest's kernel and QEMU have that they had not at the start, one line each. Nothing is left of a
    /// VM that is gone.
    pub(crate) async fn left_over(&self) -> Result<Vec<String>, Failure> {
        if self.has_ended() || self.guard.killed.get().is_some() {
            return Ok(Vec::new());
        }
        let in_qemu = self.scsi.left().await;
        let in_qemu = in_qemu.context(|| "cannot ask QEMU what it has".to_owned())?;
        let mut left: Vec<String> = in_qemu
            .into_iter()
            .map(|what| format!("{what} in QEMU"))
            .collect();
        let slots = self.slots().into_iter();
        let slots = slots.filter(|slot| slot.state != "foreign");
        left.extend(slots.map(|slot| format!("disk in slot {}", slot.slot)));
        if let (Some(before), Some(after)) = (&self.before, self.tables().await?) {
            let (before, after) = (lines(before), lines(&after));
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
        let mut health = self.qmp.health();
        let health = tokio::select! {
            ended = health.wait_for(|health| health.ended().is_some()) => {
                ended.expect("a connection keeps the state of its VM").to_string()
            }
            stopped = self.qmp.stands_still(STANDING), if self.is_own() => stopped.to_string(),
            lost = self.agent_lost() => return lost,
        };
        let Some(vm) = &self.vm else {
            return health;
        };
        match timeout(ENDING, vm.ended()).await {
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
        let health = self.qmp.health().borrow().clone();
        let is_stopped = health.stopped().is_some();
        if is_stopped && !self.is_own() {
            // What was released is released, whatever its owner does with it.
            return Ok(());
        }
        if health.ended().is_some() || is_stopped {
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

    /// Ends the VM, unless it is somebody else's.
    pub(crate) async fn end(&mut self) {
        if let Some(vm) = &self.vm {
            vm.shut_down().await;
        }
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

/// Whether the VM that a run has kept with its image files has ended for certain.
pub(crate) fn kept_vm_has_ended(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut machines = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .peekable();
    // What is no machine that has ended may be one whose record is damaged.
    machines.peek().is_some() && machines.all(|path| Vm::has_ended_in(&path))
}

/// The checker, which this program is too, as the guest's init starts it.
fn checker_program() -> String {
    format!("/init\nchecker\n{}\n", ROOTS.join("\n"))
}

/// What the agent of the guest is told, one argument a line.
fn agent_arguments() -> String {
    let roots = ROOTS.map(|root| ["--root".to_owned(), root.to_owned()]);
    let mut arguments: Vec<String> = roots.into_iter().flatten().collect();
    arguments.extend(["--keys".to_owned(), KEYS.to_owned()]);
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
