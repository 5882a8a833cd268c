//! The fake VM: its state, behind gates that tests set, and a log of all calls.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::gate::Gates;
use super::log::tail;
use super::names::plain;
use super::state::VmState;
use super::{Call, Event, Gate, Key, Phase, Violation, VmStep, check};
use crate::{BackendError, DeviceLocator, Disk, DiskId, DiskKind, Overlay};

/// A virtual machine that exists only in memory, and every backend of it at once: it implements
/// [`Transport`](crate::Transport), [`Unplugger`](crate::Unplugger), [`Resolver`](crate::Resolver),
/// [`Mounter`](crate::Mounter), [`LayerCombiner`](crate::LayerCombiner) and [`Binder`](crate::Binder).
///
/// It is as strict as a real one: a target that is taken is a `Conflict`, a device that is not there
/// is `NotFound`, what is in use is `Busy`; but a host may detach a disk under a live mount. Each
/// source that was not [taken away](Self::remove_source) is a disk; each disk can be mounted as
/// it is, and has four partitions, and in each filesystem there is every directory but `missing`. Its locators are `fake:0`, `fake:1`, ..., the lowest free first.
///
/// A test decides how calls end ([`gate_next`](Self::gate_next), [`gate_always`](Self::gate_always),
/// [`gate_by`](Self::gate_by), in this order of precedence) and how long they take
/// ([`delay`](Self::delay), [`delay_by`](Self::delay_by)), and afterwards reads from the
/// [log](Self::log) whether the caller kept its side of the contracts ([`check`](Self::check)) and from
/// the state whether anything is [left](Self::left).
///
/// A call takes its delay and passes its gate before it has its effect; the effect and the
/// end of the call are one moment. Clones are the same VM. All methods can be called from anywhere, also
/// between the calls of a running test.
///
/// ```
/// use blockmount::testing::{AttachIdentified as _, FakeVm, Gate, VmStep};
/// use blockmount::{Disk, ErrorKind, Transport};
///
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
/// # runtime.block_on(async {
/// let vm = FakeVm::new();
/// vm.gate_next(VmStep::Attach, 1, Gate::Uncertain { happened: true });
/// let disk = Disk::virtual_disk("/images/base.erofs");
///
/// assert_eq!(vm.attach_identified(&disk).await.unwrap_err().kind(), ErrorKind::Uncertain);
/// assert_eq!(vm.left(), ["fake:0 holds /images/base.erofs"]);
/// vm.detach(&disk).await?;
/// vm.check()?;
/// vm.assert_empty();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// A program that ends and starts again is [`restart`](Self::restart): the VM stays as it is.
#[derive(Clone)]
pub struct FakeVm {
    shared: Arc<Shared>,
    /// The process that this handle belongs to.
    process: usize,
}

struct Shared {
    /// Held for the few table look-ups of one event, never across an await or a call of a plan.
    state: Mutex<State>,
    /// Told of every call that begins, of opened gates and of the VM's end.
    changed: Notify,
}

pub(super) struct State {
    pub(super) vm: VmState,
    pub(super) gates: Gates,
    /// Raised by whatever lets calls at [`Gate::Never`] go on.
    pub(super) opened: u64,
    log: Vec<Event>,
    /// Where in the log a new process has begun.
    restarts: Vec<usize>,
    pub(super) calls: [usize; VmStep::ALL.len()],
    missing: HashSet<PathBuf>,
    aliases: HashMap<PathBuf, PathBuf>,
    /// How often each source was changed.
    changes: HashMap<PathBuf, u64>,
}

impl FakeVm {
    /// How many slots a VM has unless it is told otherwise: as many as four SCSI controllers of
    /// Hyper-V with 64 LUNs each.
    pub const DEFAULT_SLOTS: u32 = 256;

    /// A VM with [`DEFAULT_SLOTS`](Self::DEFAULT_SLOTS) slots, in which every call succeeds at once.
    pub fn new() -> Self {
        Self::with_slots(Self::DEFAULT_SLOTS)
    }

