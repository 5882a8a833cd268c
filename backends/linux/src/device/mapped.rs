//! Mapped devices of a stack: each is made once, for all targets that need the same.

use std::path::PathBuf;

use blockmount::BackendError;

use crate::device::mapper::{DeviceMapper, Names};
use crate::device::node;
use crate::device::number::DeviceNumber;
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::Undo;

/// Makes a device, or takes the one that another target has for an equal step, and names its node. Blocks.
///
/// # Errors
///
/// `Conflict` if there is a device of one of the names that is on no list; others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    names: &Names,
    step: Undo,
    make: impl FnOnce(&DeviceMapper, &Names) -> Result<DeviceNumber, BackendError>,
) -> Result<PathBuf, BackendError> {
    let _held = list.hold(Key::Mapped(names.name.clone()))?;
    let mapper = DeviceMapper::open()?;
    let is_made = mapper.find_uuid(&names.uuid)?;
    let number = match is_made.filter(|_| list.join(|other| *other == step).is_some()) {
        Some(number) => number,
        None => {
            if is_made.is_some() {
                let name = &names.name;
                let message = format!("cannot make mapped device {name}: there is one already");
                return Err(BackendError::conflict(message));
            }
            list.add(step)?;
            make(&mapper, names)?
        }
    };
    node::of(number)
        .ok_or_else(|| BackendError::not_found(format!("mapped block device {number} has no node")))
}

/// Removes a device by its UUID: one that others have given our name is not touched. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn remove(names: &Names) -> Result<(), BackendError> {
    let removed = DeviceMapper::open()?.remove_uuid(&names.uuid);
    removed.map(drop)
}

/// The node of a device. Blocks.
pub(crate) fn node(names: &Names) -> Option<PathBuf> {
    let number = DeviceMapper::open().ok()?.find_uuid(&names.uuid).ok()??;
    node::of(number)
}
