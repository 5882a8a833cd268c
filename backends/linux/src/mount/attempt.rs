//! One attempt to mount or expose a device that is open.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use blockmount::{BackendError, DeviceLocator, ErrorKind, MountOptions};

use crate::device::dax;
use crate::device::node::ReadAt;
use crate::device::number::DeviceNumber;
use crate::errno::errno_error;
use crate::filesystem::preflight::{
    choose_filesystem, ensure_block_size, explained, refuse_incomplete,
};
use crate::filesystem::probe::{Content, probe};
use crate::kernel::Kernel;
use crate::mount::extra_devices::{self, Extra};
use crate::mount::mounting::{self, Detached, Request};
use crate::mount::owners::Giving;
use crate::mount::target::MountPoint;
use crate::mount::writes::Writes;
use crate::mount::{directory, expose};
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{DeviceUse, Identity, MountStep, Undo};

/// One attempt to expose an opened device. Blocks. What was made of it until an error is on the undo list.
pub(crate) fn expose_once(
    list: &UndoList<'_>,
    locator: &DeviceLocator,
    device: &File,
    options: &MountOptions,
) -> Result<(), BackendError> {
    let used = DeviceUse {
        number: DeviceNumber::of(device)?,
        options: options.clone(),
        locator: Some(locator.clone()),
    };
    expose::make(list, used)
}

/// A device that is to be mounted, and the further ones of its filesystem.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found<'a> {
    pub(crate) locator: &'a DeviceLocator,
    pub(crate) node: &'a Path,
    pub(crate) open: &'a File,
    pub(crate) extra: &'a [Extra],
}

/// One attempt to mount an opened device. Blocks. What was made of it until an error is on the undo list. `within` is how long
/// its files may take to be given to a group.
pub(crate) fn mount_once(
    list: &UndoList<'_>,
    device: Found<'_>,
    options: &MountOptions,
    within: Duration,
    kernel: Kernel,
) -> Result<(), BackendError> {
    let Found {
        locator,
        node,
        open,
        extra,
    } = device;
    let number = DeviceNumber::of(open)?;
    let mut reader = ReadAt::new(open);
    reader.read_ahead();
    let found = probe(&mut reader)
        .map_err(|error| errno_error(format!("cannot read {}", node.display()), error))?;
    let made = options.format().map(|format| &*format.filesystem);
    let filesystem = choose_filesystem(node, &found, options.filesystem().or(made))?;
    let wanted = extra_devices::wanted(&mut reader, node, &found)?;
    let _held = list.hold(Key::Device(number))?;
    let others = list.mounts_of(number);
    if !others.iter().all(|other| other.is_compatible_with(options)) {
        return Err(BackendError::conflict(format!(
            "block device {number} is mounted already with options that exclude these"
        )));
    }
    if let Content::Filesystem(found) = &found.content {
        refuse_incomplete(node, found, options, others.is_empty())?;
    }
    let named = extra_devices::named(node, &filesystem, &wanted, extra)?;
    let mut request = Request::new(&filesystem, node, options);
    request.data.extend(named);
    request.exclusive = others.is_empty();
    request.giving = options.fs_group().map(|group| Giving { group, within });
    if request.giving.is_some() && request.read_only {
        return Err(BackendError::unsuitable(format!(
            "the files of a {filesystem} cannot be given to a group: it cannot be written to"
        )));
    }
    let device = DeviceUse {
        number,
        options: options.clone(),
        locator: Some(locator.clone()),
    };
    let step = |mount| {
        Undo::Unmount(Box::new(MountStep {
            mount,
            device: Some(device.clone()),
            scratch: None,
            view: None,
        }))
    };
    let is_dax = dax::is_asked(options);
    mount_request(list, &mut request, options, number, kernel, step)
        // The kernel's own words for this say little.
        .map_err(|error| ensure_block_size(node, open, &found).err().unwrap_or(error))
        .map_err(|error| match is_dax {
            true => dax::explained(error, node),
            false => error,
        })
        .map_err(|error| explained(error, node, &found, request.read_only))?;
    if let Some(propagation) = options.propagation() {
        mounting::propagate(list.target(), propagation, kernel)?;
    }
    match is_dax {
        true => dax::prove(list.target().path()),
        false => Ok(()),
    }
}

fn mount_request(
    list: &UndoList<'_>,
    request: &mut Request,
    options: &MountOptions,
    device: DeviceNumber,
    kernel: Kernel,
    step: impl Fn(Identity) -> Undo,
) -> Result<(), BackendError> {
    let detached = match request.build(list, kernel) {
        // Where the one driver for the whole family does not answer to the older names.
        Err(error)
            if error.kind() == ErrorKind::Unsuitable
                && matches!(&*request.filesystem, "ext2" | "ext3") =>
        {
            request.filesystem = "ext4".to_owned();
            request.build(list, kernel)?
        }
        built => built?,
    };
    let detached = detached.map(|mount| Detached::new(mount, list, kernel));
    let detached = detached.transpose()?;
    let propagation = options.propagation();
    let moved = match &detached {
        Some(mount) => {
            mount.ensure_is_of(device, &request.source)?;
            mounting::propagate_detached(mount.mount(), propagation, kernel)?;
            match directory::make_fresh(list, &step(mount.identity()))? {
                Some(fresh) => mounting::place(mount, fresh.place(), list, &step)?,
                None => {
                    let at = directory::prepare(list)?;
                    list.add(step(mount.identity()))?;
                    mounting::place(mount, at.place()?, list, &step)?
                }
            }
        }
        None => false,
    };
    let detached = detached.filter(|_| moved);
    if !moved {
        let at = directory::prepare(list)?;
        let expected = request.expected();
        let make = |at: &MountPoint| request.mount_at(at);
        mounting::in_one_step(at, kernel, list, step, expected, make)?;
        if let Some(giving) = request.giving {
            let vanished = || BackendError::other("the mount has vanished");
            let made = list.target().find()?.ok_or_else(vanished)?;
            giving.give(made.directory(), list)?;
        }
    }
    let is_writable = !options.is_read_only();
    list.keep_writes(
        is_writable.then(|| Writes::to_new(detached.as_ref().map(Detached::mount), device)),
    );
    Ok(())
}
