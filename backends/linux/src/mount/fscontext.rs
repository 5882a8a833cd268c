//! A filesystem that is being configured (`fsopen(2)` and what follows it), with the kernel's own
//! words where it refuses something.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use blockmount::{BackendError, MountFlag, MountFlags, printable};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_create_exclusive,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use crate::errno::{errno_error, is_call_missing};
use crate::kernel::Kernel;
use crate::mount::kernel_log::KernelLog;

/// The longest string that a context takes, in bytes (`strndup_user` in `fsconfig(2)`).
const LONGEST_STRING: usize = 255;
/// One message of the kernel; it cuts its own at less.
const LONGEST_MESSAGE: usize = 4096;

/// An open context. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Context {
    fd: OwnedFd,
    filesystem: String,
    source: PathBuf,
    log: KernelLog,
}

impl Context {
    /// Starts to configure a filesystem of a source: the device, or whatever is to be seen in the mount table. `None` if
    /// this kernel knows no contexts, or this process may not use them.
    pub(crate) fn open(
        filesystem: &str,
        source: &Path,
        kernel: Kernel,
    ) -> Result<Option<Self>, BackendError> {
        if !kernel.contexts {
            return Ok(None);
        }
        match fsopen(filesystem, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => {
                let context = Context {
                    fd,
                    filesystem: filesystem.to_owned(),
                    source: source.to_owned(),
                    log: KernelLog::from_now(),
                };
                context.name_source().map(|()| Some(context))
            }
            Err(errno) if is_call_missing(errno) => Ok(None),
            Err(Errno::NODEV) => {
                let message = format!("this kernel does not know the filesystem {filesystem}");
                Err(BackendError::unsuitable(message)
                    .with_source(std::io::Error::from(Errno::NODEV)))
            }
            Err(errno) => Err(errno_error(
                format!("cannot start to mount {filesystem}"),
                errno,
            )),
        }
    }

    fn name_source(&self) -> Result<(), BackendError> {
        let source = self.source.display();
        if self.source.as_os_str().len() > LONGEST_STRING {
            let message = format!("the name {source} is too long for a mount's source");
            return Err(BackendError::invalid(message));
        }
        fsconfig_set_string(&self.fd, "source", &self.source)
            .map_err(|errno| self.refused(&format!("source {source}"), errno))
    }

    /// Sets the flags that belong to the filesystem.
    pub(crate) fn flags(&self, read_only: bool, flags: MountFlags) -> Result<(), BackendError> {
        let of_superblock = flags
            .iter()
            .filter(|flag| flag.is_of_superblock())
            .map(MountFlag::name);
        for name in of_superblock.chain(read_only.then_some("ro")) {
            fsconfig_set_flag(&self.fd, name).map_err(|errno| self.refused(name, errno))?;
        }
        Ok(())
    }

    /// Sets an option of the filesystem, `name` or `name=value`.
    pub(crate) fn option(&self, option: &str) -> Result<(), BackendError> {
        let done = match option.split_once('=') {
            None => fsconfig_set_flag(&self.fd, option),
            Some((name, value)) => fsconfig_set_string(&self.fd, name, value),
        };
        done.map_err(|errno| self.refused(option, errno))
    }

    /// Sets an option to a string of its own, which need not be text.
    pub(crate) fn string(&self, name: &str, value: &Path) -> Result<(), BackendError> {
        fsconfig_set_string(&self.fd, name, value).map_err(|errno| self.refused(name, errno))
    }

    /// Sets an option to an open file; the plain error number says whether the kernel can.
    pub(crate) fn file(&self, name: &str, value: &OwnedFd) -> Result<(), Errno> {
        fsconfig_set_fd(&self.fd, name, value)
    }

    /// Makes the filesystem, or takes the one that the device has already.
    pub(crate) fn create(&self) -> Result<(), BackendError> {
        fsconfig_create(&self.fd).map_err(|errno| self.failed(errno))
    }

    /// Makes the filesystem, `Busy` if the device has one already. False if this kernel cannot
    /// tell; then nothing has happened.
    pub(crate) fn create_exclusively(&self, kernel: Kernel) -> Result<bool, BackendError> {
        if !kernel.exclusive {
            return Ok(false);
        }
        match fsconfig_create_exclusive(&self.fd) {
            Ok(()) => Ok(true),
            // The answer to a command that the kernel does not know.
            Err(Errno::OPNOTSUPP) => Ok(false),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    /// The detached mount.
    pub(crate) fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd, BackendError> {
        let done = fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes);
        done.map_err(|errno| {
            errno_error(
                format!("cannot mount {}{}", self.filesystem, self.said()),
                errno,
            )
        })
    }

    pub(crate) fn refused(&self, option: &str, errno: Errno) -> BackendError {
        errno_error(
            format!(
                "{} refuses the mount option {option:?}{}",
                self.filesystem,
                self.said()
            ),
            errno,
        )
    }

    fn failed(&self, errno: Errno) -> BackendError {
        errno_error(
            format!(
                "cannot mount a filesystem of type {}{}",
                self.filesystem,
                self.said()
            ),
            errno,
        )
    }

    /// What the kernel has to say, for the end of a message: in the context, or else in its log.
    fn said(&self) -> String {
        let mut said = String::new();
        let mut buffer = [0; LONGEST_MESSAGE];
        // The kernel keeps the last eight messages; each read takes one.
        for _ in 0..8 {
            let Ok(length) = rustix::io::read(&self.fd, &mut buffer[..]) else {
                break;
            };
            let line = String::from_utf8_lossy(&buffer[..length]);
            let line = line.trim_end();
            // Each starts with its level: e(rror), w(arning) or i(nfo), and a space.
            said.push_str(if said.is_empty() { ": " } else { "; " });
            said.push_str(&printable(line.get(2..).unwrap_or(line)).to_string());
        }
        match said.is_empty() {
            true => self.log.said(&self.filesystem, &self.source),
            false => said,
        }
    }
}

impl AsRawFd for Context {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
