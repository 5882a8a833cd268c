//! What is registered with an agent for each transport.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{Resolver, Unplugger};

/// The guest's half of a transport, as an agent registers it: one value for each scheme of locators.
///
/// The agent calls [`set`](Self::set) for each of the [`arguments`](Self::arguments) on its command line, and then
/// [`devices`](Self::devices) once. In exchange it asks this transport for all devices whose locators have
/// its scheme, and no other.
pub trait GuestTransport: fmt::Debug + Send + Sync {
    /// The scheme of its locators, such as `nbd` of `nbd:3`.
    fn scheme(&self) -> &str;

    /// What can be said about it on the command line. The names must be its own: an agent asks the transports in the
    /// order of their registration, after its own arguments.
    fn arguments(&self) -> &[Argument];

    /// Takes one of its arguments, each time it is given.
    ///
    /// # Errors
    ///
    /// Why the value makes no sense, as one sentence in lower case.
    fn set(&mut self, argument: &str, value: &str) -> Result<(), String>;

    /// The kernel modules without which its devices do not appear, by name. They must be in the guest's image.
    fn modules(&self) -> &[&str];

    /// What finds and unplugs its devices; nothing if this guest has none, as far as can be known now.
    /// What finds, and what removes in the end, is to wait no longer than `timeouts.device`, what unplugs no longer than `timeouts.busy` for a user to go.
    fn devices(&self, timeouts: Timeouts) -> Option<GuestDevices>;
}

/// How long an agent waits for what a guest does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// For a device to appear, and for the kernel to remove it. Default: 45 seconds, because of hundreds that a host plugs at
    /// once a small guest finds a few dozen a second, and the disks of one SCSI host are removed one after the other. Hosts of ours wait 90 seconds for an answer.
    pub device: Duration,
    /// For the users of a device or a mount to go, before it counts as in use. Default: five seconds, since
    /// a guest under emulation on a busy host takes one for what is done in milliseconds elsewhere.
    pub busy: Duration,
    /// For a filesystem to be made or checked, and for the files of a volume to be given to a group. Default: one minute.
    pub format: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            device: Duration::from_secs(45),
            busy: Duration::from_secs(5),
            format: Duration::from_secs(60),
        }
    }
}

/// What finds the devices of a transport, and what takes them out.
#[derive(Clone)]
pub struct GuestDevices {
    pub(crate) resolver: Arc<dyn Resolver>,
    pub(crate) unplugger: Arc<dyn Unplugger>,
}

impl GuestDevices {
    /// Devices that are found by one and unplugged by the other.
    pub fn new(resolver: impl Resolver + 'static, unplugger: impl Unplugger + 'static) -> Self {
        GuestDevices {
            resolver: Arc::new(resolver),
            unplugger: Arc::new(unplugger),
        }
    }
}

impl fmt::Debug for GuestDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestDevices").finish_non_exhaustive()
    }
}

/// An argument of the command line that has a value.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Argument {
    /// Without its dashes: `scsi-controller`.
    pub name: &'static str,
    /// What the value is called in the help: `ADDRESS`.
    pub value: &'static str,
    /// One or more sentences.
    pub help: &'static str,
}

impl Argument {
    /// An argument `--name VALUE`.
    pub const fn new(name: &'static str, value: &'static str, help: &'static str) -> Self {
        Argument { name, value, help }
    }
}
