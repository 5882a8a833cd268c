//! Checks the callers' side of the contracts, from the log of a fake VM.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::log::tail;
use super::{Event, Key, Outcome, Phase, VmStep};
use crate::{DeviceLocator, DiskId, ErrorKind};

/// A rule that every caller of a backend keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// No two calls for one key run at once; nor does an unplug or a detach of a device beside a mount
    /// or an unmount of it.
    OneCallPerKey,
    /// What is set up, or may be, is torn down before it is set up again.
    TearDownBetweenSetUps,
    /// What was torn down is not torn down again.
    TearDownOnce,
    /// A device is unplugged and detached only when nothing of it is mounted, nor may be.
    UnmountFirst,
    /// A device that the guest has seen is unplugged before it is detached.
    UnplugFirst,
    /// Every call may finish, but for an identify, which changes nothing.
    LetFinish,
}

/// A rule that was broken, by which event, with the end of the log up to it.
#[derive(Clone)]
pub struct Violation {
    rule: Rule,
    order: usize,
    said: String,
    tail: String,
}

impl Violation {
    /// The rule that was broken.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The place in the log of the event that broke it.
    pub fn order(&self) -> usize {
        self.order
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation {
            rule,
            order,
            said,
            tail,
        } = self;
        write!(f, "{rule:?} is broken by event {order}: {said}\n{tail}")
    }
}

impl fmt::Debug for Violation {
    /// As `Display`, so that `unwrap()` shows the log as lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {}

/// Reads the whole log once; the time is linear in its length.
/// `restarts` are the places in it where a new process has begun.
pub(super) fn check(log: &[Event], restarts: &[usize]) -> Result<(), Violation> {
    let mut reader = Reader::default();
    for (at, event) in log.iter().enumerate() {
        if restarts.contains(&at) {
            reader.restart();
        }
        reader.read(event).map_err(|(rule, said)| Violation {
            rule,
            order: event.order,
            said,
            tail: tail(&log[..=at]),
        })?;
    }
    Ok(())
}

type Broken = Result<(), (Rule, String)>;

/// What the caller can know of a disk or a target.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Status {
    /// It was never set up, or that failed.
    #[default]
    Absent,
    Up,
    /// It may be up.
    InDoubt,
    TornDown,
}

#[derive(Default)]
struct OfDisk {
    status: Status,
    running: Option<VmStep>,
    device: Option<DeviceLocator>,
}

#[derive(Default)]
struct OfTarget {
    status: Status,
    running: Option<VmStep>,
    /// The device that is or may be mounted here.
    device: Option<DeviceLocator>,
}

#[derive(Default)]
struct OfDevice {
    /// The call that must have the device alone.
    alone: Option<VmStep>,
    /// How many calls that may share it are running.
    shared: usize,
    /// How many targets have it mounted, or may have.
    mounts: usize,
    unplugged: bool,
}

#[derive(Default)]
struct Reader {
    disks: HashMap<DiskId, OfDisk>,
    targets: HashMap<Arc<Path>, OfTarget>,
    devices: HashMap<DeviceLocator, OfDevice>,
    gone: bool,
}

impl Reader {
    /// What was up may be so still, and the calls that were under way have no end.
    fn restart(&mut self) {
        // The slot that was kept for a disk in doubt may be free by now; an adoption says where the disk is.
        let in_doubt = self
            .disks
            .values_mut()
            .filter(|disk| disk.status == Status::InDoubt);
        in_doubt.for_each(|disk| disk.device = None);
        let targets = self.targets.values_mut();
        let targets = targets.map(|target| (&mut target.status, &mut target.running));
        let disks = self.disks.values_mut();
        let disks = disks.map(|disk| (&mut disk.status, &mut disk.running));
        for (status, running) in disks.chain(targets) {
            *running = None;
            *status = match status {
                Status::Up | Status::InDoubt => Status::InDoubt,
                Status::Absent | Status::TornDown => Status::Absent,
            };
        }
        for device in self.devices.values_mut() {
            (device.alone, device.shared) = (None, 0);
        }
    }

    fn read(&mut self, event: &Event) -> Broken {
        if let Phase::Ended(outcome) = event.phase {
            self.gone |= outcome == Outcome::Failed(ErrorKind::Gone);
        }
        let broken = match (event.step, &event.key) {
            (VmStep::Identify | VmStep::Resolve, _) => Ok(()),
            (_, Key::Disk(disk)) => self.read_disk(event, disk),
            (_, Key::Device(device)) => self.read_device(event, device),
            (_, Key::Target(target)) => self.read_target(event, target),
        };
        broken?;
        match event.phase {
            Phase::Ended(Outcome::Dropped) if event.step != VmStep::Identify => Err((
                Rule::LetFinish,
                format!("the {} of {} was dropped half-way", event.step, event.key),
            )),
            _ => Ok(()),
        }
    }

