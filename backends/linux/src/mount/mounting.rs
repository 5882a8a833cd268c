//! Making a mount: built detached and then moved to its target, or in one step where the kernel is
//! old.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use blockmount::{
    BackendError, IdMap, MountFlag, MountFlags, MountOptions, Propagation, PropagationMode,
};
use rustix::io::Errno;
use rustix::mount::{
    self as sys_mount, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
};

use crate::device::free;
use crate::device::number::DeviceNumber;
use crate::errno::{errno_error, errno_of, is_call_missing};
use crate::kernel::Kernel;
use crate::mount::fscontext::Context;
use crate::mount::id_map;
use crate::mount::kernel_log::KernelLog;
use crate::mount::mount_id::MountId;
use crate::mount::mountinfo::MountInfo;
use crate::mount::owners::Giving;
use crate::mount::target::{MountPoint, Place, Target};
use crate::mount::unmount;
use crate::sys;
use crate::undo::ledger::UndoList;
use crate::undo::step::{Identity, Undo};

/// One page, less its NUL: all that `mount(2)` takes as options of a filesystem, in bytes.
pub(crate) const LONGEST_DATA: usize = 4095;

/// Of xfs: whether another filesystem has the same UUID does not matter.
const NO_UUID: &str = "nouuid";

/// A filesystem of a device, and how to mount it.
#[derive(Debug)]
pub(crate) struct Request {
    /// The filesystem by its kernel name.
    pub(crate) filesystem: String,
    /// The device's node.
    pub(crate) source: PathBuf,
    /// Whether writes are refused, by the mount and by the filesystem.
    pub(crate) read_only: bool,
    pub(crate) flags: MountFlags,
    /// Options of the filesystem, each `name` or `name=value`.
    pub(crate) data: Vec<String>,
    /// Whether nobody else may have the device mounted; we do not.
    pub(crate) exclusive: bool,
    /// The owners that files appear with.
    pub(crate) id_map: Option<IdMap>,
    /// The group that all files are given to.
    pub(crate) giving: Option<Giving>,
}

impl Request {
    pub(crate) fn new(filesystem: &str, source: &Path, options: &MountOptions) -> Self {
        // A filesystem that cannot be written is mounted read-only whatever was asked for, so that
        // a device that is read-only itself can be used with the default options.
        let read_only =
            options.is_read_only() || matches!(filesystem, "erofs" | "squashfs" | "iso9660");
        let mut data = options.data().to_vec();
        // The kernel mounts no two filesystems with one UUID, and clones of an image have one.
        if read_only && filesystem == "xfs" && !data.iter().any(|given| given == NO_UUID) {
            data.push(NO_UUID.to_owned());
        }
        let (filesystem, source) = (filesystem.to_owned(), source.to_owned());
        Request {
            filesystem,
            source,
            read_only,
            flags: options.flags(),
            data,
            exclusive: true,
            id_map: options.id_map().cloned(),
            giving: None,
        }
    }

    /// Builds the mount detached: nobody sees it, and it goes when the answer is dropped. `None` if
    /// this kernel cannot, or this process may not.
    pub(crate) fn build(
        &self,
        list: &UndoList<'_>,
        kernel: Kernel,
    ) -> Result<Option<OwnedFd>, BackendError> {
        or_without_call(self.build_in_context(list, kernel))
    }

    fn build_in_context(
        &self,
        list: &UndoList<'_>,
        kernel: Kernel,
    ) -> Result<Option<OwnedFd>, BackendError> {
        if self.id_map.is_some() && !kernel.set_attributes {
            return Ok(None);
        }
        let Some(context) = Context::open(&self.filesystem, &self.source, kernel)? else {
            return Ok(None);
        };
        context.flags(self.read_only, self.flags)?;
        for option in &self.data {
            context.option(option)?;
        }
        if !self.exclusive {
            context.create()?;
        } else if !context.create_exclusively(kernel)? {
            self.prove_exclusive()?;
            context.create()?;
        }
        let mount = context.mount(attributes(self.read_only, self.flags))?;
        if let Some(giving) = self.giving {
            giving.give(&mount, list)?;
        }
        if let Some(map) = &self.id_map {
            id_map::apply(&mount, map)?;
        }
        Ok(Some(mount))
    }

