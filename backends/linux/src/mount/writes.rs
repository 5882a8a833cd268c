//! Whether a filesystem lost writes while it was mounted.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use blockmount::BackendError;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs, openat, syncfs};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::Arg;

use crate::device::number::DeviceNumber;
use crate::mount::mount_id::MountId;
use crate::mount::target::PathAt;

/// The writes to a mounted filesystem. Keeps the filesystem alive, so it must be gone before its device is free.
///
/// The kernel reports an error of writing once to each descriptor that was open then, and to a later one only if
/// nothing else was told of it; the unmount of an overlay above is told. Hence the descriptor is opened with the mount.
#[derive(Debug)]
pub(crate) struct Writes {
    device: DeviceNumber,
    /// On a mount that only this process has: it does not keep the target busy. Nothing where the kernel has none.
    directory: Option<OwnedFd>,
    was_read_only: bool,
    /// The errors that ext4 had counted at the start; nothing for another filesystem.
    counted: Option<u64>,
    new_errors: u64,
    turned_read_only: bool,
    refused: Option<Errno>,
}

impl Writes {
    /// Those to a mount that has just been made, by its descriptor if it was built detached.
    pub(crate) fn to_new(mount: Option<&OwnedFd>, device: DeviceNumber) -> Self {
        let directory = mount.and_then(|mount| private(mount, "", OpenTreeFlags::AT_EMPTY_PATH));
        // The flag shows the state of the filesystem, because the mount itself is writable. A filesystem that can
        // only be read may be mounted as if it were writable.
        let flags = directory.as_ref().and_then(|open| fstatvfs(open).ok());
        let is_read_only = |flags: StatVfsMountFlags| flags.contains(StatVfsMountFlags::RDONLY);
        Writes {
            was_read_only: flags.is_some_and(|stat| is_read_only(stat.f_flag)),
            ..Writes::new(directory, device)
        }
    }

    /// Those from now on, to a mount that an earlier process made.
    pub(crate) fn to_old(at: &PathAt, device: DeviceNumber, has_private_mounts: bool) -> Self {
        let private = || private(CWD, at.path(), OpenTreeFlags::AT_SYMLINK_NOFOLLOW);
        Writes::new(has_private_mounts.then(private).flatten(), device)
    }

    fn new(directory: Option<OwnedFd>, device: DeviceNumber) -> Self {
        Writes {
            device,
            directory,
            was_read_only: false,
            counted: errors_of(device),
            new_errors: 0,
            turned_read_only: false,
            refused: None,
        }
    }

    /// Notes what can be seen only as long as the filesystem is mounted at its target. Blocks.
    pub(crate) fn look(&mut self, mount: MountId, at: &PathAt) {
        let line = mount.line().unwrap_or_default();
        self.turned_read_only |= !self.was_read_only && line.is_some_and(|line| line.is_stopped());
        if self.directory.is_none() {
            let written = at.open().and_then(root).and_then(syncfs);
            self.refused = self.refused.or(written.err());
        }
        self.count();
    }

    fn count(&mut self) {
        if let (Some(before), Some(now)) = (self.counted, errors_of(self.device)) {
            self.new_errors = self.new_errors.max(now.saturating_sub(before));
        }
    }

    /// Writes back what is cached, after nothing else can write any more, and ends the filesystem unless it is
    /// mounted elsewhere. Blocks.
    ///
    /// # Errors
    ///
    /// `LostWrites`, with all that is known of the cause.
    pub(crate) fn end(mut self, path: impl std::fmt::Display) -> Result<(), BackendError> {
        let written = self.directory.as_ref().map_or(Ok(()), syncfs);
        self.refused = self.refused.or(written.err());
        self.count();
        let mut causes = Vec::new();
        if self.refused.is_some() {
            causes.push("its device did not take all that was written".to_owned());
        }
        if self.turned_read_only {
            causes.push("its filesystem turned read-only after an error".to_owned());
        }
        if self.new_errors > 0 {
            causes.push(format!(
                "its filesystem counted new errors ({})",
                self.new_errors
            ));
        }
        if causes.is_empty() {
            return Ok(());
        }
        let message = format!(
            "{path} is unmounted, but writes were lost: {}",
            causes.join(", and ")
        );
        let lost = BackendError::lost_writes(message);
        Err(match self.refused {
            Some(errno) => lost.with_source(std::io::Error::from(errno)),
            None => lost,
        })
    }
}

/// The root of a mount, opened on a clone of it that is nowhere in the tree and goes with the descriptor.
fn private(mount: impl AsFd, path: impl Arg, flag: OpenTreeFlags) -> Option<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | flag;
    root(open_tree(mount, path, flags).ok()?).ok()
}

fn root(mount: impl AsFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(mount, ".", flags, Mode::empty())
}

/// How many errors ext4 has found in a filesystem, ever; it keeps the count on the device.
fn errors_of(device: DeviceNumber) -> Option<u64> {
    let disk = fs::canonicalize(device.sysfs()).ok()?;
    let filesystem = std::path::Path::new("/sys/fs/ext4").join(disk.file_name()?);
    let count = fs::read_to_string(filesystem.join("errors_count")).ok()?;
    count.trim().parse().ok()
}
