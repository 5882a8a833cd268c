//! Mounts whose files appear with other owners.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use blockmount::{BackendError, IdMap, IdRange};
use rustix::io::Errno;

use crate::errno::errno_error;
use crate::sys;

/// A map is written at once, and is shorter than a page: `map_write` of Linux, for pages of 4,096 bytes.
const LONGEST: usize = 4095;
/// All ids as they are.
const ALL: &str = "0 0 4294967295\n";

/// What a kernel without such maps is to be told of.
pub(crate) fn missing() -> BackendError {
    BackendError::unsuitable(
        "an id map needs mount_setattr, which Linux 5.12 has, a user namespace, and the permission to use both",
    )
}

/// Gives a mount that is still detached a map of owners. Blocks.
///
/// # Errors
///
/// `Unsuitable` if this kernel or the filesystem has no such maps.
pub(crate) fn apply(mount: &OwnedFd, map: &IdMap) -> Result<(), BackendError> {
    let namespace = user_namespace(map)?;
    let change = sys::AttributeChange {
        set: libc::MOUNT_ATTR_IDMAP,
        user_namespace: Some(namespace.as_fd()),
        ..sys::AttributeChange::default()
    };
    sys::set_attributes(mount, change).map_err(|errno| match errno {
        Errno::INVAL => BackendError::unsuitable(
            "this kernel cannot map the owners of files of this filesystem: ext4 and xfs have that since Linux 5.12, btrfs \
             since 5.15, erofs since 5.19, squashfs since 6.2; of an overlay, map its layers",
        )
        .with_source(std::io::Error::from(errno)),
        errno => errno_error("cannot map the owners of files", errno),
    })
}

/// A user namespace with these maps. It lives as long as it is open, or a mount has it.
fn user_namespace(map: &IdMap) -> Result<OwnedFd, BackendError> {
    let trouble = |error| errno_error("cannot make a user namespace for an id map", error);
    let process = sys::WaitingProcess::in_user_namespace().map_err(|errno| match errno {
        Errno::INVAL | Errno::NOSPC | Errno::NOSYS => BackendError::unsuitable(
            "this kernel makes no user namespaces, which an id map needs (see user.max_user_namespaces)",
        )
        .with_source(std::io::Error::from(errno)),
        errno => trouble(errno.into()),
    })?;
    let directory = format!("/proc/{}", process.id());
    for (file, ranges) in [("uid_map", map.users()), ("gid_map", map.groups())] {
        let text = lines(ranges);
        if text.len() > LONGEST {
            return Err(BackendError::invalid(
                "an id map is longer than a page of the kernel: use fewer ranges",
            ));
        }
        std::fs::write(format!("{directory}/{file}"), text).map_err(trouble)?;
    }
    let namespace = File::open(format!("{directory}/ns/user")).map_err(trouble)?;
    Ok(namespace.into())
}

/// In a namespace of a mount, what is inside is what the filesystem has.
fn lines(ranges: &[IdRange]) -> String {
    let line = |range: &IdRange| format!("{} {} {}\n", range.stored, range.shown, range.count);
    match ranges {
        [] => ALL.to_owned(),
        ranges => ranges.iter().map(line).collect(),
    }
}
