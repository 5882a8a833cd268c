//! A hypervisor that keeps its devices in memory, answers as it is told, and holds the transport to the
//! contract: no two calls for one place at once, nothing put where something is, and a device either
//! whole or mapped to.

// Each test file is a program of its own, and not all of them use everything.
#![allow(dead_code)]
// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

pub(crate) mod guest;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use blockmount::placement::{Occupant, SlotUse};
use blockmount::testing::VmStep;
use blockmount::testing::conformance::{Fault, Faults};
use blockmount::{BackendError, Disk, DiskId, ErrorKind};
use blockmount_vpmem::{
    Attacher, ByteRange, DeviceNumber, Geometry, Mode, PAGE, SlotEntry, VpmemAddress,
    VpmemTransport,
};
use tokio::sync::Notify;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

pub(crate) const MODES: [Mode; 2] = [Mode::WholeDevices, Mode::Packed];

/// What the next call that changes something does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Answer {
    /// Fails with an error of this kind, and does nothing.
    Fail(ErrorKind),
    /// Does it, and says `Uncertain`.
    DoneButUncertain,
    /// Does it, and panics.
    DoneButPanics,
    /// Does it, and never answers.
    DoneButSilent,
    /// Waits for `Vm::proceed`, then does it.
    Wait,
}

/// A call that changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Question {
    Identify,
    Size,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Attach(VpmemAddress, Disk),
    Detach(VpmemAddress),
}

/// Disks are 1 MiB large unless they are told otherwise, and those whose name has no number in it are
/// missing.
#[derive(Default)]
pub(crate) struct Vm {
    state: Mutex<State>,
    pub(crate) entered: Notify,
    pub(crate) proceed: Notify,
}

/// The VM's faults, for the conformance suite.
pub(crate) struct VmFaults(pub(crate) Arc<Vm>);

#[async_trait]
impl Faults for VmFaults {
    async fn inject(&self, _: VmStep, fault: Fault) -> bool {
        self.0.inject(fault)
    }

    async fn clear(&self) {
        self.0.clear();
    }
}

#[derive(Default)]
struct State {
    present: BTreeMap<VpmemAddress, Disk>,
    /// What others have attached.
    foreign: BTreeSet<VpmemAddress>,
    running: BTreeSet<VpmemAddress>,
    next: Option<Answer>,
    refuse: Option<(Question, ErrorKind)>,
    sizes: HashMap<PathBuf, u64>,
    other_names: HashMap<PathBuf, PathBuf>,
    replaced: HashMap<PathBuf, u32>,
    removed: HashSet<PathBuf>,
    fixed: bool,
    log: Vec<Event>,
}

/// Ends a call, also when its future is dropped.
struct Running<'a>(&'a Vm, VpmemAddress);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state().running.remove(&self.1);
    }
}

impl Vm {
    pub(crate) fn next(&self, answer: Answer) {
        self.state().next = Some(answer);
    }

    /// The next question of this kind fails.
    pub(crate) fn refuse(&self, question: Question, kind: ErrorKind) {
        self.state().refuse = Some((question, kind));
    }

    pub(crate) fn set_size(&self, disk: &Disk, size: u64) {
        self.state().sizes.insert(disk.source().to_owned(), size);
    }

    /// Makes one disk another name of the other.
    pub(crate) fn link(&self, name: &Disk, disk: &Disk) {
        let (name, disk) = (name.source().to_owned(), disk.source().to_owned());
        self.state().other_names.insert(name, disk);
    }

    /// Puts another file under the name of a disk.
    pub(crate) fn replace(&self, disk: &Disk) {
        let mut state = self.state();
        *state.replaced.entry(disk.source().to_owned()).or_default() += 1;
    }

    pub(crate) fn remove(&self, disk: &Disk) {
        self.state().removed.insert(disk.source().to_owned());
    }

    /// From now on, devices cannot be unplugged.
    pub(crate) fn fix_devices(&self) {
        self.state().fixed = true;
    }

    pub(crate) fn log(&self) -> Vec<Event> {
        self.state().log.clone()
    }

