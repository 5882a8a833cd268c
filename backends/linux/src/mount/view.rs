//! Views: a mount of ours, or a directory of it, at a further place, with flags and owners of its own.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;

use blockmount::{BackendError, BindMount, NewDirectory, PropagationMode, ViewOptions};
use rustix::fs::{FileType, Gid, Mode, StatVfsMountFlags, Uid, fchmod, fchown, fstat, fstatvfs};
use rustix::io::Errno;
use rustix::mount::{
    self as sys_mount, MountAttrFlags, MountFlags, MountPropagationFlags, OpenTreeFlags,
};

use crate::errno::errno_error;
use crate::kernel::Kernel;
use crate::mount::directory::Wanted;
use crate::mount::mounting::{self, Detached, path_of};
use crate::mount::target::{MountPoint, Target, mount_id, open_below};
use crate::mount::unmount::{Now, now};
use crate::mount::{directory, id_map, mountinfo};
use crate::sys;
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{Identity, MountStep, Undo, ViewUse};

/// Makes a view. Blocks. What was made of it until an error is on the undo list.
///
/// # Errors
///
/// `NotFound` if the source is no mount of ours, or has no such directory; `Unsuitable` for what this kernel or the
/// filesystem cannot do.
pub(crate) fn bind(
    list: &UndoList<'_>,
    bind: &BindMount,
    kernel: Kernel,
) -> Result<(), BackendError> {
    let source = Target::parse(&bind.source, &[])?;
    // Nobody unmounts it meanwhile.
    let _held = list.hold(Key::Source(source.key().to_owned()))?;
    let shown = open_source(list, &source, kernel)?;
    let directory = beneath(list, shown, &bind.options, source.path())?;
    let step = |mount| {
        Undo::Unmount(Box::new(MountStep {
            mount,
            device: None,
            scratch: None,
            view: Some(ViewUse::of(bind)),
        }))
    };
    let options = &bind.options;
    let detached = mounting::or_without_call(build(&directory, options, kernel))?;
    let at = directory::prepare(list)?;
    let moved = match detached {
        Some(mount) => {
            let mount = Detached::new(mount, list, kernel)?;
            mounting::attach(
                &mount,
                at.place()?,
                options.propagation(),
                kernel,
                list,
                step,
            )?
        }
        None => false,
    };
    if !moved {
        in_steps(list, at, &directory, options, kernel, step)?;
    }
    if let Some(propagation) = options.propagation() {
        mounting::propagate(list.target(), propagation, kernel)?;
    }
    if options.new_directory().is_some() {
        list.keep_made_inside();
        list.save_or_warn();
    }
    Ok(())
}

/// The root of the mount that a view is to show.
fn open_source(
    list: &UndoList<'_>,
    source: &Target,
    kernel: Kernel,
) -> Result<OwnedFd, BackendError> {
    let path = source.path().display();
    let absent =
        || BackendError::not_found(format!("cannot show {path}: this guest has not mounted it"));
    let step = list.mount_at(source).ok_or_else(absent)?;
    match now(source, &step.mount, kernel)? {
        Now::Ours(_, at) => at
            .open()
            .map_err(|errno| errno_error(format!("cannot open {path}"), errno)),
        _ => Err(absent()),
    }
}

