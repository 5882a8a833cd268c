//! The block device itself at a target: a node of its own, which is removed only as long as it is that node.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use blockmount::{BackendError, MountOptions};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, RenameFlags, Stat, StatVfsMountFlags, Uid, chmodat, chownat,
    fstatvfs, mknodat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::device::free;
use crate::device::number::DeviceNumber;
use crate::errno::errno_error;
use crate::mount::directory;
use crate::mount::target::{FileId, Target};
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{DeviceUse, NodeStep, Undo};

/// Who may use the node of a device.
#[derive(Debug, PartialEq, Eq)]
struct Access {
    mode: Mode,
    owner: Option<Uid>,
    group: Option<Gid>,
}

impl Access {
    /// By the options `mode` (octal), `uid` and `gid`; by default the owner, root, reads, and writes if the device may be
    /// written to.
    fn of(options: &MountOptions) -> Result<Self, BackendError> {
        let default = match options.is_read_only() {
            true => Mode::RUSR,
            false => Mode::RUSR | Mode::WUSR,
        };
        let mut access = Access {
            mode: default,
            owner: None,
            group: None,
        };
        for option in options.data() {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let refused = || {
                let message =
                    format!("the option {option:?} does not apply to a block device at a path");
                BackendError::invalid(message)
            };
            let id = || {
                value
                    .parse()
                    .ok()
                    .filter(|id| *id != u32::MAX)
                    .ok_or_else(refused)
            };
            match name {
                "mode" => {
                    let bits = u32::from_str_radix(value, 8).ok();
                    let bits = bits.filter(|bits| *bits <= 0o777).ok_or_else(refused)?;
                    access.mode = Mode::from_raw_mode(bits);
                }
                "uid" => access.owner = Some(Uid::from_raw(id()?)),
                "gid" => access.group = Some(Gid::from_raw(id()?)),
                _ => return Err(refused()),
            }
        }
        Ok(access)
    }
}

/// Refuses options that an exposed device cannot honour, before anything is touched.
///
/// # Errors
///
/// `Invalid` for an option that is not one of `mode`, `uid` and `gid`, `Unsuitable` for a flag of mounts.
pub(crate) fn validate(options: &MountOptions) -> Result<(), BackendError> {
    let flag = options
        .flags()
        .iter()
        .next()
        .map(|flag| flag.name().to_owned());
    let propagation = options
        .propagation()
        .map(|propagation| propagation.to_string());
    match flag.or(propagation) {
        Some(word) => Err(BackendError::unsuitable(format!(
            "the option {word} does not apply to a block device at a path"
        ))),
        None => Access::of(options).map(drop),
    }
}

/// Makes the node of a device at the target of a list. Blocks. What was made of it until an error is on the list.
///
/// # Errors
///
/// `Conflict` if there is something at the target, `Unsuitable` if nodes there cannot be used or a device that can be
/// written to is to be exposed read-only.
pub(crate) fn make(list: &UndoList<'_>, device: DeviceUse) -> Result<(), BackendError> {
    let path = list.target().path();
    let access = Access::of(&device.options)?;
    let number = device.number;
    let _held = list.hold(Key::Device(number))?;
    let others = list.mounts_of(number);
    if !others
        .iter()
        .all(|other| other.is_compatible_with(&device.options))
    {
        return Err(BackendError::conflict(format!(
            "block device {number} is used already with options that exclude these"
        )));
    }
    if device.options.is_read_only() && !number.is_read_only() {
        return Err(BackendError::unsuitable(format!(
            "block device {number} can be written to, which its node does not prevent: attach the disk read-only"
        )));
    }
    let node = Node {
        parent: directory::prepare_parent(list)?,
        path: path.to_owned(),
        device,
    };
    node.check_parent()?;
    node.make(list, &access)
}

struct Node {
    parent: OwnedFd,
    path: PathBuf,
    device: DeviceUse,
}

impl Node {
    fn trouble(&self, errno: Errno) -> BackendError {
        errno_error(
            format!("cannot make a device node at {}", self.path.display()),
            errno,
        )
    }

