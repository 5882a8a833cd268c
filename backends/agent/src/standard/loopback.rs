//! Loop devices of the guest.

use blockmount_loopback::{LoopResolver, LoopUnplugger, SCHEME};

use crate::{Argument, GuestDevices, GuestTransport, Timeouts};

/// Loop devices, which somebody else binds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Loop;

impl GuestTransport for Loop {
    fn scheme(&self) -> &str {
        SCHEME
    }

    fn arguments(&self) -> &[Argument] {
        &[]
    }

    fn set(&mut self, argument: &str, _value: &str) -> Result<(), String> {
        Err(format!("loop devices have no argument {argument}"))
    }

    fn modules(&self) -> &[&str] {
        &["loop"]
    }

    fn devices(&self, timeouts: Timeouts) -> Option<GuestDevices> {
        let unplugger = LoopUnplugger::with_timeout(timeouts.busy);
        Some(GuestDevices::new(LoopResolver, unplugger))
    }
}