/// The directory of a mount that is shown: through no link, and on no other mount. The last one is made, if it is missing and
/// the view may make it.
fn beneath(
    list: &UndoList<'_>,
    root: OwnedFd,
    options: &ViewOptions,
    source: &Path,
) -> Result<OwnedFd, BackendError> {
    let mount = mount_id(&root)?;
    let (mut at, mut path) = (root, source.to_owned());
    let last = source.join(options.subpath());
    for name in options.subpath() {
        path.push(name);
        if let Some(new) = options.new_directory().filter(|_| path == last) {
            make(list, &at, name, &path, new)?;
        }
        let refused = |why: &str| {
            let message = format!("cannot show {}: it is {why}", path.display());
            Err(BackendError::invalid(message))
        };
        let Some(below) = open_below(&at, name, &path)? else {
            let message = format!("cannot show {}: it is not there", path.display());
            return Err(BackendError::not_found(message));
        };
        let stat = fstat(&below)
            .map_err(|errno| errno_error(format!("cannot look at {}", path.display()), errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {}
            FileType::Symlink => return refused("a symbolic link"),
            _ => return refused("not a directory"),
        }
        if mount_id(&below)? != mount {
            return refused("on another mount");
        }
        at = below;
    }
    Ok(at)
}

/// Makes a directory of the mount where it is missing. Until there is the view it is on the undo list.
fn make(
    list: &UndoList<'_>,
    parent: &OwnedFd,
    name: &OsStr,
    path: &Path,
    new: NewDirectory,
) -> Result<(), BackendError> {
    if open_below(parent, name, path)?.is_some() {
        return Ok(());
    }
    let wanted = Wanted {
        parent,
        name,
        path,
        mode: Mode::RWXU,
        scratch: true,
    };
    if !directory::make(list, &wanted)? {
        return Ok(());
    }
    let refused = |errno| {
        let what = format!("cannot give {} its owner and mode", path.display());
        errno_error(what, errno)
    };
    let made = directory::readable(parent, name).map_err(refused)?;
    let owner = (Uid::from_raw(new.user), Gid::from_raw(new.group));
    fchown(&made, Some(owner.0), Some(owner.1)).map_err(refused)?;
    // After the owner, whose change takes set-id bits away.
    fchmod(&made, Mode::from_raw_mode(new.mode)).map_err(refused)
}

/// Builds the view detached; `None` if this kernel cannot, or this process may not.
fn build(
    directory: &OwnedFd,
    options: &ViewOptions,
    kernel: Kernel,
) -> Result<Option<OwnedFd>, BackendError> {
    if !kernel.contexts || !kernel.set_attributes {
        return Ok(None);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let trouble = |errno| errno_error("cannot make a view of the mount", errno);
    let view = sys_mount::open_tree(directory, "", flags).map_err(trouble)?;
    let attributes = mounting::attributes(options.is_read_only(), options.flags());
    // Times of access are one setting of several values.
    let atime = MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    let change = sys::AttributeChange {
        set: attributes.bits().into(),
        clear: match attributes.intersects(atime) {
            true => MountAttrFlags::MOUNT_ATTR__ATIME.bits().into(),
            false => 0,
        },
        propagation: (!is_peer(options)).then_some(PropagationMode::Private),
        user_namespace: None,
    };
    let refused = |errno| errno_error("cannot give the view its flags", errno);
    sys::set_attributes(&view, change).map_err(refused)?;
    if let Some(map) = options.id_map() {
        id_map::apply(&view, map)?;
    }
    Ok(Some(view))
}

/// Whether mounts spread between the view and its mount, as far as the mount lets them.
fn is_peer(options: &ViewOptions) -> bool {
    let mode = options.propagation().map(|propagation| propagation.mode);
    matches!(mode, Some(PropagationMode::Shared | PropagationMode::Slave))
}

/// The same in several steps: for a moment the view has fewer flags than it should. (`mount(2)`)
fn in_steps(
    list: &UndoList<'_>,
    at: MountPoint,
    directory: &OwnedFd,
    options: &ViewOptions,
    kernel: Kernel,
    step: impl Fn(Identity) -> Undo,
) -> Result<(), BackendError> {
    if options.id_map().is_some() {
        return Err(id_map::missing());
    }
    let expected = expected(directory)?;
    mounting::in_one_step(at, kernel, list, step, expected, |at| {
        let (from, to) = (path_of(directory), path_of(at.directory()));
        sys_mount::mount_bind(from, to)
            .map_err(|errno| errno_error("cannot make a view of the mount", errno))
    })?;
    let vanished = || BackendError::other("the view has vanished");
    let made = list.target().find()?.ok_or_else(vanished)?;
    let (view, path) = (made.directory(), path_of(made.directory()));
    let trouble = |errno| errno_error("cannot give the view its flags", errno);
    let flags = remounted(view, options).map_err(trouble)?;
    sys_mount::mount_remount(&path, flags, "").map_err(trouble)?;
    match is_peer(options) {
        true => Ok(()),
        false => sys_mount::mount_change(&path, MountPropagationFlags::PRIVATE)
            .map_err(|errno| errno_error("cannot make the view private", errno)),
    }
}

/// What the kernel's table will say of it.
fn expected(directory: &OwnedFd) -> Result<Identity, BackendError> {
    let trouble = |error| errno_error("cannot read the table of mounts", error);
    let (table, shown) = (mountinfo::read().map_err(trouble)?, mount_id(directory)?);
    let line = table.iter().find(|line| line.id == shown);
    let line = line.ok_or_else(|| BackendError::not_found("the mount has vanished"))?;
    Ok(Identity::Expected {
        filesystem: line.filesystem.clone(),
        source: Path::new(OsStr::new(&line.source)).into(),
        further_sources: Vec::new(),
        options: Vec::new(),
    })
}

/// The flags of a remount, which replaces all that there are.
fn remounted(view: &OwnedFd, options: &ViewOptions) -> Result<MountFlags, Errno> {
    let has = fstatvfs(view)?.f_flag;
    let kept = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let mut flags = MountFlags::BIND;
    for (_, flag) in kept.iter().filter(|(had, _)| has.contains(*had)) {
        flags |= *flag;
    }
    let wanted = mounting::flags(options.is_read_only(), options.flags());
    let atime = MountFlags::NOATIME | MountFlags::STRICTATIME;
    if wanted.intersects(atime) {
        flags.remove(atime | MountFlags::RELATIME);
    }
    Ok(flags | wanted)
}
