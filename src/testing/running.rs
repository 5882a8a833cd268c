//! One call of the fake VM: its delay, its gate, its effect, and its entries in the log.

use std::panic::resume_unwind;
use std::time::Duration;

use super::state::{Reach, VmState};
use super::{Call, FakeVm, Gate, Key, Outcome, Phase, VmStep};
use crate::{BackendError, DeviceLocator, ErrorKind};

/// A call that has begun and not ended.
pub(super) struct Running<'a> {
    vm: &'a FakeVm,
    step: VmStep,
    key: Key,
    nth: usize,
    /// For a mount, which device: the table does not have it yet.
    device: Option<DeviceLocator>,
    /// It has ended, or its process has.
    ended: bool,
}

impl FakeVm {
    pub(super) fn begin(
        &self,
        step: VmStep,
        key: Key,
        device: Option<DeviceLocator>,
    ) -> Running<'_> {
        let mut state = self.state();
        let ended = self.is_of_ended_process(&state);
        if !ended {
            state.calls[step as usize] += 1;
            let touched = device.clone().or_else(|| state.device_of(&key));
            state.record(step, &key, touched, Phase::Begun);
        }
        let nth = state.calls[step as usize];
        drop(state);
        self.changed().notify_waiters();
        Running {
            vm: self,
            step,
            key,
            nth,
            device,
            ended,
        }
    }
}

