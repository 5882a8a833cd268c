//! The transports by which disks get into a virtual machine: one line of [`LINES`] for each.

use std::fmt::Debug;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use blockmount::{Disk, SlotStatus, Transport};
use blockmount_qemu::{QemuScsi, QemuVpmem, Vm, VmBuilder};
use blockmount_scsi::ScsiTransport;
use blockmount_vpmem::{Mode, VpmemTransport};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::failure::{Context, Failure};
use crate::guest::Needs;
use crate::report::SlotReport;

/// What the program has to know of a transport.
#[derive(Debug)]
struct Line {
    /// Its name on the command line, and in locators.
    scheme: &'static str,
    help: &'static str,
    /// Gives a VM its hardware.
    hardware: fn(VmBuilder) -> VmBuilder,
    /// Tells the agent of the guest where the hardware is, one argument each.
    agent_arguments: fn() -> Vec<String>,
    /// Starts it in a running VM, with files of its own in a directory.
    start: Start,
}

type Start = fn(&Vm, &Path, Hardware) -> Result<Arc<dyn VmTransport>, Failure>;

/// Each disk goes to the first that takes it. The last takes every disk, and is the default.
const LINES: [Line; 2] = [
    Line {
        scheme: blockmount_vpmem::SCHEME,
        help: "All layers on VPMEM; a scratch disk, which VPMEM cannot be, on SCSI",
        hardware: |vm| vm.persistent_memory(MEMORY_PORTS, u64::from(MEMORY_PORTS) * MEMORY_SIZE),
        agent_arguments: || {
            let port = |number| format!("port:{}", blockmount_qemu::memory_port_address(number));
            arguments("--vpmem", (0..MEMORY_PORTS).map(port))
        },
        start: |vm, directory, _| {
            let attacher = vm.vpmem(MEMORY_SIZE, directory)?;
            let geometry = attacher.geometry();
            let transport = VpmemTransport::new(attacher, geometry, Mode::Packed, &[]);
            Ok(Arc::new(
                transport.context(|| "cannot use VPMEM".to_owned())?,
            ))
        },
    },
    Line {
        scheme: blockmount_scsi::SCHEME,
        help: "Everything on SCSI",
        hardware: |vm| vm.controllers(CONTROLLERS),
        agent_arguments: || {
            let address = |number| format!("pci:{}", blockmount_qemu::controller_address(number));
            arguments("--scsi-controller", (0..CONTROLLERS).map(address))
        },
        start: |vm, _, hardware| scsi(vm.scsi(), hardware.allows_backing),
    },
];

/// Everything on the SCSI controllers of a VM, whoever has started it.
pub(super) fn scsi(
    attacher: QemuScsi,
    allows_backing: bool,
) -> Result<Arc<dyn VmTransport>, Failure> {
    let attacher = match allows_backing {
        true => attacher.allow_backing_files(),
        false => attacher,
    };
    let geometry = attacher.geometry();
    let transport = ScsiTransport::new(attacher, geometry, &[]);
    Ok(Arc::new(
        transport.context(|| "cannot use SCSI".to_owned())?,
    ))
}

/// How many SCSI controllers a VM has.
const CONTROLLERS: u8 = 4;
/// How many devices of persistent memory it can have, on which layers are packed.
const MEMORY_PORTS: u8 = 2;
/// How large each of them is, in bytes. Each GiB costs the guest 16 MiB of its memory.
const MEMORY_SIZE: u64 = 2 << 30;

/// A transport of a VM, with what reports say of it.
pub(crate) trait VmTransport: Transport + Debug {
    /// What is in its slots.
    fn slots(&self) -> Vec<SlotReport>;

    /// The same for an inspection.
    fn status(&self) -> Vec<SlotStatus>;
}

impl VmTransport for ScsiTransport<QemuScsi> {
    fn slots(&self) -> Vec<SlotReport> {
        let entries = self.slot_map().into_iter();
        let slot = entries.map(|entry| {
            let device = QemuScsi::name(entry.address);
            slot(&entry.address, device, entry.usage, entry.disk)
        });
        slot.collect()
    }

    fn status(&self) -> Vec<SlotStatus> {
        let map = self.slot_map();
        let status = map
            .iter()
            .map(|entry| SlotStatus::of(blockmount_scsi::SCHEME, entry));
        status.collect()
    }
}