    fn read_disk(&mut self, event: &Event, id: &DiskId) -> Broken {
        let disk = self.disks.entry(id.clone()).or_default();
        let Phase::Ended(outcome) = event.phase else {
            begin(&mut disk.running, &mut disk.status, event)?;
            return match (event.step, disk.device.clone()) {
                (VmStep::Detach, Some(device)) if disk.status != Status::Absent => {
                    let certain = disk.status == Status::Up;
                    self.begin_alone(event, &device, certain)
                }
                _ => Ok(()),
            };
        };
        disk.running = None;
        disk.status = disk.status.after(event.step, outcome);
        if matches!(event.step, VmStep::Attach | VmStep::Adopt) && disk.status.is_held() {
            if event.device.is_some() {
                disk.device.clone_from(&event.device);
            }
            return Ok(());
        }
        let device = match disk.status {
            Status::TornDown | Status::Absent => disk.device.take(),
            _ => disk.device.clone(),
        };
        if let Some(device) = device {
            self.devices.entry(device.clone()).or_default().alone = None;
            if !self.disks[id].status.is_held() {
                // The slot is free: the next device in it starts afresh.
                self.devices.remove(&device);
            }
        }
        Ok(())
    }

    fn read_device(&mut self, event: &Event, device: &DeviceLocator) -> Broken {
        let Phase::Ended(outcome) = event.phase else {
            return self.begin_alone(event, device, false);
        };
        let device = self.devices.entry(device.clone()).or_default();
        device.alone = None;
        device.unplugged |= outcome == Outcome::Done;
        Ok(())
    }

    fn read_target(&mut self, event: &Event, path: &Arc<Path>) -> Broken {
        let target = self.targets.entry(path.clone()).or_default();
        let Phase::Ended(outcome) = event.phase else {
            begin(&mut target.running, &mut target.status, event)?;
            if event.step == VmStep::Mount {
                target.device.clone_from(&event.device);
            }
            return match target.device.clone() {
                Some(device) => self.begin_shared(event, &device),
                None => Ok(()),
            };
        };
        target.running = None;
        let was_held = target.status.is_held();
        target.status = target.status.after(event.step, outcome);
        let is_held = target.status.is_held();
        let device = if is_held {
            target.device.clone()
        } else {
            target.device.take()
        };
        if let Some(device) = device {
            let device = self.devices.entry(device).or_default();
            device.shared = device.shared.saturating_sub(1);
            device.mounts =
                (device.mounts + usize::from(is_held)).saturating_sub(usize::from(was_held));
        }
        Ok(())
    }

    /// A call begins that needs the device for itself: an unplug or a detach.
    fn begin_alone(&mut self, event: &Event, locator: &DeviceLocator, certain: bool) -> Broken {
        let gone = self.gone;
        let device = self.devices.entry(locator.clone()).or_default();
        let Event { step, key, .. } = event;
        if let Some(other) = device.alone {
            let said = format!("{step} of {key} ({locator}) began during its {other}");
            return Err((Rule::OneCallPerKey, said));
        }
        if device.shared > 0 {
            let said = format!("{step} of {key} ({locator}) began during a mount or unmount of it");
            return Err((Rule::OneCallPerKey, said));
        }
        if device.mounts > 0 && !gone {
            let said = format!("{step} of {key} ({locator}) began while it is or may be mounted");
            return Err((Rule::UnmountFirst, said));
        }
        if *step == VmStep::Detach && certain && !device.unplugged && !gone {
            let said = format!("{step} of {key} ({locator}) began before it was unplugged");
            return Err((Rule::UnplugFirst, said));
        }
        device.alone = Some(*step);
        Ok(())
    }

    /// A call begins that can share the device with mounts at other targets.
    fn begin_shared(&mut self, event: &Event, locator: &DeviceLocator) -> Broken {
        let device = self.devices.entry(locator.clone()).or_default();
        if let Some(other) = device.alone {
            let said = format!(
                "{} at {} began during the {other} of {locator}",
                event.step, event.key
            );
            return Err((Rule::OneCallPerKey, said));
        }
        device.shared += 1;
        Ok(())
    }
}

/// A call for a key begins: it must be the only one, and it must fit what is there.
fn begin(running: &mut Option<VmStep>, status: &mut Status, event: &Event) -> Broken {
    let Event { step, key, .. } = event;
    if let Some(other) = running {
        return Err((
            Rule::OneCallPerKey,
            format!("{step} of {key} began during its {other}"),
        ));
    }
    if step.is_set_up() && status.is_held() {
        let said = format!("{step} of {key} began though it is or may be set up already");
        return Err((Rule::TearDownBetweenSetUps, said));
    }
    if step.is_tear_down() && *status == Status::TornDown {
        return Err((
            Rule::TearDownOnce,
            format!("{step} of {key} began though it was torn down"),
        ));
    }
    *running = Some(*step);
    Ok(())
}

impl Status {
    fn is_held(self) -> bool {
        matches!(self, Status::Up | Status::InDoubt)
    }

    fn after(self, step: VmStep, outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done if step.is_set_up() || step == VmStep::Adopt => Status::Up,
            Outcome::Absent => Status::Absent,
            Outcome::Done | Outcome::Failed(ErrorKind::Gone) => Status::TornDown,
            _ if step.is_set_up() && outcome.is_in_doubt() => Status::InDoubt,
            _ if step.is_set_up() => Status::Absent,
            // A tear-down that failed has changed nothing that the caller knows of.
            _ => self,
        }
    }
}
