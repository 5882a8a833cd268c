//! The faults of the conformance suite, as the fake VM has them.

use async_trait::async_trait;

use super::conformance::{Fault, Faults};
use super::{FakeVm, Gate, VmStep};
use crate::ErrorKind;

/// All of them, for every step. After [`Fault::Gone`] the VM has ended for good.
#[async_trait]
impl Faults for FakeVm {
    async fn inject(&self, step: VmStep, fault: Fault) -> bool {
        let gate = match fault {
            Fault::Uncertain { happens } => Gate::Uncertain { happened: happens },
            Fault::Busy => Gate::Err(ErrorKind::Busy),
            Fault::Gone => Gate::Err(ErrorKind::Gone),
            Fault::Held => Gate::Never,
        };
        self.gate_next(step, 1, gate);
        true
    }

    /// Opens all gates.
    async fn clear(&self) {
        self.open_gates();
    }
}
