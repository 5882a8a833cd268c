//! A virtual machine: started, reached, and ended.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockmount::BackendError;
use serde_json::json;
use tempfile::TempDir;
use tokio::time::timeout;

use super::error::VmError;
use super::hardware::Hardware;
use super::port::{GuestStream, Ports};
use super::process::Process;
use crate::qmp::Qmp;
use crate::scsi::QemuScsi;
use crate::vpmem::QemuVpmem;

/// How long QEMU may take to end when it is asked to; then it is killed.
const ENDING: Duration = Duration::from_secs(5);

/// A running VM.
///
/// It ends when it is [shut down](Self::shut_down), when the last clone is dropped, and when the process that has started
/// it ends in whatever way. Its files, which are in one directory, are removed when it is shut down or
/// dropped; a directory of the caller's ([`VmBuilder::directory`](super::VmBuilder::directory)) is where to look after a kill.
///
/// Cloning is cheap; clones are the same VM.
#[derive(Clone)]
pub struct Vm(Arc<Inner>);

pub(super) struct Inner {
    pub(super) process: Process,
    pub(super) qmp: Qmp,
    pub(super) scsi: QemuScsi,
    pub(super) ports: Ports,
    pub(super) hardware: Hardware,
    pub(super) directory: PathBuf,
    /// Removes the directory when this is dropped.
    pub(super) _temporary: Option<TempDir>,
}

impl Vm {
    pub(super) fn of(inner: Inner) -> Self {
        Vm(Arc::new(inner))
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.0.qmp
    }

    /// A stream to the program in the guest that opens virtio-serial ports of this name.
    ///
    /// Each stream is a port of its own, which is plugged for it and unplugged when it is dropped.
    ///
    /// # Errors
    ///
    /// If no program opens the port within the deadline, or the VM is gone.
    ///
    /// # Cancel safety
    ///
    /// No port is left when the future is dropped.
    pub async fn connect(&self, name: &str, deadline: Duration) -> Result<GuestStream, VmError> {
        let connected = self.0.ports.connect(name, deadline).await;
        connected.map_err(|error| self.with_last_words(error))
    }

    /// Puts disks on its SCSI controllers. There must be one user of this for a VM, with all its clones.
    pub fn scsi(&self) -> QemuScsi {
        self.0.scsi.clone()
    }

    /// Plugs persistent memory into its ports, in devices of so many bytes each, a multiple of
    /// [`ALIGNMENT`](crate::vpmem::ALIGNMENT). Files that it needs are made in a directory, best on the filesystem of
    /// the images. There must be one user of this for a VM, with all its clones.
    ///
    /// # Errors
    ///
    /// `Invalid` if the VM has no ports for it, or the size is no multiple.
    pub fn vpmem(&self, device_size: u64, directory: &Path) -> Result<QemuVpmem, BackendError> {
        let ports = self.0.hardware.memory_port_ids();
        QemuVpmem::virtio(self.0.qmp.clone(), ports, device_size, directory)
    }

    /// Where its files are, for others that belong to it.
    pub fn directory(&self) -> &Path {
        &self.0.directory
    }

    /// The last 16 KiB that the guest has printed on its console, without control characters.
    pub fn console(&self) -> String {
        self.0.process.console.text()
    }

    /// Waits until the VM has ended, and says how. Cancel safe.
    pub async fn ended(&self) -> String {
        self.0.process.ended().await
    }

    /// Whether the VM runs still.
    pub fn is_running(&self) -> bool {
        self.0.process.is_running()
    }

    /// Kills the VM at once.
    pub fn kill(&self) {
        self.0.process.kill();
    }

    /// Ends the VM, and returns when its process is gone. What is not written to its disks by then is lost.
    /// Ending a VM that has ended is a success.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped the VM may live on; the last drop of a clone ends it.
    pub async fn shut_down(&self) {
        let polite = async {
            // There is no answer if it ends first.
            let _ = self.0.qmp.execute("quit", json!({})).await;
            self.ended().await
        };
        if timeout(ENDING, polite).await.is_err() {
            self.kill();
            self.ended().await;
        }
    }

    /// Adds what QEMU and the guest said last to an error, if the VM has ended.
    pub(super) fn with_last_words(&self, error: VmError) -> VmError {
        match self.is_running() {
            true => error,
            false => self.explain(error),
        }
    }

    /// Has a [detached](super::VmBuilder::detached) VM live on when this process ends. Until then dropping it ends it; after
    /// that, only [`shut_down`](Self::shut_down) and [`kill`](Self::kill) do.
    pub fn outlive(&self) {
        self.0.process.outlive();
    }

    pub(super) fn was_cut_off(&self) -> bool {
        self.0.process.was_cut_off()
    }

    pub(super) fn ports(&self) -> &Ports {
        &self.0.ports
    }

    pub(super) fn explain(&self, error: VmError) -> VmError {
        self.0.process.explain(error)
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("hardware", &self.0.hardware)
            .field("process", &self.0.process)
            .finish_non_exhaustive()
    }
}
