//! Growing a loop device together with the image that it is bound to.

use blockmount::{BackendError, Disk};
use blockmount_source as source;

use crate::device::{self, Binding};
use crate::ioctl;

/// Grows the image of a disk, and has its device take the new size. Blocks.
///
/// # Errors
///
/// `Invalid` if the disk is read-only or larger, or the size is not one of whole sectors; `Unsuitable` for a block device;
/// `Conflict` if the image was replaced since.
pub(crate) fn grow(
    disk: &Disk,
    number: u32,
    binding: &Binding,
    bytes: u64,
) -> Result<(), BackendError> {
    source::ensure_can_grow(disk, bytes)?;
    let open = source::open(disk, &source::identify(disk)?)?;
    if open.is_device() {
        let message = format!("disk {disk} is a block device, which does not grow from here");
        return Err(BackendError::unsuitable(message));
    }
    if open.inode != binding.inode {
        let message = format!("the image of disk {disk} was replaced since it was attached");
        return Err(BackendError::conflict(message));
    }
    let size = source::size(disk, &open)?;
    source::ensure_larger(disk, size, bytes)?;
    if size < bytes {
        open.file.set_len(bytes).map_err(|error| {
            BackendError::other(format!("cannot grow the image of disk {disk}")).with_source(error)
        })?;
    }
    let failed = |error| device::failed("grow", number, error);
    match device::find(number, binding).map_err(failed)? {
        // Also if it was grown by an earlier call, which may not have come to this.
        Some(device) => ioctl::set_capacity(device.file()).map_err(failed),
        None => Err(BackendError::not_found(format!(
            "the loop device of disk {disk} is gone"
        ))),
    }
}
