//! The further devices of a filesystem: whether they are the ones that it needs, and the options that name them.

use std::io::{Read, Seek};
use std::path::Path;

use blockmount::{BackendError, DeviceRole, ExtraDevice};

use crate::device::node::{self, ReadAt};
use crate::device::stack::Layer;
use crate::errno::errno_error;
use crate::filesystem::probe::{Content, ErofsDevice, ProbeResult, erofs_devices, probe};

/// A further device, open for as long as the mount is being made.
#[derive(Debug)]
pub(crate) struct Extra {
    layer: Layer,
    role: DeviceRole,
}

impl Extra {
    pub(crate) fn new(layer: Layer, role: DeviceRole) -> Self {
        Extra { layer, role }
    }
}

/// What the superblock says of the further devices.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    count: u32,
    uuid: Option<String>,
    erofs: Vec<ErofsDevice>,
}

/// Reads what a filesystem needs beside its own device. Blocks.
pub(crate) fn wanted(
    open: &mut (impl Read + Seek),
    node: &Path,
    found: &ProbeResult,
) -> Result<Wanted, BackendError> {
    let Content::Filesystem(superblock) = &found.content else {
        return Ok(Wanted::default());
    };
    let erofs = match superblock.name {
        "erofs" if superblock.more_devices > 0 => erofs_devices(open)
            .map_err(|error| errno_error(format!("cannot read {}", node.display()), error))?,
        _ => Vec::new(),
    };
    Ok(Wanted {
        count: superblock.more_devices,
        uuid: superblock.uuid.clone(),
        erofs,
    })
}

/// The option of a filesystem that names a device of a role; nothing if it has no such devices.
fn option(filesystem: &str, role: DeviceRole) -> Option<&'static str> {
    match (filesystem, role) {
        ("erofs" | "btrfs", DeviceRole::Data) => Some("device"),
        ("xfs", DeviceRole::Log) => Some("logdev"),
        ("xfs", DeviceRole::Realtime) => Some("rtdev"),
        ("ext3" | "ext4", DeviceRole::Log) => Some("journal_path"),
        _ => None,
    }
}

/// The options that name the further devices, which are checked first. Blocks.
///
/// # Errors
///
/// `Invalid` if the filesystem has no such devices, if there are too few or too many, or if one is not the device that the
/// filesystem wants in its place, with its number.
pub(crate) fn named(
    node: &Path,
    filesystem: &str,
    wanted: &Wanted,
    extra: &[Extra],
) -> Result<Vec<String>, BackendError> {
    if extra.is_empty() {
        return Ok(Vec::new());
    }
    let whose = format!("the {filesystem} filesystem on {}", node.display());
    let named = |device: &Extra| {
        let (at, role) = (device.layer.node.display(), device.role);
        let name = option(filesystem, role).ok_or_else(|| {
            let role = role.name();
            let message =
                format!("{whose} has no further device for {role}, and {at} is given as one");
            BackendError::invalid(message)
        })?;
        Ok(format!("{name}={at}"))
    };
    let options = extra.iter().map(named).collect::<Result<_, _>>()?;
    ensure_count(&whose, filesystem, wanted, extra.len())?;
    for (index, device) in extra.iter().enumerate() {
        if let Some(why) = unfit(filesystem, wanted, index, device)? {
            let (number, at) = (index + 1, device.layer.node.display());
            return Err(BackendError::invalid(format!(
                "further device {number}, {at}, is not the one that {whose} wants there: {why}"
            )));
        }
    }
    Ok(options)
}

fn ensure_count(
    whose: &str,
    filesystem: &str,
    wanted: &Wanted,
    given: usize,
) -> Result<(), BackendError> {
    let needs = match filesystem {
        // The kernel takes all devices of the table, or none.
        "erofs" => wanted.erofs.len(),
        "btrfs" | "xfs" | "ext3" | "ext4" => wanted.count as usize,
        // One that has no further devices says so by name.
        _ => return Ok(()),
    };
    let why = if given < needs {
        let first = given + 1;
        format!("needs {needs} further devices, and number {first} is not part of the request")
    } else if given > needs {
        format!("has {needs} further devices, and the request {given}")
    } else {
        return Ok(());
    };
    Err(BackendError::invalid(format!("{whose} {why}")))
}

/// Why a device is not the one that is wanted in its place, as far as it can be seen.
fn unfit(
    filesystem: &str,
    wanted: &Wanted,
    index: usize,
    device: &Extra,
) -> Result<Option<String>, BackendError> {
    let trouble = |error| {
        let at = device.layer.node.display();
        errno_error(format!("cannot read {at}"), error)
    };
    match (filesystem, wanted.erofs.get(index)) {
        ("erofs", Some(entry)) => {
            let size = node::size(&device.layer.open).map_err(trouble)?;
            if size < entry.bytes {
                let needs = entry.bytes;
                return Ok(Some(format!(
                    "it has {size} bytes, and should have {needs}"
                )));
            }
            let Some(uuid) = &entry.uuid else {
                return Ok(None);
            };
            let found = uuid_on(device, "erofs").map_err(trouble)?;
            let digits = found.as_ref().map(|found| found.replace('-', ""));
            Ok((digits.as_ref() != Some(uuid)).then(|| match found {
                Some(found) => format!("its UUID is {found}, and not {uuid}"),
                None => format!("it has no erofs with the UUID {uuid}"),
            }))
        }
        ("btrfs", _) => {
            let found = uuid_on(device, "btrfs").map_err(trouble)?;
            Ok((found != wanted.uuid).then(|| match found {
                Some(found) => format!("it belongs to the btrfs {found}"),
                None => "it has no btrfs".to_owned(),
            }))
        }
        _ => Ok(None),
    }
}

/// The UUID of the filesystem on a device, if it is of this kind.
fn uuid_on(device: &Extra, kind: &str) -> std::io::Result<Option<String>> {
    let mut open = ReadAt::new(&device.layer.open);
    Ok(match probe(&mut open)?.content {
        Content::Filesystem(found) if found.name == kind => found.uuid,
        _ => None,
    })
}

/// An error of finding a further device, with its number.
pub(crate) fn explained(error: BackendError, index: usize, device: &ExtraDevice) -> BackendError {
    let number = index + 1;
    let message = format!(
        "further device {number} ({}): {}",
        device.locator,
        error.message()
    );
    BackendError::new(error.kind(), message).with_source(error)
}
