//! The hardware of a VM, and where on its bus everything is, which the guest has to be told.

use blockmount::PciAddress;
use serde::{Deserialize, Serialize};

use super::kernel::GuestKernel;

/// How many SCSI controllers fit on the bus here.
pub const MAX_CONTROLLERS: u8 = 8;

/// How many ports for persistent memory fit on the bus here: eight functions in each of six slots.
pub const MAX_MEMORY_PORTS: u8 = 48;

/// Where the first SCSI controller is on the bus.
const FIRST_CONTROLLER: u8 = 0x08;
/// Where the first ports for persistent memory are.
const FIRST_MEMORY_SLOT: u8 = 0x10;
/// Where the ports to the guest's programs are.
const SERIAL: u8 = 0x04;

/// The address at which the guest finds the SCSI controller of a number, from 0 to [`MAX_CONTROLLERS`] - 1.
pub fn controller_address(number: u8) -> PciAddress {
    on_root_bus(FIRST_CONTROLLER + number % MAX_CONTROLLERS, 0)
}

/// The address of the PCI port behind which the guest finds the device of persistent memory of a number, from 0 to
/// [`MAX_MEMORY_PORTS`] - 1.
pub fn memory_port_address(number: u8) -> PciAddress {
    let number = number % MAX_MEMORY_PORTS;
    on_root_bus(FIRST_MEMORY_SLOT + number / 8, number % 8)
}

fn on_root_bus(device: u8, function: u8) -> PciAddress {
    PciAddress::new(0, 0, device, function).expect("all of them are below 32 and 8")
}

/// What a VM has besides a processor: memory, SCSI controllers, ports for persistent memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hardware {
    /// A machine of QEMU's of the kind q35.
    pub(super) machine: String,
    pub(super) memory: u32,
    pub(super) controllers: u8,
    pub(super) memory_ports: u8,
    /// The room for persistent memory, in MiB.
    pub(super) memory_room: u64,
    /// Further words of the command line.
    pub(super) more: Vec<String>,
}

impl Default for Hardware {
    fn default() -> Self {
        Hardware {
            machine: "q35".to_owned(),
            memory: 512,
            controllers: 4,
            memory_ports: 0,
            memory_room: 0,
            more: Vec::new(),
        }
    }
}

impl Hardware {
    /// What QEMU calls the SCSI controllers.
    pub(super) fn controller_ids(&self) -> impl Iterator<Item = String> {
        (0..self.controllers).map(|number| format!("scsi{number}"))
    }

    /// What QEMU calls the ports for persistent memory.
    pub(super) fn memory_port_ids(&self) -> impl Iterator<Item = String> {
        (0..self.memory_ports).map(|number| format!("pmem{number}"))
    }

    /// The words of QEMU's command line, without those about files and descriptors.
    pub(super) fn arguments(&self, accelerator: &str) -> Vec<String> {
        let mut words = Words::default();
        words.flags("-nodefaults -no-user-config -no-reboot -display none");
        words.pair(
            "-M",
            // What is off is hardware that the guest would look for and wait for.
            format!(
                "{},nvdimm=on,sata=off,smbus=off,usb=off,vmport=off",
                self.machine
            ),
        );
        words.pair("-accel", accelerator);
        words.pair("-cpu", if accelerator == "kvm" { "host" } else { "max" });
        words.pair("-smp", "1");
        let most = u64::from(self.memory) + self.memory_room;
        words.pair(
            "-m",
            match self.memory_ports {
                0 => format!("{}M", self.memory),
                slots => format!("{}M,slots={slots},maxmem={most}M", self.memory),
            },
        );
        words.pair(
            "-device",
            format!("virtio-serial-pci,id=serial,addr={SERIAL:#x}"),
        );
        for (number, id) in (0..).zip(self.controller_ids()) {
            let at = controller_address(number);
            // One queue: the guest has one processor.
            let device = format!("virtio-scsi-pci,id={id},num_queues=1");
            words.pair("-device", format!("{device},addr={:#x}", at.device()));
        }
        for (number, id) in (0..).zip(self.memory_port_ids()) {
            let at = memory_port_address(number);
            let (slot, function) = (at.device(), at.function());
            let device = format!("pcie-root-port,id={id},chassis={}", number + 1);
            let several = if function == 0 {
                ",multifunction=on"
            } else {
                ""
            };
            words.pair(
                "-device",
                format!("{device},slot={number},addr={slot:#x}.{function:#x}{several}"),
            );
        }
        words.0.extend_from_slice(&self.more);
        words.0
    }
}

/// The words of a command line in the making.
#[derive(Debug, Default)]
pub(super) struct Words(pub(super) Vec<String>);

impl Words {
    pub(super) fn flags(&mut self, flags: &str) {
        self.0.extend(flags.split(' ').map(str::to_owned));
    }

    pub(super) fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }
}

/// What the guest's kernel is told. Nothing here changes what it does, only how long it takes to get there under
/// emulation; but for `panic`, which ends a VM whose kernel has died.
pub(super) const KERNEL_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check nokaslr \
    mitigations=off random.trust_cpu=on cryptomgr.notests nowatchdog";

/// The words about the monitor and the console: the monitor is an inherited descriptor or a socket with a path, the console is
/// what QEMU prints.
pub(super) fn streams(monitor: &str) -> Vec<String> {
    let mut words = Words::default();
    words.pair("-chardev", format!("socket,id=monitor,{monitor}"));
    words.pair("-mon", "chardev=monitor,mode=control");
    words.pair("-chardev", "file,id=console,path=/dev/stdout");
    words.pair("-serial", "chardev:console");
    words.0
}

/// The words about a monitor that nobody reads or leaves: with the last client of all monitors QEMU closes the files that it
/// was passed, which say what an earlier process has attached (`monitor_fdsets_cleanup`).
pub(super) fn last_monitor() -> Vec<String> {
    let mut words = Words::default();
    words.pair("-chardev", "ringbuf,id=last,size=4096");
    words.pair("-mon", "chardev=last,mode=control");
    words.0
}

/// The words about what the guest boots.
pub(super) fn boot(kernel: &GuestKernel, initramfs: &str) -> Vec<String> {
    let mut words = Words::default();
    words.pair("-kernel", kernel.image().to_string_lossy());
    words.pair("-initrd", initramfs);
    words.pair("-append", KERNEL_LINE);
    words.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_adds_is_part_of_the_command_line() {
        let hardware = Hardware {
            machine: "pc-q35-7.1".to_owned(),
            more: vec!["-device".to_owned(), "virtio-rng-pci".to_owned()],
            ..Hardware::default()
        };
        let words = hardware.arguments("tcg");
        assert!(words.ends_with(&hardware.more), "{words:?}");
        assert!(
            words
                .iter()
                .any(|word| word.starts_with("pc-q35-7.1,nvdimm=on"))
        );
    }

    #[test]
    fn everything_has_a_place_of_its_own() {
        let controllers = (0..MAX_CONTROLLERS).map(controller_address);
        let places = controllers.chain((0..MAX_MEMORY_PORTS).map(memory_port_address));
        let mut places: Vec<(u8, u8)> = places.map(|at| (at.device(), at.function())).collect();
        places.push((SERIAL, 0));
        let distinct: std::collections::BTreeSet<_> = places.iter().collect();
        assert_eq!(distinct.len(), places.len());
        // Slot 0 is the bridge to the processor, and 31 that to the old bus.
        assert!(places.iter().all(|(slot, _)| (1..31).contains(slot)));
    }
}