    /// What the kernel's table will say of it.
    pub(crate) fn expected(&self) -> Identity {
        let further = self.data.iter().filter(|_| self.filesystem == "btrfs");
        let further = further.filter_map(|option| option.strip_prefix("device="));
        Identity::Expected {
            filesystem: self.filesystem.clone(),
            source: self.source.as_path().into(),
            further_sources: further.map(|path| Path::new(path).into()).collect(),
            // The table spells the options of these filesystems differently.
            options: Vec::new(),
        }
    }

    /// The same in one step. (`mount(2)`)
    pub(crate) fn mount_at(&self, at: &MountPoint) -> Result<(), BackendError> {
        if self.id_map.is_some() {
            return Err(id_map::missing());
        }
        if self.exclusive {
            self.prove_exclusive()?;
        }
        let data = options_string(&self.data);
        if data.len() > LONGEST_DATA {
            return Err(BackendError::invalid(
                "the options of the filesystem are longer than 4,095 bytes",
            ));
        }
        let data = CString::new(data).map_err(|error| {
            BackendError::invalid("an option of the filesystem has a NUL byte").with_source(error)
        })?;
        let flags = flags(self.read_only, self.flags);
        let at = path_of(at.directory());
        let log = KernelLog::from_now();
        sys_mount::mount(
            &self.source,
            &at,
            self.filesystem.as_str(),
            flags,
            data.as_c_str(),
        )
        .map_err(|errno| {
            let said = log.said(&self.filesystem, &self.source);
            let what = format!(
                "cannot mount {} as {}{said}",
                self.source.display(),
                self.filesystem
            );
            let hint = match errno {
                Errno::INVAL if said.is_empty() => ": see the kernel's log for what it refused",
                _ => "",
            };
            errno_error(what + hint, errno)
        })
    }

    /// Where the kernel cannot say whether a filesystem is mounted already, nobody may hold the
    /// device.
    fn prove_exclusive(&self) -> Result<(), BackendError> {
        free::prove_free(&self.source).map(drop)
    }
}

/// Each flag with its bit of a mount (fsmount(2)) and its bit of mount(2). What belongs to the filesystem has
/// no bit of a mount: see `Context::flags`.
const KERNEL_BITS: [(MountFlag, MountAttrFlags, sys_mount::MountFlags); 10] = {
    use MountFlag::*;
    use sys_mount::MountFlags as Flags;
    type Attributes = MountAttrFlags;
    [
        (NoSuid, Attributes::MOUNT_ATTR_NOSUID, Flags::NOSUID),
        (NoDev, Attributes::MOUNT_ATTR_NODEV, Flags::NODEV),
        (NoExec, Attributes::MOUNT_ATTR_NOEXEC, Flags::NOEXEC),
        (NoAtime, Attributes::MOUNT_ATTR_NOATIME, Flags::NOATIME),
        (
            NoDirAtime,
            Attributes::MOUNT_ATTR_NODIRATIME,
            Flags::NODIRATIME,
        ),
        (
            StrictAtime,
            Attributes::MOUNT_ATTR_STRICTATIME,
            Flags::STRICTATIME,
        ),
        (
            NoSymFollow,
            Attributes::MOUNT_ATTR_NOSYMFOLLOW,
            Flags::NOSYMFOLLOW,
        ),
        (Sync, Attributes::empty(), Flags::SYNCHRONOUS),
        (DirSync, Attributes::empty(), Flags::DIRSYNC),
        (LazyTime, Attributes::empty(), Flags::LAZYTIME),
    ]
};

// A flag that the table lacks does not compile.
const _: () = {
    assert!(KERNEL_BITS.len() == MountFlag::all().len());
    let mut row = 0;
    while row < KERNEL_BITS.len() {
        assert!(KERNEL_BITS[row].0 as u8 == MountFlag::all()[row] as u8);
        row += 1;
    }
};

pub(crate) fn attributes(read_only: bool, flags: MountFlags) -> MountAttrFlags {
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
    for (_, bit, _) in KERNEL_BITS.iter().filter(|row| flags.contains(row.0)) {
        attributes |= *bit;
    }
    attributes
}

pub(crate) fn flags(read_only: bool, flags: MountFlags) -> sys_mount::MountFlags {
    let mut all = sys_mount::MountFlags::empty();
    all.set(sys_mount::MountFlags::RDONLY, read_only);
    for (_, _, bit) in KERNEL_BITS.iter().filter(|row| flags.contains(row.0)) {
        all |= *bit;
    }
    all
}

/// Options as `mount(2)` takes them. A comma in one is within quotes, which SELinux understands.
pub(crate) fn options_string(options: &[String]) -> String {
    let quoted = options.iter().map(|option| match option.split_once('=') {
        Some((name, value)) if value.contains(',') => format!("{name}=\"{value}\""),
        _ => option.clone(),
    });
    quoted.collect::<Vec<_>>().join(",")
}