    fn check_parent(&self) -> Result<(), BackendError> {
        let stat = fstatvfs(&self.parent).map_err(|errno| self.trouble(errno))?;
        if stat.f_flag.contains(StatVfsMountFlags::NODEV) {
            return Err(BackendError::unsuitable(format!(
                "devices at {} cannot be opened: the filesystem there is mounted with nodev",
                self.path.display()
            )));
        }
        match self.find(self.name()) {
            Ok(_) => Err(self.taken()),
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.trouble(errno)),
        }
    }

    fn taken(&self) -> BackendError {
        let path = self.path.display();
        BackendError::conflict(format!(
            "cannot make a device node at {path}: something is there already"
        ))
    }

    fn name(&self) -> &OsStr {
        self.path.file_name().expect("a target has a name")
    }

    fn find(&self, name: &OsStr) -> rustix::io::Result<Stat> {
        statat(&self.parent, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn step(&self, staged: Option<&str>, id: Option<FileId>) -> Undo {
        Undo::RemoveNode(Box::new(NodeStep {
            path: self.path.as_path().into(),
            staged: staged.map(str::to_owned),
            id,
            device: self.device.clone(),
        }))
    }

    /// With a journal it is made under a name that nobody else uses, so that its identity is on record before it can be
    /// taken for somebody else's.
    fn make(&self, list: &UndoList<'_>, access: &Access) -> Result<(), BackendError> {
        let staged = list.staged_name();
        let name = staged.as_deref().map_or(self.name(), OsStr::new);
        list.add(self.step(staged.as_deref(), None))?;
        let made = self.make_as(name, access);
        let id = made.map_err(|errno| match errno {
            Errno::EXIST => {
                list.retain(|step| !matches!(step, Undo::RemoveNode(_)));
                self.taken()
            }
            errno => self.trouble(errno),
        })?;
        list.amend(self.step(staged.as_deref(), Some(id)))?;
        let Some(staged) = staged else { return Ok(()) };
        let (parent, name) = (&self.parent, self.name());
        match renameat_with(parent, &*staged, parent, name, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(self.taken()),
            Err(errno) => return Err(self.trouble(errno)),
        }
        list.amend(self.step(None, Some(id)))
    }

    fn make_as(&self, name: &OsStr, access: &Access) -> rustix::io::Result<FileId> {
        let DeviceNumber { major, minor } = self.device.number;
        let device = rustix::fs::makedev(major, minor);
        // Nobody else may use it before it has its owner.
        mknodat(
            &self.parent,
            name,
            FileType::BlockDevice,
            Mode::empty(),
            device,
        )?;
        if access.owner.is_some() || access.group.is_some() {
            let (parent, flags) = (&self.parent, AtFlags::SYMLINK_NOFOLLOW);
            chownat(parent, name, access.owner, access.group, flags)?;
        }
        // Unlike the mode of mknod(2), this one is not changed by the process's mask.
        chmodat(&self.parent, name, access.mode, AtFlags::empty())?;
        self.find(name).map(|stat| FileId::of(&stat))
    }
}

/// Whether the node of a step is there, under the name that it got in the end.
pub(crate) fn is_there(step: &NodeStep) -> bool {
    step.id.is_some() && find(step, step.path.0.file_name()).is_some()
}

/// The node of a step, if it is the one that was made: the directory that it is in, and its name.
fn find<'a>(step: &NodeStep, name: Option<&'a OsStr>) -> Option<(OwnedFd, &'a OsStr)> {
    let (name, parent) = (name?, step.path.0.parent()?);
    let parent = directory::find(parent)?;
    let stat = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
        && DeviceNumber::from_rdev(stat.st_rdev) == step.device.number;
    let is_it = is_device && step.id.is_none_or(|id| id == FileId::of(&stat));
    is_it.then_some((parent, name))
}

/// Removes the node of a device. Blocks.
///
/// # Errors
///
/// `Busy` if the device is in use, so that what is below it must stay; `LostWrites` if it is removed, and the device did not
/// take all that was written.
pub(crate) fn undo(step: &NodeStep) -> Result<(), BackendError> {
    // One that was not on record yet when its maker was killed has a name that nobody else uses, or none at all.
    let staged = step.staged.as_deref().map(OsStr::new);
    let name = match (step.id, staged) {
        (None, None) => return Ok(()),
        _ => find(step, staged).or_else(|| find(step, step.path.0.file_name())),
    };
    let Some((parent, name)) = name else {
        return Ok(());
    };
    // Nobody has found it under its first name.
    let flushed = match Some(name) == step.path.0.file_name() {
        true => settle(step)?,
        false => Ok(()),
    };
    unlinkat(&parent, name, AtFlags::empty()).map_err(|errno| {
        let path = step.path.0.display();
        errno_error(format!("cannot remove the device node {path}"), errno)
    })?;
    flushed
}

/// Proves that nobody uses the device, and writes back what is cached of it. A device that is gone has nothing.
fn settle(step: &NodeStep) -> Result<Result<(), BackendError>, BackendError> {
    let held = match free::prove_free(&step.path.0) {
        Err(error) if error.kind() == blockmount::ErrorKind::NotFound => return Ok(Ok(())),
        held => held?,
    };
    if step.device.options.is_read_only() {
        return Ok(Ok(()));
    }
    Ok(free::flush(&held).map_err(|error| {
        let path = step.path.0.display();
        let message =
            format!("{path} is removed, but its device did not take all that was written");
        BackendError::lost_writes(message).with_source(error)
    }))
}

/// Whether there is something at a target that is no directory, which no mount can be on.
pub(crate) fn is_taken(target: &Target) -> bool {
    let path = target.path();
    let parent = path.parent().and_then(directory::find);
    let (Some(parent), Some(name)) = (parent, path.file_name()) else {
        return false;
    };
    let stat = statat(&parent, Path::new(name), AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(options: &[&str]) -> Result<Access, BackendError> {
        let builder = MountOptions::builder().options(options.to_vec());
        Access::of(&builder.build().unwrap())
    }

    #[test]
    fn access_is_read_from_options() {
        let plain = access(&[]).unwrap();
        assert_eq!((plain.mode.bits(), plain.owner), (0o600, None));
        assert_eq!(access(&["ro"]).unwrap().mode.bits(), 0o400);
        let given = access(&["mode=0660", "uid=5", "gid=6"]).unwrap();
        assert_eq!(given.mode.bits(), 0o660);
        assert_eq!(given.owner.map(Uid::as_raw), Some(5));
        assert_eq!(given.group.map(Gid::as_raw), Some(6));
        for refused in [
            "mode=9",
            "mode=4755",
            "mode",
            "uid=-1",
            "uid=4294967295",
            "noacl",
        ] {
            access(&[refused]).unwrap_err();
        }
    }
}
