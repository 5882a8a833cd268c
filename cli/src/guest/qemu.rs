//! A virtual machine of QEMU, and what its checker says.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockmount::Disk;
use blockmount_agent::{ARGUMENTS, PORT, PROGRAMS};
use blockmount_bridge::BridgeGuest;
use blockmount_checker::Checker;
use blockmount_checker::protocol::Tables;
use blockmount_checker::tree::Tree;
use blockmount_qemu::{
    AgentChannel, GuestImage, GuestKernel, GuestStream, QemuScsi, QemuVpmem, Vm,
};
use blockmount_scsi::ScsiTransport;
use blockmount_vpmem::{Mode, VpmemTransport};
use tokio::sync::Mutex;

use crate::failure::{Context, Failure};
use crate::guest::TransportKind;
use crate::report::SlotReport;

/// Where saved states of guests are kept between runs.
const STATES: &str = "/var/cache/blockmount/states";
/// Below these the agent of such a guest may mount.
const ROOTS: [&str; 3] = [MOUNTS, "/run/blockmount", "/mnt"];
/// Below this, mounts without a path of the caller's.
pub(crate) const MOUNTS: &str = "/run/mounts";
/// How many SCSI controllers it has.
const CONTROLLERS: u8 = 4;
/// How many devices of persistent memory it can have, on which layers are packed.
const MEMORY_PORTS: u8 = 2;
/// How large each of them is, in bytes. Each GiB costs the guest 16 MiB of its memory.
const MEMORY_SIZE: u64 = 2 << 30;
/// How long the checker may take to open its port.
const OPENING: Duration = Duration::from_secs(10);

/// A VM that was started for this run.
#[derive(Debug)]
pub(crate) struct QemuGuest {
    vm: Vm,
    scsi: Arc<ScsiTransport<QemuScsi>>,
    vpmem: Option<Arc<VpmemTransport<QemuVpmem>>>,
    agent: BridgeGuest<AgentChannel>,
    /// It answers one question after the other.
    checker: Mutex<Checker<GuestStream>>,
    /// What the guest's kernel had before anything was asked of it.
    before: Tables,
}