    pub(crate) fn present(&self) -> Vec<VpmemAddress> {
        self.state().present.keys().copied().collect()
    }

    pub(crate) fn disks(&self) -> BTreeMap<VpmemAddress, Disk> {
        self.state().present.clone()
    }

    /// Others attach something, which the hypervisor does not show by name.
    pub(crate) fn put_foreign(&self, at: &str) {
        self.state().foreign.insert(address(at));
    }

    pub(crate) fn take_foreign(&self, at: &str) {
        assert!(self.state().foreign.remove(&address(at)));
    }

    /// Which disk the VM would read there.
    pub(crate) fn disk_at(&self, locator: &str) -> Option<Disk> {
        let place = address(locator.strip_prefix("vpmem:").unwrap());
        self.state().present.get(&place).cloned()
    }

    /// The next call of the transport ends so.
    pub(crate) fn inject(&self, fault: Fault) -> bool {
        let answer = match fault {
            Fault::Uncertain { happens: true } => Answer::DoneButUncertain,
            Fault::Uncertain { happens: false } => Answer::Fail(ErrorKind::Uncertain),
            Fault::Busy => Answer::Fail(ErrorKind::Busy),
            Fault::Held => Answer::Wait,
            Fault::Gone => {
                self.state().present.clear();
                Answer::Fail(ErrorKind::Gone)
            }
            _ => return false,
        };
        self.next(answer);
        true
    }

    /// What waits goes on, and nothing fails any more.
    pub(crate) fn clear(&self) {
        self.state().next = None;
        self.proceed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn call(
        &self,
        place: VpmemAddress,
        event: Event,
        act: impl FnOnce(&mut State) + Send,
    ) -> Result<(), BackendError> {
        let answer = {
            let mut state = self.state();
            state.log.push(event);
            assert!(state.running.insert(place), "two calls at once for {place}");
            state.next.take()
        };
        let _running = Running(self, place);
        self.entered.notify_one();
        match answer {
            Some(Answer::Fail(kind)) => return Err(BackendError::new(kind, "as told")),
            Some(Answer::Wait) => self.proceed.notified().await,
            // Others get a turn in the middle.
            None => tokio::task::yield_now().await,
            _ => {}
        }
        act(&mut self.state());
        match answer {
            Some(Answer::DoneButUncertain) => Err(BackendError::uncertain("no answer in time")),
            Some(Answer::DoneButPanics) => panic!("as told"),
            Some(Answer::DoneButSilent) => std::future::pending().await,
            _ => Ok(()),
        }
    }

    async fn put(&self, place: VpmemAddress, disk: &Disk) -> Result<(), BackendError> {
        let event = Event::Attach(place, disk.clone());
        let is_taken = |foreign: &VpmemAddress| foreign.device == place.device;
        if self.state().foreign.iter().any(is_taken) {
            return Err(BackendError::conflict(format!("{place} is taken")));
        }
        let put = |state: &mut State| {
            for other in state.present.keys() {
                let apart = other.device != place.device
                    || match (other.range, place.range) {
                        (Some(a), Some(b)) => a.end() <= b.offset() || b.end() <= a.offset(),
                        _ => false,
                    };
                assert!(apart, "{place} is in use by {other}");
            }
            state.present.insert(place, disk.clone());
        };
        self.call(place, event, put).await
    }

    async fn take(&self, place: VpmemAddress) -> Result<(), BackendError> {
        let take = |state: &mut State| {
            let fixed = state.fixed && place.range.is_none();
            (!fixed).then(|| state.present.remove(&place));
        };
        self.call(place, Event::Detach(place), take).await
    }

    fn answer(&self, question: Question) -> Result<MutexGuard<'_, State>, BackendError> {
        let mut state = self.state();
        match state.refuse {
            Some((refused, kind)) if refused == question => {
                state.refuse = None;
                Err(BackendError::new(kind, format!("{question:?}, as told")))
            }
            _ => Ok(state),
        }
    }
}

impl State {
    fn id(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let name = self.find(disk)?;
        let file = self.replaced.get(&name).copied().unwrap_or(0);
        Ok(DiskId::name(&format!("{} #{file}", name.display())))
    }

