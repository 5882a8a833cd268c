//! A hypervisor that keeps its disks in memory, answers as it is told, and holds the transport to the
//! contract: no two calls for one address at once, and nothing put where something is.

// Each test file is a program of its own, and not all of them use everything.
#![allow(dead_code)]
// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use blockmount::placement::{Occupant, SlotUse};
use blockmount::testing::VmStep;
use blockmount::testing::conformance::{Fault, Faults};
use blockmount::{BackendError, Disk, DiskId, ErrorKind};
use blockmount_scsi::{Attacher, Geometry, ScsiAddress, ScsiTransport, SlotEntry};
use tokio::sync::Notify;

/// What the next call does.
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Attach(ScsiAddress, Disk),
    Detach(ScsiAddress),
}

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
    present: BTreeMap<ScsiAddress, Disk>,
    /// What others have attached, and which disk that is, if the hypervisor shows it.
    foreign: BTreeMap<ScsiAddress, Option<DiskId>>,
    /// Whether the hypervisor shows nothing.
    blind: bool,
    running: BTreeSet<ScsiAddress>,
    next: Option<Answer>,
    log: Vec<Event>,
}

/// Ends a call, also when its future is dropped.
struct Running<'a>(&'a Vm, ScsiAddress);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state().running.remove(&self.1);
    }
}

impl Vm {
    pub(crate) fn next(&self, answer: Answer) {
        self.state().next = Some(answer);
    }

    pub(crate) fn log(&self) -> Vec<Event> {
        self.state().log.clone()
    }

    pub(crate) fn present(&self) -> Vec<ScsiAddress> {
        self.state().present.keys().copied().collect()
    }

    pub(crate) fn disks(&self) -> BTreeMap<ScsiAddress, Disk> {
        self.state().present.clone()
    }

    /// Others attach something, which the hypervisor shows as this disk.
    pub(crate) fn put_foreign(&self, at: &str, shown: Option<&Disk>) {
        self.state().foreign.insert(address(at), shown.map(id));
    }

    pub(crate) fn take_foreign(&self, at: &str) {
        self.state().foreign.remove(&address(at)).unwrap();
    }

    pub(crate) fn foreign(&self) -> usize {
        self.state().foreign.len()
    }

    /// From now on, the hypervisor does not show what the VM has.
    pub(crate) fn show_nothing(&self) {
        self.state().blind = true;
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
        address: ScsiAddress,
        event: Event,
        act: impl FnOnce(&mut State) + Send,
    ) -> Result<(), BackendError> {
        let answer = {
            let mut state = self.state();
            state.log.push(event);
            assert!(
                state.running.insert(address),
                "two calls at once for {address}"
            );
            state.next.take()
        };
        let _running = Running(self, address);
        self.entered.notify_one();
        match answer {
            Some(Answer::Fail(kind)) => return Err(BackendError::new(kind, "as told")),
            Some(Answer::Wait) => self.proceed.notified().await,
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
}

#[async_trait]
impl Attacher for Vm {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        find(disk)?;
        Ok(id(disk))
    }

    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        _id: &DiskId,
    ) -> Result<(), BackendError> {
        find(disk)?;
        let event = Event::Attach(address, disk.clone());
        if self.state().foreign.contains_key(&address) {
            return Err(BackendError::conflict(format!("{address} is taken")));
        }
        let put = |state: &mut State| {
            let before = state.present.insert(address, disk.clone());
            assert_eq!(before, None, "{address} is in use");
        };
        self.call(address, event, put).await
    }

    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
        let take = |state: &mut State| {
            state.foreign.remove(&address);
            state.present.remove(&address);
        };
        self.call(address, Event::Detach(address), take).await
    }

    async fn resize(&self, _: ScsiAddress, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("disks of this VM keep their size"))
    }

    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
        let state = self.state();
        if state.blind {
            return Err(BackendError::unsuitable("this hypervisor shows nothing"));
        }
        let present = state.present.iter();
        let ours = present.map(|(at, disk)| Occupant::new(*at, Some(id(disk))));
        let foreign = state.foreign.iter();
        let foreign = foreign.map(|(at, id)| Occupant::new(*at, id.clone()));
        Ok(ours.chain(foreign).collect())
    }
}

pub(crate) type Scsi = ScsiTransport<Arc<Vm>>;

/// A VM with as many controllers and LUNs, and its transport.
pub(crate) fn scsi(controllers: u16, luns: u16, reserved: &[&str]) -> (Arc<Vm>, Arc<Scsi>) {
    let reserved: Vec<_> = reserved.iter().map(|text| address(text)).collect();
    scsi_without(controllers, luns, &reserved)
}

pub(crate) fn scsi_without(
    controllers: u16,
    luns: u16,
    reserved: &[ScsiAddress],
) -> (Arc<Vm>, Arc<Scsi>) {
    let vm = Arc::new(Vm::default());
    let geometry = Geometry::new(controllers, luns).unwrap();
    let scsi = ScsiTransport::new(vm.clone(), geometry, reserved).unwrap();
    (vm, Arc::new(scsi))
}

fn id(disk: &Disk) -> DiskId {
    DiskId::name(&disk.source().to_string_lossy())
}

/// Only `none.vhdx` is missing.
fn find(disk: &Disk) -> Result<(), BackendError> {
    match disk.source().ends_with("none.vhdx") {
        true => Err(BackendError::not_found(format!("there is no disk {disk}"))),
        false => Ok(()),
    }
}

pub(crate) fn address(text: &str) -> ScsiAddress {
    text.parse().unwrap()
}

pub(crate) fn disk(number: usize) -> Disk {
    Disk::virtual_disk(format!("/images/{number}.vhdx"))
}

pub(crate) fn entry(text: &str, usage: SlotUse, disk: Option<Disk>) -> SlotEntry {
    SlotEntry {
        address: address(text),
        usage,
        disk,
    }
}
