//! The tags of encrypted blocks: the first of them, and those that do not fit their blocks any more.

use std::fs::File;
use std::io;
use std::path::Path;

use blockmount::BackendError;

use crate::device::mapper::DeviceMapper;
use crate::device::number::DeviceNumber;
use crate::device::{integrity, node};
use crate::discover::sysfs;
use crate::errno::errno_error;
use crate::filesystem::probe::make_blank;
use crate::mount::kernel_log;
use crate::undo::step::CryptStep;

/// How dm-crypt logs a block whose tag is not that of its content.
const TAMPERED: &str = "INTEGRITY AEAD ERROR";

/// Gives tags to the blocks that are read before a filesystem is made: those where its signature could be, and those of
/// others. The rest get theirs when they are written. To write all of them would take as long as filling the disk, and a
/// filesystem reads nothing that it has not written.
pub(super) fn write_first(device: DeviceNumber, disk: &Path) -> Result<(), BackendError> {
    // The kernel's log has only the name of the device when it finds a block that was changed.
    if let Some(name) = kernel_log::kernel_name(device) {
        let disk = disk.display();
        kernel_log::note(&format!("{} disk {disk}", began(&name)));
    }
    let write = || {
        let node = node::of(device).ok_or(io::ErrorKind::NotFound)?;
        let open = File::options().read(true).write(true).open(node)?;
        // What is written in part is read first.
        make_blank(&open, node::size(&open)?, integrity::BLOCK)
    };
    write().map_err(|error| {
        let disk = disk.display();
        errno_error(format!("cannot write the first tags of {disk}"), error)
    })
}

/// What the kernel's log has from us when a device begins.
fn began(name: &str) -> String {
    format!("blockmount: {name} encrypts and authenticates")
}

/// Whether the kernel has found a block of a device that was changed below it, of which its log says so by the name of the
/// device or of the one below. Blocks.
pub(super) fn are_wrong(device: DeviceNumber) -> bool {
    let Some(name) = kernel_log::kernel_name(device) else {
        return false;
    };
    let lines = kernel_log::since(&format!("{} ", began(&name)));
    let mut names = below(device).into_iter().chain([name]);
    names.any(|name| {
        let finding = format!(" {name}: {TAMPERED}");
        lines.iter().any(|line| line.contains(&finding))
    })
}

/// What a device is made of, by the kernel's names.
fn below(device: DeviceNumber) -> Vec<String> {
    sysfs::names(&device.sysfs().join("slaves")).unwrap_or_default()
}

/// Says which disk has blocks that were changed, if the kernel has found some.
pub(super) fn report_tampering(step: &CryptStep) {
    let device = DeviceMapper::open().and_then(|mapper| mapper.find_uuid(&step.names().uuid));
    if let Ok(Some(device)) = device
        && are_wrong(device)
    {
        let disk = below(step.backing).join(", ");
        tracing::error!(
            disk,
            "blocks of an encrypted disk are not what was written to them; whoever read them got an error"
        );
    }
}