    /// The one name of a disk that is there.
    fn find(&self, disk: &Disk) -> Result<PathBuf, BackendError> {
        let name = disk.source().to_owned();
        let name = self.other_names.get(&name).cloned().unwrap_or(name);
        let numbered = name
            .to_string_lossy()
            .contains(|c: char| c.is_ascii_digit());
        if numbered && !self.removed.contains(&name) {
            Ok(name)
        } else {
            Err(BackendError::not_found(format!("there is no {disk}")))
        }
    }
}

#[async_trait]
impl Attacher for Vm {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.answer(Question::Identify)?.id(disk)
    }

    async fn size(&self, disk: &Disk) -> Result<u64, BackendError> {
        let state = self.answer(Question::Size)?;
        let name = state.find(disk)?;
        Ok(state.sizes.get(&name).copied().unwrap_or(MIB))
    }

    async fn attach(
        &self,
        device: DeviceNumber,
        disk: &Disk,
        _: &DiskId,
    ) -> Result<(), BackendError> {
        self.put(whole(device), disk).await
    }

    async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError> {
        self.take(whole(device)).await?;
        let there = self.state().present.contains_key(&whole(device));
        if there {
            return Err(BackendError::unsuitable("this device cannot be unplugged"));
        }
        Ok(())
    }

    async fn map(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        _: &DiskId,
    ) -> Result<(), BackendError> {
        let size = self.size(disk).await?;
        assert_eq!(range.size(), size.next_multiple_of(PAGE), "{range}");
        let range = Some(range);
        self.put(VpmemAddress { device, range }, disk).await
    }

    async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError> {
        let range = Some(range);
        self.take(VpmemAddress { device, range }).await
    }

    async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
        let state = self.state();
        let present = state.present.iter();
        let ours = present.map(|(at, disk)| Occupant::new(*at, state.id(disk).ok()));
        let foreign = state.foreign.iter().map(|at| Occupant::new(*at, None));
        Ok(ours.chain(foreign).collect())
    }
}

fn whole(device: DeviceNumber) -> VpmemAddress {
    VpmemAddress {
        device,
        range: None,
    }
}

pub(crate) type Vpmem = VpmemTransport<Arc<Vm>>;

/// A VM with so many devices of so many bytes, and its transport.
pub(crate) fn vpmem(
    mode: Mode,
    devices: u16,
    size: u64,
    reserved: &[u64],
) -> (Arc<Vm>, Arc<Vpmem>) {
    let vm = Arc::new(Vm::default());
    let reserved: Vec<_> = reserved.iter().map(|number| device(*number)).collect();
    let geometry = Geometry::new(devices, size).unwrap();
    let vpmem = VpmemTransport::new(vm.clone(), geometry, mode, &reserved).unwrap();
    (vm, Arc::new(vpmem))
}

/// A transport with exactly two addresses, and these.
pub(crate) fn two_addresses(mode: Mode) -> (Arc<Vm>, Arc<Vpmem>, [&'static str; 2]) {
    match mode {
        Mode::WholeDevices => {
            let (vm, transport) = vpmem(mode, 2, MIB, &[]);
            (vm, transport, ["0", "1"])
        }
        Mode::Packed => {
            let (vm, transport) = vpmem(mode, 1, 2 * MIB, &[]);
            (vm, transport, ["0@0+1048576", "0@1048576+1048576"])
        }
    }
}

pub(crate) fn device(number: u64) -> DeviceNumber {
    number.try_into().unwrap()
}

pub(crate) fn address(text: &str) -> VpmemAddress {
    text.parse().unwrap()
}

pub(crate) fn disk(number: usize) -> Disk {
    Disk::virtual_disk(format!("/images/{number}.vhd")).read_only()
}

pub(crate) fn entry(text: &str, usage: SlotUse, disk: Option<Disk>) -> SlotEntry {
    SlotEntry {
        address: address(text),
        usage,
        disk,
    }
}

pub(crate) fn occupied(text: &str, number: usize) -> SlotEntry {
    entry(text, SlotUse::Occupied, Some(disk(number)))
}