impl Running<'_> {
    /// Takes the call through its delay and its gate to its effect.
    pub(super) async fn act<T>(
        self,
        act: impl FnOnce(&mut VmState, Reach) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        self.act_as(act, |_| Outcome::Done).await
    }

    /// The same, with what the log says of a success.
    pub(super) async fn act_as<T>(
        mut self,
        act: impl FnOnce(&mut VmState, Reach) -> Result<T, BackendError>,
        success: fn(&T) -> Outcome,
    ) -> Result<T, BackendError> {
        self.unless_ended().await;
        self.take_time().await;
        let (reach, panics) = match self.gate() {
            Gate::Ok => (Reach::Delivered, false),
            Gate::Err(ErrorKind::LostWrites) if self.step.is_tear_down() => {
                self.unless_ended().await;
                self.end(Reach::Delivered, false, act, success)?;
                let said = format!("{} of {} lost writes", self.step, self.key);
                return Err(BackendError::lost_writes(said));
            }
            Gate::Err(kind) => return Err(self.fail(kind)),
            Gate::Slow(time) => {
                tokio::time::sleep(time).await;
                (Reach::Delivered, false)
            }
            Gate::SlowAnswer(time) => {
                self.unless_ended().await;
                let result = self.end(Reach::Delivered, false, act, success);
                tokio::time::sleep(time).await;
                self.unless_ended().await;
                return result;
            }
            Gate::Never => {
                self.wait_for_opening().await;
                (Reach::Delivered, false)
            }
            Gate::Uncertain { happened } => (Reach::unknown(happened), false),
            Gate::Panic { happened } => (Reach::unknown(happened), true),
        };
        self.unless_ended().await;
        let result = self.end(reach, panics, act, success);
        if panics {
            let said = format!(
                "the fake VM was told to panic in {} of {}",
                self.step, self.key
            );
            resume_unwind(Box::new(said));
        }
        result
    }

    /// Ends the call without effect, as another one that was part of it has ended.
    pub(super) fn fail_as<T>(mut self, error: BackendError) -> Result<T, BackendError> {
        let outcome = match error.kind() {
            ErrorKind::Uncertain => Outcome::Uncertain { happened: false },
            kind => Outcome::Failed(kind),
        };
        self.record(outcome);
        Err(error)
    }

    /// A process that has ended hears and does nothing any more.
    async fn unless_ended(&mut self) {
        if self.vm.is_of_ended_process(&self.vm.state()) {
            self.ended = true;
            std::future::pending().await
        }
    }

    async fn take_time(&self) {
        let (delay, pace) = {
            let state = self.vm.state();
            (state.gates.delay(self.step), state.gates.pace.clone())
        };
        let delay = delay + pace.map_or(Duration::ZERO, |pace| pace(&self.call()));
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
    }

    fn gate(&self) -> Gate {
        let (gate, plan) = {
            let mut state = self.vm.state();
            (state.gates.take(self.step), state.gates.plan.clone())
        };
        gate.unwrap_or_else(|| plan.map_or(Gate::Ok, |plan| plan(&self.call())))
    }

    fn call(&self) -> Call<'_> {
        Call {
            step: self.step,
            key: &self.key,
            nth: self.nth,
        }
    }

    async fn wait_for_opening(&self) {
        let opened = self.vm.state().opened;
        loop {
            let changed = self.vm.changed().notified();
            if self.vm.state().opened > opened {
                return;
            }
            changed.await;
        }
    }

    fn fail(&mut self, kind: ErrorKind) -> BackendError {
        if kind == ErrorKind::Gone {
            self.vm.kill();
        }
        let kind = if self.vm.state().is_gone(self.step) {
            ErrorKind::Gone
        } else {
            kind
        };
        let said = format!("the fake VM was told to fail {} of {}", self.step, self.key);
        self.record(match kind {
            ErrorKind::Uncertain => Outcome::Uncertain { happened: false },
            kind => Outcome::Failed(kind),
        });
        BackendError::new(kind, said)
    }

    /// The effect and the end of the call, in one moment.
    fn end<T>(
        &mut self,
        reach: Reach,
        panics: bool,
        act: impl FnOnce(&mut VmState, Reach) -> Result<T, BackendError>,
        success: fn(&T) -> Outcome,
    ) -> Result<T, BackendError> {
        let mut state = self.vm.state();
        // Where a detach ends, only the state before it knows the device.
        let before = state.device_of(&self.key);
        let result = if state.is_gone(self.step) {
            Err(BackendError::gone(format!(
                "the VM is gone: {} of {}",
                self.step, self.key
            )))
        // What does not happen has no effect, but an attachment in doubt keeps a slot out of use.
        } else if reach == Reach::Lost && self.step != VmStep::Attach {
            Err(BackendError::uncertain(String::new()))
        } else {
            act(&mut state.vm, reach)
        };
        let happened = reach == Reach::Untold && result.is_ok();
        let gone = result
            .as_ref()
            .err()
            .is_some_and(|error| error.kind() == ErrorKind::Gone);
        let outcome = match &result {
            _ if panics => Outcome::Panicked { happened },
            _ if reach != Reach::Delivered && !gone => Outcome::Uncertain { happened },
            Ok(done) => success(done),
            Err(error) => Outcome::Failed(error.kind()),
        };
        let device = self
            .device
            .take()
            .or(before)
            .or_else(|| state.device_of(&self.key));
        self.ended = true;
        state.record(self.step, &self.key, device, Phase::Ended(outcome));
        drop(state);
        match outcome {
            Outcome::Uncertain { .. } => {
                let said = format!("{} of {} got no answer", self.step, self.key);
                Err(BackendError::uncertain(said))
            }
            _ => result,
        }
    }

    fn record(&mut self, outcome: Outcome) {
        let mut state = self.vm.state();
        let device = self.device.take().or_else(|| state.device_of(&self.key));
        self.ended = true;
        state.record(self.step, &self.key, device, Phase::Ended(outcome));
    }
}

impl Drop for Running<'_> {
    /// Only a call that has not come to its end: its future was dropped, or a call within it panics.
    fn drop(&mut self) {
        let ended = self.ended || self.vm.is_of_ended_process(&self.vm.state());
        if !ended {
            let panics = std::thread::panicking();
            let in_panic = Outcome::Panicked { happened: false };
            self.record(if panics { in_panic } else { Outcome::Dropped });
        }
    }
}

impl Reach {
    fn unknown(happened: bool) -> Self {
        if happened { Reach::Untold } else { Reach::Lost }
    }
}
