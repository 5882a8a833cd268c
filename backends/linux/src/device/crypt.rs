//! Devices that are encrypted with a key of their own (dm-crypt), which nobody knows and which ends with the device.
//!
//! The key is made here and given to the kernel's keyring, from where dm-crypt takes it, and which forgets it with the device.
//! No program can read it. It is in no request, table or message: they have only the name under which the keyring has it.

use std::fs::File;
use std::path::{Path, PathBuf};

use blockmount::{BackendError, Encryption};
use rustix::io::Errno;

use crate::device::mapper::{Access, DeviceMapper, Names, SECTOR, Target};
use crate::device::number::DeviceNumber;
use crate::device::partition::sequence;
use crate::device::{key, mapped, node};
use crate::errno::{errno_error, errno_of};
use crate::filesystem::probe::{Content, probe};
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{CryptStep, Undo};

const KIND: &str = "crypt";
/// AES-256 in the mode XTS, which has two keys, by the number of the sector.
const CIPHER: &str = "aes-xts-plain64";
/// What is encrypted at once, in bytes, where the size of the device allows it: the cipher starts anew less often.
const LARGE_SECTOR: u64 = 4096;

impl CryptStep {
    /// From the number of the device alone: at most 38 bytes with a mark.
    pub(crate) fn names(&self) -> Names {
        let DeviceNumber { major, minor } = self.backing;
        Names::new(&format!("crypt-{major}.{minor}"))
    }
}

/// Makes a device that encrypts another with a new key, and names its node. What was on the other is lost then: it has to be
/// blank, or the noise of an earlier key, unless anything `may_destroy`. Blocks.
///
/// # Errors
///
/// `Conflict` if there is something on the device that is known; `Unsuitable` if this kernel has no dm-crypt, no such cipher or no keyring, or the encryption is another one; `Conflict`
/// also if somebody else has made a device of the name, or the device cannot be written to; `Busy` and others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    below: &Path,
    encryption: Encryption,
    may_destroy: bool,
) -> Result<PathBuf, BackendError> {
    let Encryption::Ephemeral = encryption else {
        let message = format!("this guest does not know the encryption {encryption:?}");
        return Err(BackendError::unsuitable(message));
    };
    let mut device = node::measure(below)?;
    let length = length(below, device.size)?;
    let backing = device.number;
    let step = CryptStep {
        backing,
        sequence: sequence(backing),
    };
    let undo = Undo::CloseCrypt(step.clone());
    mapped::open(list, &step.names(), undo, |mapper, names| {
        if !may_destroy {
            refuse_content(below, &mut device.open)?;
        }
        let key = key::Ephemeral::new(&names.name)?;
        let table = table(backing, length, &key);
        let made = mapper.create_mapped(names, &table, Access::ReadWrite);
        key.leave();
        made.map_err(|error| explain_refusal(mapper, error))
    })
}

/// Removes the device that encrypts another, and with it the key. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(step: &CryptStep) -> Result<(), BackendError> {
    let names = step.names();
    mapped::remove(&names)?;
    key::forget(&names.name);
    Ok(())
}

/// Has the device that encrypts another take all of that, which has so many bytes now. It stays in use. Blocks.
///
/// # Errors
///
/// `Unsuitable` if its key was not kept.
pub(crate) fn grow(list: &UndoList<'_>, step: &CryptStep, bytes: u64) -> Result<(), BackendError> {
    let Names { name, uuid } = step.names();
    let _held = list.hold(Key::Mapped(name.clone()))?;
    let mapper = DeviceMapper::open()?;
    let gone = || BackendError::not_found(format!("mapped device {name} is gone"));
    mapper.find_uuid(&uuid)?.ok_or_else(gone)?;
    let now = mapper.table(&name)?.and_then(|mut table| table.pop());
    let now = now.ok_or_else(gone)?;
    // It goes on as it began.
    let unit = match now.parameters.contains("sector_size:") {
        true => LARGE_SECTOR,
        false => SECTOR,
    };
    let length = bytes / unit * unit / SECTOR;
    if length <= now.length {
        return Ok(());
    }
    let key = key::Ephemeral::find(&name)?;
    let grown = mapper.replace(&name, &Target { length, ..now }, Access::ReadWrite);
    key.leave();
    grown
}

/// The node of the device that encrypts another. Blocks.
pub(crate) fn node(step: &CryptStep) -> Option<PathBuf> {
    mapped::node(&step.names())
}

/// Refuses a device with anything on it that is known. Noise is not.
fn refuse_content(below: &Path, open: &mut File) -> Result<(), BackendError> {
    let device = below.display();
    let found = probe(open).map_err(|error| errno_error(format!("cannot read {device}"), error))?;
    match found.content {
        Content::Blank | Content::Unknown => Ok(()),
        other => Err(BackendError::conflict(format!(
            "cannot encrypt {device}: it holds {other}, which only a request to overwrite everything may destroy"
        ))),
    }
}

/// The size of a device that can be encrypted, in bytes.
fn length(below: &Path, size: u64) -> Result<u64, BackendError> {
    match size >= SECTOR {
        true => Ok(size / SECTOR * SECTOR),
        false => Err(BackendError::invalid(format!(
            "cannot encrypt {}: it has {size} bytes",
            below.display()
        ))),
    }
}

fn table(backing: DeviceNumber, length: u64, key: &key::Ephemeral) -> Target {
    let mut parameters = format!("{CIPHER} {} 0 {backing} 0", key.reference());
    if length.is_multiple_of(LARGE_SECTOR) {
        parameters += &format!(" 1 sector_size:{LARGE_SECTOR}");
    }
    Target {
        start: 0,
        length: length / SECTOR,
        kind: KIND.to_owned(),
        parameters,
    }
}

/// Says why the kernel refuses a table that is well-formed.
fn explain_refusal(mapper: &DeviceMapper, error: BackendError) -> BackendError {
    let why = match (mapper.version_of(KIND), errno_of(&error)) {
        (Ok(None), _) => "this kernel has no dm-crypt (is its module loaded?)".to_owned(),
        (_, Some(Errno::NOENT)) => format!("this kernel has no cipher {CIPHER}"),
        _ => return error,
    };
    let message = format!("{}: {why}", error.message());
    BackendError::unsuitable(message).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g14_the_longest_name_of_an_encrypted_device_fits() {
        let step = CryptStep {
            backing: DeviceNumber {
                major: u32::MAX,
                minor: u32::MAX,
            },
            sequence: None,
        };
        let Names { name, uuid } = step.names();
        assert!(name.len().max(uuid.len()) <= 127, "{name}");
        assert!(name.starts_with("blockmount-crypt-") && uuid.starts_with("BLKMNT-crypt-"));
    }
}