impl VmTransport for VpmemTransport<QemuVpmem> {
    fn slots(&self) -> Vec<SlotReport> {
        let entries = self.slot_map().into_iter();
        let slot = entries.map(|entry| {
            let device = QemuVpmem::name(entry.address.device);
            slot(&entry.address, device, entry.usage, entry.disk)
        });
        slot.collect()
    }

    fn status(&self) -> Vec<SlotStatus> {
        let map = self.slot_map();
        let status = map
            .iter()
            .map(|entry| SlotStatus::of(blockmount_vpmem::SCHEME, entry));
        status.collect()
    }
}

/// What there is to say about a slot of any transport.
fn slot(
    address: &impl ToString,
    device: String,
    state: impl Debug,
    disk: Option<Disk>,
) -> SlotReport {
    SlotReport {
        slot: address.to_string(),
        state: format!("{state:?}").to_lowercase(),
        device,
        read_only: disk.as_ref().is_some_and(Disk::is_read_only),
        direct_io: false,
        disk: disk.map_or(String::new(), |disk| disk.source().display().to_string()),
    }
}

/// How disks get into a virtual machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hardware {
    pub(crate) transports: Transports,
    /// Whether QEMU may open the files that an image names.
    pub(crate) allows_backing: bool,
    /// What its guest has to be able to do.
    pub(crate) needs: Needs,
}

impl Hardware {
    /// Starts the transports that are to be used, in the order in which disks are offered to them.
    pub(super) fn start(
        self,
        vm: &Vm,
        directory: &Path,
    ) -> Result<Vec<Arc<dyn VmTransport>>, Failure> {
        let is_used = |line: &&Line| match self.transports {
            Transports::Auto => true,
            Transports::Only(scheme) => [scheme, Transports::DEFAULT].contains(&line.scheme),
        };
        let used = LINES.iter().filter(is_used);
        used.map(|line| (line.start)(vm, directory, self)).collect()
    }
}

/// Which transports are to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transports {
    /// All, each disk on the first that takes it.
    Auto,
    /// This one, and the last for disks that it cannot be.
    Only(&'static str),
}

impl Default for Transports {
    fn default() -> Self {
        Transports::Only(Self::DEFAULT)
    }
}

impl Transports {
    /// The name of the default.
    pub(crate) const DEFAULT: &str = LINES[LINES.len() - 1].scheme;

    /// Reads a choice from the command line.
    pub(crate) fn parser() -> impl TypedValueParser<Value = Self> {
        let auto = PossibleValue::new("auto")
            .help("Read-only layers on VPMEM if they fit there, everything else on SCSI");
        let lines = LINES.iter().rev();
        let lines = lines.map(|line| PossibleValue::new(line.scheme).help(line.help));
        let names = PossibleValuesParser::new(std::iter::once(auto).chain(lines));
        names.map(|name| name.parse().expect("the names that are possible are known"))
    }

    /// The transport that all layers have to be on.
    pub(crate) fn required(self) -> Option<&'static str> {
        match self {
            Transports::Auto => None,
            Transports::Only(scheme) => Some(scheme),
        }
    }
}

impl FromStr for Transports {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let line = LINES.iter().find(|line| line.scheme == name);
        match line {
            Some(line) => Ok(Transports::Only(line.scheme)),
            None if name == "auto" => Ok(Transports::Auto),
            None => {
                let schemes = LINES.iter().map(|line| line.scheme);
                let known: Vec<&str> = std::iter::once("auto").chain(schemes).collect();
                Err(format!("a transport is one of {}", known.join(", ")))
            }
        }
    }
}

/// Gives a VM the hardware of all transports.
pub(super) fn hardware(vm: VmBuilder) -> VmBuilder {
    LINES.iter().fold(vm, |vm, line| (line.hardware)(vm))
}

/// What the agent is told of the hardware of all transports.
pub(super) fn agent_arguments() -> impl Iterator<Item = String> {
    LINES.iter().flat_map(|line| (line.agent_arguments)())
}

fn arguments(option: &str, values: impl Iterator<Item = String>) -> Vec<String> {
    values
        .flat_map(|value| [option.to_owned(), value])
        .collect()
}
