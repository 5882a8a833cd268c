//! Starting a process that ends with us and inherits descriptors.
#![allow(
    unsafe_code,
    reason = "what runs between fork and exec cannot be proven safe by the compiler"
)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Starts a process that has the descriptors, under their numbers here, and that the kernel kills when the
/// **thread** that calls this ends.
pub(super) fn spawn(command: &mut Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let prepare = move || prepare(parent, inherited.iter().map(AsFd::as_fd));
    // SAFETY: between fork and exec only system calls are made, on descriptors and numbers that were there
    // before: no allocation, no lock, no environment.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

fn prepare<'a>(parent: Pid, inherited: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(parent) {
        // It ended before the kernel knew what to do then.
        return Err(rustix::io::Errno::SRCH.into());
    }
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    Ok(())
}
