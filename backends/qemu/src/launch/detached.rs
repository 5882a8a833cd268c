//! VMs that live on when the process ends that has started them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::error::VmError;
use super::hardware::Hardware;
use super::port::Ports;
use super::process::{Process, Started};
use super::vm::{Inner, Vm};
use crate::qmp::Qmp;
use crate::scsi::QemuScsi;
use tokio::net::UnixStream;

/// What is written beside a detached VM: which process it is, and what it has.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) process: Started,
    pub(super) hardware: Hardware,
}

/// The monitor, in the directory of a detached VM.
pub(super) fn monitor(directory: &Path) -> PathBuf {
    directory.join("qmp")
}

impl Record {
    fn path(directory: &Path) -> PathBuf {
        directory.join("vm.json")
    }

    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        fs::write(Self::path(directory), text)
    }

    fn read(directory: &Path) -> io::Result<Self> {
        let text = fs::read(Self::path(directory))?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }
}

impl Vm {
    /// Whether the [detached](super::VmBuilder::detached) VM with this directory runs. Blocks for a moment.
    pub fn is_alive_in(directory: &Path) -> bool {
        Record::read(directory).is_ok_and(|record| record.process.is_there())
    }

    /// Whether the [detached](super::VmBuilder::detached) VM with this directory has ended for certain: its record says which process
    /// it was, which is gone, and nobody is at its monitor, as there would be if it were out of sight in another container. False
    /// where that cannot be told. Blocks for a moment.
    pub fn has_ended_in(directory: &Path) -> bool {
        let Ok(record) = Record::read(directory) else {
            return false;
        };
        !record.process.is_there() && is_nobody_at(&monitor(directory))
    }

    /// Kills the detached VM with this directory, if it runs. Blocks for a moment.
    pub fn kill_in(directory: &Path) {
        if let Ok(record) = Record::read(directory)
            && let Ok(pidfd) = record.process.open()
        {
            // It may end by itself in this moment.
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
    }

    /// Reaches a [detached](super::VmBuilder::detached) VM again that another process has started, which has ended, by the
    /// directory of the VM. Streams of that process into the guest are taken out.
    ///
    /// # Errors
    ///
    /// If the VM has ended, or its monitor does not answer. It goes on as it is.
    ///
    /// # Cancel safety
    ///
    /// The VM goes on as it is.
    pub async fn reattach(directory: impl Into<PathBuf>) -> Result<Vm, VmError> {
        let directory = directory.into();
        let failed = |error: io::Error| {
            let at = directory.display();
            VmError::new(format!("there is no VM to reach again in {at}")).because(error)
        };
        let record = Record::read(&directory).map_err(failed)?;
        let process = Process::find(&record.process, &directory).map_err(failed)?;
        let stream = UnixStream::connect(monitor(&directory))
            .await
            .map_err(failed)?;
        let what = |error| VmError::new("the monitor of the VM does not answer").because(error);
        let qmp = Qmp::connect(stream).await.map_err(what)?;
        let ports = Ports::new(qmp.clone(), &directory);
        ports.remove_earlier().await?;
        let scsi = QemuScsi::new(qmp.clone(), record.hardware.controller_ids());
        let scsi = scsi.map_err(|error| VmError::new("cannot use its disks").because(error))?;
        Ok(Vm::of(Inner {
            scsi,
            process,
            ports,
            qmp,
            hardware: record.hardware,
            directory,
            _temporary: None,
        }))
    }
}

fn is_nobody_at(socket: &Path) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    let connected = std::os::unix::net::UnixStream::connect(socket);
    connected.is_err_and(|error| matches!(error.kind(), ConnectionRefused | NotFound))
}

impl Started {
    /// The process with this number, as it is now. `NotFound` if there is none, or it has ended and is only not waited for.
    pub(super) fn of(pid: Pid) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()))?;
        // The fields after the name, which may have spaces itself: the state is field 3, the start field 22
        // (proc_pid_stat(5)).
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        if matches!(fields.next(), Some("Z" | "X")) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let at = fields.nth(18).and_then(|field| field.parse().ok());
        let at = at.ok_or_else(|| io::Error::other("the start of a process cannot be read"))?;
        let pid = pid.as_raw_pid();
        Ok(Started { pid, at })
    }

    fn is_there(&self) -> bool {
        let now = Pid::from_raw(self.pid).map(Started::of);
        now.is_some_and(|now| now.is_ok_and(|now| now == *self))
    }

    /// A descriptor of exactly this process.
    pub(super) fn open(&self) -> io::Result<std::os::fd::OwnedFd> {
        let ended = || io::Error::from(io::ErrorKind::NotFound);
        let pid = Pid::from_raw(self.pid).ok_or_else(ended)?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        // The number may have been another process's before it was opened.
        match self.is_there() {
            true => Ok(pidfd),
            false => Err(ended()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[tokio::test]
    async fn u06_a_process_that_has_ended_and_is_not_waited_for_is_dead() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Started::of(Pid::from_child(&child)).unwrap();
        let record = Record {
            process,
            hardware: Hardware::default(),
        };
        record.write(directory.path()).unwrap();
        assert!(Vm::is_alive_in(directory.path()));
        assert!(!Vm::has_ended_in(directory.path()));
        let pidfd = record.process.open().unwrap();
        drop(child.stdin.take());
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();

        assert!(!Vm::is_alive_in(directory.path()));
        assert!(record.process.open().is_err());
        assert!(Vm::has_ended_in(directory.path()));
        // Somebody answers there whose process is not seen.
        let listener = UnixListener::bind(monitor(directory.path())).unwrap();
        assert!(!Vm::has_ended_in(directory.path()));
        drop(listener);
        // A child that a test beside this one starts has a copy of the socket until it is a program of its own.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !Vm::has_ended_in(directory.path()) {
            assert!(Instant::now() < deadline, "nobody is there");
            std::thread::yield_now();
        }
        let error = Vm::reattach(directory.path()).await.unwrap_err();
        assert!(
            error.to_string().contains("no VM to reach again"),
            "{error}"
        );
        child.wait().unwrap();
        std::fs::write(Record::path(directory.path()), "{").unwrap();
        assert!(!Vm::has_ended_in(directory.path()));
    }
}
