//! Starting QEMU once, and waiting until its guest is up.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::builder::VmBuilder;
use super::detached::{self, Record};
use super::error::VmError;
use super::hardware;
use super::port::Ports;
use super::process::Process;
use super::vm::{Inner, Vm};
use crate::qmp::NONE;
use crate::qmp::Qmp;
use crate::scsi::QemuScsi;

/// How long a QEMU whose monitor has ended may take to end as well, and say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the guest boots, in the directory of its VM.
const INITRAMFS: &str = "initramfs";

/// Where the state of a VM comes from that does not boot.
pub(super) enum Incoming {
    Saved(File),
    /// The monitor will be told.
    Later,
}

impl VmBuilder {
    /// Starts QEMU, from a state if there is one, and waits until the guest's program opens a port.
    pub(super) async fn launch(
        &self,
        accelerator: &str,
        state: Option<File>,
        timeout: Duration,
    ) -> Result<Vm, VmError> {
        let vm = self.run(accelerator, state.map(Incoming::Saved)).await?;
        self.wait_until_up(vm, timeout).await
    }

    /// Waits until the guest's program opens a port; ends a VM whose guest does not come up.
    pub(super) async fn wait_until_up(&self, vm: Vm, timeout: Duration) -> Result<Vm, VmError> {
        // Nobody else stops it before it is up.
        let mut stops = vm.qmp().events("STOP");
        let stopped = async {
            while stops.next(timeout).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let up = tokio::select! {
            up = self.come_up(&vm, timeout) => up,
            how = vm.ended() => Err(VmError::new(format!("QEMU has ended: {how}"))),
            () = stopped => Err(VmError::new("the processor has stopped on an error")),
        };
        // A guest that is up has read all of it, and one from a state never does.
        let _ = tokio::fs::remove_file(vm.directory().join(INITRAMFS)).await;
        if let Err(error) = up {
            let cut_off = vm.was_cut_off();
            vm.kill();
            vm.ended().await;
            let error = VmError::new("the guest does not come up").because(error);
            return Err(vm.explain(error).cut_off(cut_off));
        }
        Ok(vm)
    }

    fn make_directory(&self) -> io::Result<TempDir> {
        let mut directory = tempfile::Builder::new();
        directory.prefix("vm-");
        match &self.directory {
            Some(parent) => directory.tempdir_in(parent),
            None => directory.tempdir(),
        }
    }

    /// Starts the process, and connects to its monitor.
    pub(super) async fn run(
        &self,
        accelerator: &str,
        incoming: Option<Incoming>,
    ) -> Result<Vm, VmError> {
        let directory = self.make_directory().map_err(cannot)?;
        let initramfs = directory.path().join(INITRAMFS);
        let written = tokio::fs::write(&initramfs, self.image.initramfs()).await;
        written.map_err(cannot)?;
        let mut words = self.hardware.arguments(accelerator);
        let mut inherited = Vec::new();
        let ours = match self.detached {
            true => {
                let socket = detached::monitor(directory.path());
                words.extend(hardware::streams(&format!(
                    "path={},server=on,wait=off",
                    socket.display()
                )));
                words.extend(hardware::last_monitor());
                None
            }
            false => {
                let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
                words.extend(hardware::streams(&format!("fd={}", theirs.as_raw_fd())));
                inherited.push(OwnedFd::from(theirs));
                Some(ours)
            }
        };
        let initramfs = initramfs.to_string_lossy();
        words.extend(hardware::boot(self.image.kernel(), &initramfs));
        match incoming {
            None => {}
            Some(Incoming::Later) => words.extend(["-incoming".to_owned(), "defer".to_owned()]),
            Some(Incoming::Saved(state)) => {
                words.extend(["-incoming".to_owned(), format!("fd:{}", state.as_raw_fd())]);
                inherited.push(state.into());
            }
        }
        let mut command = Command::new(&self.qemu);
        command.args(words);
        let at = self.detached.then(|| directory.path());
        let started = Process::start(command, inherited, at).await;
        let process = started.map_err(|error| self.no_qemu(error))?;
        let monitor = match ours {
            Some(ours) => {
                ours.set_nonblocking(true).map_err(cannot)?;
                UnixStream::from_std(ours).map_err(cannot)?
            }
            None => {
                let record = Record {
                    process: process.started().map_err(cannot)?,
                    hardware: self.hardware.clone(),
                };
                record.write(directory.path()).map_err(cannot)?;
                let socket = detached::monitor(directory.path());
                match connect(&socket, &process).await {
                    Ok(monitor) => monitor,
                    Err(error) => return Err(process.explain(cannot(error))),
                }
            }
        };
        let qmp = match Qmp::connect(monitor).await {
            Ok(qmp) => qmp,
            // That the monitor has ended says less than why QEMU has.
            Err(error) => {
                let _ = timeout(LAST_WORDS, process.read_out()).await;
                let cut_off = process.was_cut_off();
                return Err(process.explain(cannot(error)).cut_off(cut_off));
            }
        };
        let scsi = QemuScsi::new(qmp.clone(), self.hardware.controller_ids());
        Ok(Vm::of(Inner {
            scsi: scsi.map_err(cannot)?,
            process,
            ports: Ports::new(qmp.clone(), directory.path()),
            qmp,
            hardware: self.hardware.clone(),
            directory: directory.path().to_owned(),
            _temporary: match self.detached {
                true => {
                    // Whoever reaches the VM again needs it; its owner removes it.
                    let _ = directory.keep();
                    None
                }
                false => Some(directory),
            },
        }))
    }

    /// Waits until the guest's program opens a port.
    async fn come_up(&self, vm: &Vm, timeout: Duration) -> Result<(), VmError> {
        let what = |error| VmError::new("cannot tell whether the VM runs").because(error);
        let mut resumed = vm.qmp().events("RESUME");
        let status = vm.qmp().execute("query-status", NONE).await;
        // What is plugged while a state is being read would not be part of it, and QEMU would refuse the state.
        if status.map_err(what)?["running"] != true {
            resumed.next(timeout).await.map_err(what)?;
        }
        vm.connect(&self.agent, timeout).await.map(drop)
    }
}

/// Connects to the monitor that QEMU makes at its start.
async fn connect(socket: &Path, process: &Process) -> io::Result<UnixStream> {
    /// As long as a busy machine needs to load QEMU.
    const APPEARING: Duration = Duration::from_secs(60);
    let connecting = async {
        loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => return stream,
                // There is no event for a socket.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::select! {
        connected = timeout(APPEARING, connecting) => Ok(connected?),
        () = process.read_out() => Err(io::Error::other("QEMU has ended")),
    }
}

fn cannot(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
    VmError::new("cannot start a VM").because(error)
}
