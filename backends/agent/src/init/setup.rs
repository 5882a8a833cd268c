//! What a process needs of its machine: the filesystems of the kernel, and a console.

use std::ffi::CStr;
use std::fs;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::log::say;

/// Where, which filesystem, how, and its options.
const MOUNTS: [(&str, &str, MountFlags, &CStr); 5] = [
    ("/proc", "proc", HARMLESS, c""),
    ("/sys", "sysfs", HARMLESS, c""),
    ("/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755"),
    (
        "/run",
        "tmpfs",
        // Block devices are exposed below it.
        MountFlags::NOSUID,
        c"mode=0755",
    ),
    (
        "/tmp",
        "tmpfs",
        HARMLESS.difference(MountFlags::NOEXEC),
        c"mode=1777",
    ),
];
const HARMLESS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Mounts what is not mounted yet. What cannot be mounted is said: the agent may do without.
pub(super) fn mount_all() {
    for (at, filesystem, flags, options) in MOUNTS {
        let made = match fs::create_dir(at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        let mounted = match mount(filesystem, at, filesystem, flags, options) {
            // The kernel itself may have mounted it.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(errno) => Err(io::Error::from(errno)),
        };
        if let Err(error) = made.and(mounted) {
            say(format_args!(
                "blockmount init: cannot mount {filesystem} at {at}: {error}"
            ));
        }
    }
}

/// Makes the console what this process and its children say things on. The protocol has places of its
/// own: nothing that is logged can get in its way.
pub(super) fn use_console() {
    let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
    // Without one there is nowhere to complain.
    if let Ok(console) = console {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// Turns the machine off.
pub(super) fn power_off() -> ! {
    rustix::fs::sync();
    if let Err(errno) = reboot(RebootCommand::PowerOff) {
        say(format_args!("blockmount init: cannot power off: {errno}"));
    }
    // Not in a machine of its own after all, or one that cannot be turned off.
    loop {
        std::thread::park();
    }
}