/// `None` in place of the error of a call that this process may not make: the older way is tried.
pub(crate) fn or_without_call<T>(
    built: Result<Option<T>, BackendError>,
) -> Result<Option<T>, BackendError> {
    match built {
        Err(error) if errno_of(&error).is_some_and(is_call_missing) => Ok(None),
        built => built,
    }
}

/// A path for system calls that take no file descriptor. Valid while `fd` is open.
pub(crate) fn path_of(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// A mount that is nowhere yet, and goes when this is dropped before it is moved.
#[derive(Debug)]
pub(crate) struct Detached {
    mount: OwnedFd,
    id: MountId,
}

impl Detached {
    pub(crate) fn new(
        mount: OwnedFd,
        list: &UndoList<'_>,
        kernel: Kernel,
    ) -> Result<Self, BackendError> {
        let id = match MountId::of_detached(&mount, kernel) {
            // The rest of it is known when it is in its place. What is on record has to be complete before.
            Some(id) if !list.has_journal() => id,
            _ => MountId::of(&mount, kernel)?,
        };
        Ok(Detached { mount, id })
    }

    pub(crate) fn mount(&self) -> &OwnedFd {
        &self.mount
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::Known(self.id)
    }

    /// Refuses a mount of another device: its node was replaced since the device was found.
    pub(crate) fn ensure_is_of(
        &self,
        device: DeviceNumber,
        node: &Path,
    ) -> Result<(), BackendError> {
        // Some filesystems have a number of their own.
        let now = self
            .id
            .device()
            .map_or_else(|| DeviceNumber::at(node), Ok)?;
        device.ensure_is(now, node)
    }
}

/// Moves a detached mount into place, on the undo list before it is seen. False if this process may not, and after an error:
/// then nothing has happened. `Conflict` if somebody else has mounted something there since it was found to be free.
pub(crate) fn attach(
    detached: &Detached,
    at: Place<'_>,
    propagation: Option<Propagation>,
    kernel: Kernel,
    list: &UndoList<'_>,
    step: impl Fn(Identity) -> Undo,
) -> Result<bool, BackendError> {
    propagate_detached(&detached.mount, propagation, kernel)?;
    list.add(step(detached.identity()))?;
    place(detached, at, list, step)
}

/// The same for a mount that is on the list already, and spreads as it is to.
pub(crate) fn place(
    detached: &Detached,
    at: Place<'_>,
    list: &UndoList<'_>,
    step: impl Fn(Identity) -> Undo,
) -> Result<bool, BackendError> {
    let Detached {
        mount: detached,
        id,
    } = detached;
    let mut mount = *id;
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    flags.set(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH, at.name.is_none());
    let name = at.name.unwrap_or_default();
    let Err(errno) = sys_mount::move_mount(detached, "", at.directory, name, flags) else {
        // The kernel puts it on top of whatever has come there first.
        if mount.parent()? == Some(at.mount) {
            if !list.has_journal() {
                list.replace_last(step(Identity::Known(mount)));
            }
            return Ok(true);
        }
        take_away(&path_of(detached))?;
        list.retain(|step| !matches!(step, Undo::Unmount(_)));
        return Err(taken(list.target()));
    };
    list.retain(|step| !matches!(step, Undo::Unmount(_)));
    if is_call_missing(errno) {
        return Ok(false);
    }
    let target = list.target().path().display();
    Err(errno_error(
        format!("cannot move the mount to {target}"),
        errno,
    ))
}

/// Takes a mount away that covers one of others, and that nobody has asked for yet.
fn take_away(mount: &Path) -> Result<(), BackendError> {
    match sys_mount::unmount(mount, UnmountFlags::DETACH) {
        // It has gone with the mount that it covered.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno_error(
            "cannot take a mount away that covers another",
            errno,
        )),
    }
}

fn taken(target: &Target) -> BackendError {
    BackendError::conflict(format!(
        "cannot mount at {}: something is mounted there already",
        target.path().display()
    ))
}

