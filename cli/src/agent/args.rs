//! What can be said to the agent.

use std::path::PathBuf;

use blockmount::BackendError;
use blockmount_scsi::ControllerId;
use blockmount_vpmem::PmemId;
use clap::Args;

use super::endpoints::Endpoints;

#[derive(Debug, Args)]
#[command(after_help = "\
The agent does in a guest what its host asks for over the bridge: it finds the devices that the host \
has attached, mounts them, lays them over each other, and lets go of them. Without any of \
--virtio-port, --vsock, --vsock-listen, --unix and --serial it serves every virtio port named \
blockmount.agent. What is mounted when it ends stays mounted, and the next agent goes on with it.

As pid 1 (as /init of an initramfs) the program is this agent without being told: it mounts /proc, \
/sys, /dev, /run and /tmp, loads the modules whose paths are in /etc/blockmount/modules, one a line \
in the order of loading, and keeps an agent running whose arguments are in \
/etc/blockmount/agent.args, one a line, and in blockmount.arg=... on the kernel's command line.

Examples:
  blockmount agent                            in a guest of QEMU
  blockmount agent --scsi-controller pci:0000:00:10.0 --scsi-controller pci:0000:00:11.0
  blockmount agent --vsock                    in a guest of Hyper-V
  blockmount agent --unix /run/agent.sock --journal /run/agent --root /srv/layers

SIGTERM or Ctrl-C ends it.")]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    pub(crate) endpoints: Endpoints,

    /// Mount only below this directory; repeatable
    #[arg(long = "root", value_name = "DIR", default_values = ROOTS)]
    pub(crate) roots: Vec<PathBuf>,

    /// A SCSI controller, as pci:0000:00:10.0 or vmbus:GUID; repeatable, the first is controller 0
    ///
    /// On the VMBus of Hyper-V the default are the four controllers that it gives its guests, elsewhere none.
    #[arg(long = "scsi-controller", value_name = "ADDRESS", value_parser = parse_controller)]
    pub(crate) scsi_controllers: Vec<ControllerId>,

    /// VPMEM devices: nfit, or pci:0000:01:00.0 or port:0000:00:10.0 for one device; repeatable
    ///
    /// With nfit (the default) device N has the handle N + 1 in the firmware's table. A device by pci is at that
    /// address, one by port is behind the bridge at it. The first pci or port is device 0, the next one device 1.
    #[arg(long = "vpmem", value_name = "SOURCE", value_parser = parse_vpmem, default_value = "nfit")]
    pub(crate) vpmem: Vec<VpmemSource>,

    /// What is mounted is noted here, so that an agent started after a killed one can undo it
    #[arg(long, value_name = "DIR", default_value = "/run/blockmount-agent")]
    pub(crate) journal: PathBuf,

    /// As pid 1, run the witness too (see blockmount witness --help)
    #[arg(long)]
    pub(crate) witness: bool,
}

/// Below these the hosts that we know of mount: Hyper-V's (the first three), and our own.
pub(crate) const ROOTS: [&str; 4] = ["/run/mounts", "/run/gcs", "/run/layers", "/run/blockmount"];

/// How the guest knows its VPMEM devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VpmemSource {
    /// By their handles in the NFIT.
    Nfit,
    /// One device by its place on the PCI bus.
    Device(PmemId),
}

fn parse_controller(text: &str) -> Result<ControllerId, String> {
    let said = |error: BackendError| error.message().to_owned();
    match text.split_once(':') {
        Some(("pci", address)) => address.parse().map(ControllerId::Pci).map_err(said),
        Some(("vmbus", id)) => id.parse().map(ControllerId::Vmbus).map_err(said),
        _ => Err("a controller is pci:ADDRESS or vmbus:GUID".to_owned()),
    }
}

fn parse_vpmem(text: &str) -> Result<VpmemSource, String> {
    let said = |error: BackendError| error.message().to_owned();
    match text.split_once(':') {
        None if text == "nfit" => Ok(VpmemSource::Nfit),
        Some(("pci", address)) => address
            .parse()
            .map(PmemId::Pci)
            .map(VpmemSource::Device)
            .map_err(said),
        Some(("port", address)) => address
            .parse()
            .map(PmemId::Port)
            .map(VpmemSource::Device)
            .map_err(said),
        _ => Err("a source of devices is nfit, pci:ADDRESS or port:ADDRESS".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_and_devices_have_addresses_of_their_bus() {
        let pci = parse_controller("pci:0000:00:10.0").unwrap();
        assert_eq!(pci.to_string(), "controller at PCI address 0000:00:10.0");
        let first = "vmbus:{DF6D0690-79e5-55b6-a5ec-c1e2f77f580a}";
        assert_eq!(parse_controller(first), Ok(ControllerId::HYPER_V[0]));
        assert_eq!(parse_vpmem("nfit"), Ok(VpmemSource::Nfit));
        let [pci, port] = ["pci", "port"].map(|kind| parse_vpmem(&format!("{kind}:0000:01:00.0")));
        assert!(matches!(pci, Ok(VpmemSource::Device(PmemId::Pci(_)))));
        assert!(matches!(port, Ok(VpmemSource::Device(PmemId::Port(_)))));
        for text in [
            "",
            "pci",
            "pci:",
            "pci:10.0",
            "vmbus:0000:00:10.0",
            "nfit:1",
            "port:x",
            "0000:00:10.0",
        ] {
            assert!(parse_controller(text).is_err(), "{text:?}");
            assert!(parse_vpmem(text).is_err(), "{text:?}");
        }
    }
}
