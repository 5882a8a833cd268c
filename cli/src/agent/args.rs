//! What can be said to the agent.

use std::path::PathBuf;

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
    #[arg(long = "scsi-controller", value_name = "ADDRESS")]
    pub(crate) scsi_controllers: Vec<String>,

    /// Where VPMEM devices come from: nfit (Hyper-V, NVDIMMs of QEMU), or slots:N for virtio-pmem in
    /// hot-plug PCI slots from number N
    #[arg(long, value_name = "SOURCE", default_value = "nfit")]
    pub(crate) vpmem: String,

    /// What is mounted is noted here, so that an agent started after a killed one can undo it
    #[arg(long, value_name = "DIR", default_value = "/run/blockmount-agent")]
    pub(crate) journal: PathBuf,

    /// As pid 1, run the witness too (see blockmount witness --help)
    #[arg(long)]
    pub(crate) witness: bool,
}

/// Below these the hosts that we know of mount: Hyper-V's (the first three), and our own.
pub(crate) const ROOTS: [&str; 4] = ["/run/mounts", "/run/gcs", "/run/layers", "/run/blockmount"];
