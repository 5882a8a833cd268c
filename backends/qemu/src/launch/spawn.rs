//! Starting a process that inherits descriptors, and ends with us or not.
#![allow(
    unsafe_code,
    reason = "what runs between fork and exec cannot be proven safe by the compiler"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, Resource, Signal, getppid, getrlimit, set_parent_process_death_signal, setrlimit, setsid,
};

/// Starts a process that has the descriptors, under their numbers here, and no others of ours. The kernel kills it when the
/// **thread** that calls this ends, unless it is `detached`: then it is also none of our terminal's. In either case a Ctrl-C
/// at our terminal is for us alone: a VM that heard it would end with its disks mounted.
pub(super) fn spawn(
    command: &mut Command,
    inherited: Vec<OwnedFd>,
    detached: bool,
) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    if !detached {
        command.process_group(0);
    }
    let prepare = move || {
        match detached {
            true => drop(setsid()?),
            false => end_with(parent)?,
        }
        close_on_exec()?;
        allow_many_files()?;
        for fd in &inherited {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, on descriptors and numbers that were there
    // before: no allocation, no lock, no environment.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// Marks all descriptors but the standard streams: other code of this process may have opened some without the mark, and a
/// process that outlives us would keep their files locked or in use.
fn close_on_exec() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: only marks of descriptors change. This calls the kernel (Linux 5.11) itself: not all C libraries have it.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match marked {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// QEMU keeps the images of all disks open, which may be more than the usual 1,024.
fn allow_many_files() -> io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

fn end_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(parent) {
        // It ended before the kernel knew what to do then.
        return Err(rustix::io::Errno::SRCH.into());
    }
    Ok(())
}
