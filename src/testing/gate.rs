//! What a test decides about each call of the VM.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::{DeviceLocator, DiskId, ErrorKind};

/// A call that a [`FakeVm`](super::FakeVm) takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmStep {
    /// `Transport::identify`.
    Identify,
    /// `Transport::attach`.
    Attach,
    /// `Resolver::resolve`, also as the first part of a mount.
    Resolve,
    /// `Mounter::mount`.
    Mount,
    /// `LayerCombiner::combine`.
    Combine,
    /// `LayerCombiner::separate`.
    Separate,
    /// `Binder::bind`.
    Bind,
    /// `Binder::unbind`.
    Unbind,
    /// `Mounter::unmount`.
    Unmount,
    /// `Unplugger::unplug`.
    Unplug,
    /// `Transport::detach`.
    Detach,
    /// `adopt` of a [`Transport`](crate::Transport), a [`Mounter`](crate::Mounter), a
    /// [`LayerCombiner`](crate::LayerCombiner) or a [`Binder`](crate::Binder).
    Adopt,
}

impl VmStep {
    /// Every step, in the order of a disk's life; the last one is what follows a restart.
    pub const ALL: [VmStep; 12] = [
        VmStep::Identify,
        VmStep::Attach,
        VmStep::Resolve,
        VmStep::Mount,
        VmStep::Combine,
        VmStep::Separate,
        VmStep::Bind,
        VmStep::Unbind,
        VmStep::Unmount,
        VmStep::Unplug,
        VmStep::Detach,
        VmStep::Adopt,
    ];

    /// Whether it sets something up that another step tears down.
    pub fn is_set_up(self) -> bool {
        matches!(
            self,
            VmStep::Attach | VmStep::Mount | VmStep::Combine | VmStep::Bind
        )
    }

    /// Whether it tears something down.
    pub fn is_tear_down(self) -> bool {
        matches!(
            self,
            VmStep::Separate | VmStep::Unbind | VmStep::Unmount | VmStep::Unplug | VmStep::Detach
        )
    }
}

impl fmt::Display for VmStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VmStep::Identify => "identify",
            VmStep::Attach => "attach",
            VmStep::Resolve => "resolve",
            VmStep::Mount => "mount",
            VmStep::Combine => "combine",
            VmStep::Separate => "separate",
            VmStep::Bind => "bind",
            VmStep::Unbind => "unbind",
            VmStep::Unmount => "unmount",
            VmStep::Unplug => "unplug",
            VmStep::Detach => "detach",
            VmStep::Adopt => "adopt",
        })
    }
}

/// What a call is about: of two calls with one key, only one may run at a time.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Key {
    /// Of identify, attach, detach and adopt.
    Disk(DiskId),
    /// Of resolve and unplug.
    Device(DeviceLocator),
    /// Of mount, unmount, combine, separate, bind, unbind and adopt.
    Target(Arc<Path>),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Disk(id) => id.fmt(f),
            Key::Device(locator) => locator.fmt(f),
            Key::Target(target) => target.display().fmt(f),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One call, as a plan sees it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Which call it is.
    pub step: VmStep,
    /// What it is about.
    pub key: &'a Key,
    /// Its number among the calls of this step, from 1, in the order in which they began.
    pub nth: usize,
}

/// How a call ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// As it would in a real VM; that may still be an error.
    #[default]
    Ok,
    /// With an error and without effect. `Gone` is true of the VM from then on, as after
    /// [`FakeVm::kill`](super::FakeVm::kill). A tear-down with `LostWrites` has its effect.
    Err(ErrorKind),
    /// With an error that leaves open whether it happened.
    Uncertain {
        /// Whether it did.
        happened: bool,
    },
    /// As it would in a real VM, after that much time.
    Slow(Duration),
    /// As it would in a real VM, and its answer comes after that much time.
    SlowAnswer(Duration),
    /// Not before [`FakeVm::open_gates`](super::FakeVm::open_gates), then as it would in a real VM.
    Never,
    /// With a panic (which does not reach the panic hook, to keep the output of tests readable).
    Panic {
        /// Whether it had an effect before.
        happened: bool,
    },
}

type Plan<T> = Arc<dyn Fn(&Call<'_>) -> T + Send + Sync>;

/// The gates and delays that are set.
#[derive(Default)]
pub(super) struct Gates {
    next: [VecDeque<(usize, Gate)>; VmStep::ALL.len()],
    always: [Gate; VmStep::ALL.len()],
    pub(super) plan: Option<Plan<Gate>>,
    delays: [Duration; VmStep::ALL.len()],
    pub(super) pace: Option<Plan<Duration>>,
}

impl Gates {
    pub(super) fn push(&mut self, step: VmStep, calls: usize, gate: Gate) {
        if calls > 0 {
            self.next[step as usize].push_back((calls, gate));
        }
    }

    pub(super) fn set(&mut self, step: VmStep, gate: Gate) {
        self.always[step as usize] = gate;
    }

    pub(super) fn set_delay(&mut self, step: VmStep, delay: Duration) {
        self.delays[step as usize] = delay;
    }

    pub(super) fn delay(&self, step: VmStep) -> Duration {
        self.delays[step as usize]
    }

    /// The gate that is set for this call, if it is not left to the plan.
    pub(super) fn take(&mut self, step: VmStep) -> Option<Gate> {
        let queue = &mut self.next[step as usize];
        if let Some((calls, gate)) = queue.front_mut() {
            let gate = *gate;
            *calls -= 1;
            if *calls == 0 {
                queue.pop_front();
            }
            return Some(gate);
        }
        Some(self.always[step as usize]).filter(|gate| *gate != Gate::Ok)
    }

    /// Sets every gate to `Ok`; delays stay.
    pub(super) fn open(&mut self) {
        self.next.iter_mut().for_each(VecDeque::clear);
        self.always = Default::default();
        self.plan = None;
    }
}