    /// A VM with so many slots. The number costs neither time nor memory.
    pub fn with_slots(slots: u32) -> Self {
        let state = State {
            vm: VmState::new(slots),
            gates: Gates::default(),
            opened: 0,
            log: Vec::new(),
            restarts: Vec::new(),
            calls: [0; VmStep::ALL.len()],
            missing: HashSet::new(),
            aliases: HashMap::new(),
            changes: HashMap::new(),
        };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Notify::new(),
        };
        FakeVm {
            shared: Arc::new(shared),
            process: 0,
        }
    }

    /// The VM as the next process of the host finds it. The process before has ended as by SIGKILL: what it did
    /// stays, what it knew is forgotten, and its calls that are under way never return and have no effect any more. Gates
    /// and delays stay as they are.
    ///
    /// The disks that it attached are foreign to the next one, until they are adopted: they are not detached.
    #[must_use = "the handles of the process before do nothing any more"]
    pub fn restart(&self) -> FakeVm {
        let mut state = self.state();
        let order = state.log.len();
        state.restarts.push(order);
        state.vm.restart();
        let process = state.restarts.len();
        drop(state);
        FakeVm {
            shared: Arc::clone(&self.shared),
            process,
        }
    }

    /// Puts a disk into a slot as somebody else would: no transport knows of it, and the guest has the device.
    /// The lowest free slot takes it.
    ///
    /// # Panics
    ///
    /// If no slot is free, or the disk is attached.
    pub fn attach_foreign(&self, disk: &Disk) -> DeviceLocator {
        let id = self.id(disk);
        let attached = self.state().vm.attach_foreign(&id);
        attached.expect("a slot is free for a disk that is not attached")
    }

    /// Takes a disk out as somebody else would: at once, whatever the guest does with it.
    pub fn take_out(&self, disk: &Disk) {
        let id = self.id(disk);
        self.state().vm.take_out(&id);
    }

    pub(super) fn keep_slot(&self, disk: &DiskId, locator: &DeviceLocator) {
        let mut state = self.state();
        if !self.is_of_ended_process(&state) && !state.vm.host_gone {
            state.vm.keep_slot(disk, locator);
        }
    }

    pub(super) fn is_of_ended_process(&self, state: &State) -> bool {
        self.process != state.restarts.len()
    }

    /// Decides the next `calls` calls of a step, after those that were decided by this before.
    pub fn gate_next(&self, step: VmStep, calls: usize, gate: Gate) {
        self.state().gates.push(step, calls, gate);
    }

    /// Decides all calls of a step; `Gate::Ok` leaves them to the plan again.
    pub fn gate_always(&self, step: VmStep, gate: Gate) {
        self.state().gates.set(step, gate);
    }

    /// Decides every call that no other gate is set for, by a function.
    pub fn gate_by(&self, plan: impl Fn(&Call<'_>) -> Gate + Send + Sync + 'static) {
        self.state().gates.plan = Some(Arc::new(plan));
    }

    /// Opens all gates: calls that wait at [`Gate::Never`] go on, and from now on nothing fails. Delays
    /// stay as they are.
    pub fn open_gates(&self) {
        let mut state = self.state();
        state.gates.open();
        state.opened += 1;
        drop(state);
        self.shared.changed.notify_waiters();
    }

    /// Lets each call of a step take that much time of tokio's clock before its gate.
    pub fn delay(&self, step: VmStep, time: Duration) {
        self.state().gates.set_delay(step, time);
    }

    /// Lets each call take additional time of tokio's clock, by a function.
    pub fn delay_by(&self, plan: impl Fn(&Call<'_>) -> Duration + Send + Sync + 'static) {
        self.state().gates.pace = Some(Arc::new(plan));
    }

    /// Ends the VM with all that it holds: every call is answered with `Gone`, also those that wait
    /// at [`Gate::Never`].
    pub fn kill(&self) {
        self.end(VmState::kill);
    }

    /// Ends the guest with all its mounts: only `identify`, `attach` and `detach` work on.
    pub fn kill_guest(&self) {
        self.end(VmState::kill_guest);
    }

    fn end(&self, how: impl FnOnce(&mut VmState)) {
        let mut state = self.state();
        how(&mut state.vm);
        state.opened += 1;
        drop(state);
        self.shared.changed.notify_waiters();
    }

    /// Makes `name` another name of the disk at `source`, as a link would.
    pub fn alias(&self, name: impl AsRef<Path>, source: impl AsRef<Path>) {
        let (name, source) = (plain(name.as_ref()), plain(source.as_ref()));
        self.state().aliases.insert(name, source);
    }

    /// Takes a source away from the host: no disk is there any more. One that is attached stays
    /// attached and can be detached.
    pub fn remove_source(&self, source: impl AsRef<Path>) {
        self.state().missing.insert(plain(source.as_ref()));
    }

    /// Changes what is in the file of a source: its disk has another version from now on.
    pub fn change_source(&self, source: impl AsRef<Path>) {
        let source = plain(source.as_ref());
        *self.state().changes.entry(source).or_default() += 1;
    }

    /// A copy of everything that happened so far.
    pub fn log(&self) -> Vec<Event> {
        self.state().log.clone()
    }

    /// How many calls of a step have begun.
    pub fn calls(&self, step: VmStep) -> usize {
        self.state().calls[step as usize]
    }

    /// Waits until so many calls of a step have begun. Nothing happens if the future is dropped.
    pub async fn until_called(&self, step: VmStep, calls: usize) {
        loop {
            let changed = self.shared.changed.notified();
            if self.calls(step) >= calls {
                return;
            }
            changed.await;
        }
    }

    /// Whether the callers kept their side of the contracts: every [`Rule`](super::Rule), read from
    /// the log in time linear in its length.
    ///
    /// # Errors
    ///
    /// The first violation, with the end of the log up to it.
    pub fn check(&self) -> Result<(), Violation> {
        let state = self.state();
        check::check(&state.log, &state.restarts)
    }

    /// What the VM really holds, one line for each thing, sorted: disks in slots, slots kept for a disk whose
    /// attachment or detachment is in doubt, mounts and overlays.
    pub fn left(&self) -> Vec<String> {
        self.state().vm.left()
    }

    /// Panics with the end of the log unless nothing is [left](Self::left).
    ///
    /// # Panics
    ///
    /// As said.
    #[track_caller]
    pub fn assert_empty(&self) {
        // The lock is released first: a poisoned VM would hide the reason.
        let (left, tail) = {
            let state = self.state();
            (state.vm.left(), tail(&state.log))
        };
        assert!(left.is_empty(), "the VM still has {left:#?}\n{tail}");
    }

    /// Where the disk really is attached, or has a slot that is kept for it.
    pub fn locator_of(&self, disk: &Disk) -> Option<DeviceLocator> {
        let state = self.state();
        let id = state.id(disk);
        state.vm.locator_of(&id)
    }

    /// The device that really is mounted at a target.
    pub fn device_at(&self, target: impl AsRef<Path>) -> Option<DeviceLocator> {
        self.state().vm.device_at(target.as_ref())
    }

    /// The overlay that really is at a target.
    pub fn overlay_at(&self, target: impl AsRef<Path>) -> Option<Overlay> {
        self.state().vm.overlay_at(target.as_ref())
    }

    /// Which disk is meant, also where it is missing.
    pub(super) fn id(&self, disk: &Disk) -> DiskId {
        self.state().id(disk)
    }

    /// Fails unless there is such a disk on the host.
    pub(super) fn find(&self, disk: &Disk) -> Result<(), BackendError> {
        let state = self.state();
        if state.missing.contains(&state.source(disk)) {
            return Err(BackendError::not_found(format!("there is no disk {disk}")));
        }
        Ok(())
    }

    pub(super) fn changed(&self) -> &Notify {
        &self.shared.changed
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way through a change.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for FakeVm {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVm")
            .field("left", &self.left())
            .finish_non_exhaustive()
    }
}

impl State {
    fn source(&self, disk: &Disk) -> PathBuf {
        let source = plain(disk.source());
        match self.aliases.get(&source) {
            Some(source) => source.clone(),
            None => source,
        }
    }

    fn id(&self, disk: &Disk) -> DiskId {
        let source = self.source(disk);
        // Names that are not UTF-8 are escaped: a replacement character would make two of them one.
        let name = source
            .to_str()
            .map_or_else(|| format!("{source:?}"), str::to_owned);
        let id = match disk.kind() {
            DiskKind::Extensible { provider } => DiskId::name(&format!("evd://{provider}{name}")),
            _ => DiskId::name(&name),
        };
        let changes = self.changes.get(&source).copied().unwrap_or(0);
        id.with_version(NonZeroU64::MIN.saturating_add(changes))
    }

    pub(super) fn record(
        &mut self,
        step: VmStep,
        key: &Key,
        device: Option<DeviceLocator>,
        phase: Phase,
    ) {
        let order = self.log.len();
        self.log.push(Event {
            order,
            step,
            key: key.clone(),
            device,
            phase,
        });
    }

    pub(super) fn device_of(&self, key: &Key) -> Option<DeviceLocator> {
        match key {
            Key::Disk(disk) => self.vm.locator_of(disk),
            Key::Device(device) => Some(device.clone()),
            Key::Target(target) => self.vm.device_at(target),
        }
    }

    pub(super) fn is_gone(&self, step: VmStep) -> bool {
        let host = matches!(step, VmStep::Identify | VmStep::Attach | VmStep::Detach);
        self.vm.host_gone || (self.vm.guest_gone && !host)
    }
}