/// Makes a mount in its place, with what the kernel's table will say of it on the undo list before. After an error
/// of `make` it is not there. `Conflict` if somebody else has mounted something there since it was found to be free.
pub(crate) fn in_one_step(
    at: MountPoint,
    kernel: Kernel,
    list: &UndoList<'_>,
    step: impl Fn(Identity) -> Undo,
    expected: Identity,
    make: impl FnOnce(&MountPoint) -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let below = at.mount_id()?;
    list.add(step(expected.clone()))?;
    make(&at).inspect_err(|_| list.retain(|step| !matches!(step, Undo::Unmount(_))))?;
    let at = at.into_path_at();
    loop {
        let top = at
            .open()
            .map_err(|errno| errno_error("cannot open the new mount", errno))?;
        let mut id = MountId::of(&top, kernel)?;
        let table = unmount::table()?;
        let is_first = |line: &MountInfo| line.parent == below && unmount::shows(line, &expected);
        match (id.parent()? == Some(below), table.iter().any(is_first)) {
            (true, true) => return list.amend(step(Identity::Known(id))),
            // Whoever has covered it takes that away.
            (false, true) => return Ok(()),
            (true, false) => {
                list.retain(|step| !matches!(step, Undo::Unmount(_)));
                return Err(taken(list.target()));
            }
            // Ours, or that of another who was late.
            (false, false) => take_away(&path_of(&top))?,
        }
    }
}

/// Sets the propagation of a mount that is still detached, as far as it would stay that way.
///
/// Whatever is moved below a shared mount becomes shared, and one that cannot be bound cannot be
/// moved there: the other modes are for [`propagate`].
pub(crate) fn propagate_detached(
    mount: &OwnedFd,
    propagation: Option<Propagation>,
    kernel: Kernel,
) -> Result<(), BackendError> {
    match propagation {
        Some(shared) if shared.mode == PropagationMode::Shared && kernel.set_attributes => {
            match sys::set_propagation(mount, shared) {
                Ok(()) => Ok(()),
                Err(errno) if is_call_missing(errno) => Ok(()),
                Err(errno) => Err(errno_error("cannot make the mount shared", errno)),
            }
        }
        _ => Ok(()),
    }
}

/// Sets the propagation of a mount in its place.
pub(crate) fn propagate(
    target: &Target,
    propagation: Propagation,
    kernel: Kernel,
) -> Result<(), BackendError> {
    let what = || format!("cannot make the mount {propagation}");
    let mount = target
        .find()?
        .ok_or_else(|| BackendError::other(format!("{} has vanished", target.path().display())))?;
    let mount = mount.directory();
    let done = if kernel.set_attributes {
        sys::set_propagation(mount, propagation)
    } else {
        Err(Errno::NOSYS)
    };
    if !done.is_err_and(is_call_missing) {
        return done.map_err(|errno| errno_error(what(), errno));
    }
    let mut flags = match propagation.mode {
        PropagationMode::Private => MountPropagationFlags::PRIVATE,
        PropagationMode::Shared => MountPropagationFlags::SHARED,
        PropagationMode::Slave => MountPropagationFlags::DOWNSTREAM,
        PropagationMode::Unbindable => MountPropagationFlags::UNBINDABLE,
    };
    flags.set(MountPropagationFlags::REC, propagation.recursive);
    sys_mount::mount_change(path_of(mount), flags).map_err(|errno| errno_error(what(), errno))
}

#[cfg(test)]
mod tests {
    use crate::mount::mountinfo;

    use super::*;

    #[test]
    fn u14_a_label_with_commas_is_quoted_for_mount() {
        let options = ["context=u:o:t:s0:c1,c2", "noacl", "commit=5"].map(str::to_owned);
        assert_eq!(
            options_string(&options),
            "context=\"u:o:t:s0:c1,c2\",noacl,commit=5"
        );
    }
    #[test]
    fn u04_any_device_of_a_btrfs_shows_its_mount() {
        let request = |filesystem| {
            let node = Path::new("/dev/loop3");
            let mut request = Request::new(filesystem, node, &MountOptions::default());
            request.data.push("device=/dev/loop4".to_owned());
            request.expected()
        };
        let shows = |source: &str, expected: &Identity| {
            let line = format!("40 1 0:60 / /mnt rw - btrfs {source} rw");
            unmount::shows(&mountinfo::parse(line.as_bytes())[0], expected)
        };
        let expected = request("btrfs");
        assert!(["/dev/loop3", "/dev/loop4"].map(|source| shows(source, &expected)) == [true; 2]);
        assert!(!shows("/dev/loop5", &expected));
        let Identity::Expected {
            further_sources, ..
        } = request("erofs")
        else {
            panic!("a mount that is not made has no numbers");
        };
        assert!(further_sources.is_empty());
    }
}
