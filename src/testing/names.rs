//! The names of devices, disks and targets in the fake VM.

use std::path::{Component, Path, PathBuf};

use crate::{BackendError, DeviceLocator};

/// The transport of the devices of a fake VM.
pub(super) const SCHEME: &str = "fake";

/// A directory that is on no disk of a test.
pub(super) const MISSING: &str = "missing";

/// The longest path and the longest name in it, in bytes, as in Linux (`limits.h`); a path ends with a
/// NUL there.
const PATH_MAX: usize = 4096;
const NAME_MAX: usize = 255;

/// The slot that a locator names.
pub(super) fn address(device: &DeviceLocator) -> Result<u32, BackendError> {
    if device.transport() != SCHEME {
        let message = format!("{device} is not a device of the fake VM");
        return Err(BackendError::unsuitable(message));
    }
    let text = device.address();
    // `parse` alone would take "+7" and "007" for other names of "7".
    match text.parse::<u32>() {
        Ok(number) if number.to_string() == text => Ok(number),
        _ => Err(BackendError::invalid(format!(
            "{device} has no slot number"
        ))),
    }
}

/// Fails unless something can be mounted there.
pub(super) fn well_formed(target: &Path) -> Result<(), BackendError> {
    let strange = |part| matches!(part, Component::ParentDir | Component::Prefix(_));
    let ok = target.has_root()
        && target.file_name().is_some()
        && target.as_os_str().len() < PATH_MAX
        && target.iter().all(|name| name.len() <= NAME_MAX)
        && !target.components().any(strange)
        && !target.as_os_str().as_encoded_bytes().contains(&0);
    if ok {
        return Ok(());
    }
    let message = format!(
        "{:?} cannot be a mount target: it must be absolute, without '..', and not too long",
        target.display()
    );
    Err(BackendError::invalid(message))
}

/// A path without `.`, `..` and repeated separators; a relative one starts at the root.
pub(super) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::Normal(name) => plain.push(name),
            _ => {}
        }
    }
    plain
}