impl QemuGuest {
    /// Starts a VM with its files in a directory.
    pub(crate) async fn start(directory: &Path, kind: TransportKind) -> Result<Self, Failure> {
        let what = || "cannot start a virtual machine".to_owned();
        let advice = "tests/setup.sh of the source fetches a kernel for guests";
        let kernel = GuestKernel::find().context(what);
        let kernel = kernel.map_err(|failure| failure.advise(advice))?;
        let image = GuestImage::builder(kernel)
            .file(ARGUMENTS, agent_arguments())
            .file(format!("{PROGRAMS}/checker"), checker_program())
            .build();
        let vm = Vm::builder(image.await.context(what)?)
            .controllers(CONTROLLERS)
            .persistent_memory(MEMORY_PORTS, u64::from(MEMORY_PORTS) * MEMORY_SIZE)
            .directory(directory)
            .saved_states(STATES)
            .start();
        let vm = vm.await.context(what)?;
        let attacher = vm.scsi();
        let geometry = attacher.geometry();
        let scsi = ScsiTransport::new(attacher, geometry, &[]).context(what)?;
        let vpmem = match kind {
            TransportKind::Scsi => None,
            TransportKind::Auto | TransportKind::Vpmem => {
                let attacher = vm.vpmem(MEMORY_SIZE, directory).context(what)?;
                let geometry = attacher.geometry();
                let transport = VpmemTransport::new(attacher, geometry, Mode::Packed, &[]);
                Some(Arc::new(transport.context(what)?))
            }
        };
        let agent = vm.guest(PORT).await.context(what)?;
        let stream = vm
            .connect(blockmount_checker::PORT, OPENING)
            .await
            .context(what)?;
        let mut checker = Checker::new(stream);
        Ok(QemuGuest {
            before: checker.tables().await.map_err(Failure::of_io)?,
            scsi: Arc::new(scsi),
            vpmem,
            agent,
            checker: Mutex::new(checker),
            vm,
        })
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Its SCSI disks.
    pub(crate) fn scsi(&self) -> &Arc<ScsiTransport<QemuScsi>> {
        &self.scsi
    }

    /// Its persistent memory, if that is to be used.
    pub(crate) fn vpmem(&self) -> Option<&Arc<VpmemTransport<QemuVpmem>>> {
        self.vpmem.as_ref()
    }

    /// Its agent, which mounts, unplugs and combines layers.
    pub(crate) fn agent(&self) -> &BridgeGuest<AgentChannel> {
        &self.agent
    }

    pub(crate) fn checker(&self) -> &Mutex<Checker<GuestStream>> {
        &self.checker
    }

    /// What its kernel has.
    pub(super) async fn tables(&self) -> Result<Tables, Failure> {
        self.checker
            .lock()
            .await
            .tables()
            .await
            .map_err(Failure::of_io)
    }

    pub(super) async fn tree(&self, root: &Path) -> Result<Tree, Failure> {
        self.checker
            .lock()
            .await
            .tree(root)
            .await
            .map_err(Failure::of_io)
    }

    pub(super) async fn write(&self, path: &Path, text: &str) -> Result<(), Failure> {
        self.checker
            .lock()
            .await
            .write(path, text)
            .await
            .map_err(Failure::of_io)
    }

    pub(super) async fn remove(&self, path: &Path) -> Result<(), Failure> {
        self.checker
            .lock()
            .await
            .remove(path)
            .await
            .map_err(Failure::of_io)
    }

    pub(super) fn slots(&self) -> Vec<SlotReport> {
        let on_vpmem = self.vpmem.iter().flat_map(|vpmem| vpmem.slot_map());
        let on_vpmem = on_vpmem.map(|entry| SlotReport {
            slot: entry.address.to_string(),
            device: QemuVpmem::name(entry.address.device),
            ..slot(entry.usage, entry.disk)
        });
        let on_scsi = self.scsi.slot_map().into_iter().map(|entry| SlotReport {
            slot: entry.address.to_string(),
            device: QemuScsi::name(entry.address),
            ..slot(entry.usage, entry.disk)
        });
        on_vpmem.chain(on_scsi).collect()
    }

    /// What the guest's kernel and QEMU have that they had not at the start, one line each. Nothing is left of a
    /// VM that is gone.
    pub(crate) async fn left_over(&self) -> Result<Vec<String>, Failure> {
        if !self.vm.is_running() {
            return Ok(Vec::new());
        }
        let in_qemu = self.vm.scsi().left().await;
        let in_qemu = in_qemu.context(|| "cannot ask QEMU what it has".to_owned())?;
        let before = lines(&self.before);
        let mut left: Vec<String> = in_qemu
            .into_iter()
            .map(|what| format!("{what} in QEMU"))
            .collect();
        let on_vpmem = self.vpmem.iter().flat_map(|vpmem| vpmem.slot_map());
        left.extend(on_vpmem.map(|entry| format!("disk on VPMEM {}", entry.address)));
        let after = lines(&self.tables().await?);
        left.extend(
            after
                .difference(&before)
                .map(|what| format!("{what} in the guest")),
        );
        Ok(left)
    }

    /// Ends the VM.
    pub(crate) async fn end(&self) {
        self.vm.shut_down().await;
    }
}

/// What there is to say about a slot of any transport.
fn slot(state: impl std::fmt::Debug, disk: Option<Disk>) -> SlotReport {
    SlotReport {
        slot: String::new(),
        state: format!("{state:?}").to_lowercase(),
        device: String::new(),
        read_only: disk.as_ref().is_some_and(Disk::is_read_only),
        direct_io: false,
        disk: disk.map_or(String::new(), |disk| disk.source().display().to_string()),
    }
}

/// The checker, which this program is too, as the guest's init starts it.
fn checker_program() -> String {
    format!("/init\nchecker\n{}\n", ROOTS.join("\n"))
}

/// What the agent of the guest is told, one argument a line.
fn agent_arguments() -> String {
    let roots = ROOTS.map(|root| ["--root".to_owned(), root.to_owned()]);
    let mut arguments: Vec<String> = roots.into_iter().flatten().collect();
    for number in 0..CONTROLLERS {
        let address = blockmount_qemu::controller_address(number);
        arguments.extend(["--scsi-controller".to_owned(), format!("pci:{address}")]);
    }
    for number in 0..MEMORY_PORTS {
        let address = blockmount_qemu::memory_port_address(number);
        arguments.extend(["--vpmem".to_owned(), format!("port:{address}")]);
    }
    arguments.join("\n") + "\n"
}

/// What there is in a guest, one line each.
fn lines(tables: &Tables) -> BTreeSet<String> {
    let mounts = tables
        .mounts
        .iter()
        .map(|mount| format!("mount of {} at {}", mount.filesystem, mount.mount_point));
    // A packed device of persistent memory stays for as long as its VM; what was on it must not.
    let disks = tables.block_devices.iter();
    let disks = disks
        .filter(|disk| !disk.name.starts_with("pmem"))
        .map(|disk| format!("disk {}", disk.name));
    let scsi = tables
        .scsi_devices
        .iter()
        .map(|address| format!("SCSI device {address}"));
    let mapped = tables
        .dm_devices
        .iter()
        .map(|device| format!("mapped device {}", device.name));
    let directories = tables
        .directories
        .iter()
        .map(|directory| format!("directory {directory}"));
    mounts
        .chain(disks)
        .chain(scsi)
        .chain(mapped)
        .chain(directories)
        .collect()
}
