//! Devices that are encrypted (dm-crypt): with a key of their own, which nobody knows and which ends with the device, with
//! one that the guest's owner has placed in the guest, or as a header of LUKS2 says.
//!
//! The kernel takes the key from its keyring, from where no program can read it. It is in no request, table or message: they
//! have only the name under which the keyring has it.

use std::path::{Path, PathBuf};

use blockmount::{BackendError, Encryption, KeySource, LuksKey};

use crate::device::cipher::{self, Cipher};
use crate::device::content::{is_blank, refuse_content};
use crate::device::key::{self, Key};
use crate::device::luks::{Opened, VolumeKey};
use crate::device::luks_header::Segment;
use crate::device::mapper::{Access, DeviceMapper, Names, SECTOR, Target};
use crate::device::number::DeviceNumber;
use crate::device::partition::sequence;
use crate::device::{integrity, mapped, node, tags};
use crate::filesystem::probe::{Content, probe};
use crate::undo::ledger::UndoList;
use crate::undo::locks;
use crate::undo::step::{CryptStep, Undo};

pub(super) const KIND: &str = "crypt";
/// What is encrypted at once, in bytes, where the size of the device allows it: the cipher starts anew less often.
const LARGE_SECTOR: u64 = 4096;

impl CryptStep {
    /// From the number of the device alone: at most 38 bytes with a mark.
    pub(crate) fn names(&self) -> Names {
        let DeviceNumber { major, minor } = self.backing;
        let suffix = format!("crypt-{major}.{minor}");
        Names::new(&suffix, self.mark.as_deref())
    }

    /// The unit of a device of so many bytes. What outlives its mount has one unit for all sizes, so that it can grow.
    fn unit(&self, bytes: u64) -> u64 {
        match self.encryption.is_ephemeral() && !bytes.is_multiple_of(LARGE_SECTOR) {
            true => SECTOR,
            false => LARGE_SECTOR,
        }
    }
}

/// How a device is to be encrypted.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) encryption: Encryption,
    pub(crate) read_only: bool,
    /// Whether anything on the device may be lost.
    pub(crate) may_destroy: bool,
    /// The node of the device below all layers of the encryption.
    pub(crate) disk: PathBuf,
    /// The directory of the owner's keys.
    pub(crate) keys: Option<PathBuf>,
    /// How the volume of LUKS2 is encrypted, if it is one.
    pub(crate) volume: Option<Opened>,
}

/// What is on a device, as it is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Worth {
    /// What somebody has written.
    Kept,
    /// Noise.
    Noise,
    /// Noise, unless it is known: the device below is blank.
    NoiseIfUnknown,
}

/// What was made of a device, for whoever makes a filesystem on it, or has to explain an error.
#[derive(Debug, Clone)]
pub(crate) struct Encrypted {
    pub(crate) worth: Worth,
    encryption: Encryption,
    /// The node of the device below all layers of the encryption.
    disk: PathBuf,
}

/// Makes a device that encrypts another, and names its node. With a new key, what was on the other is lost then: it has to
/// be blank, or the noise of an earlier key, unless anything may be destroyed. Blocks.
///
/// # Errors
///
/// `Conflict` if there is something on the device that is known; `NotFound` if the owner's key is not there, `Invalid` if it
/// has another length; `Unsuitable` if this kernel has no dm-crypt, no such cipher or no keyring, or the encryption is not
/// known; `Conflict` also if somebody else has made a device of the name, or the device cannot be written to; `Busy` and
/// others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    below: &Path,
    wanted: &Wanted,
) -> Result<(PathBuf, Encrypted), BackendError> {
    let mut device = node::measure(below)?;
    let backing = device.number;
    let step = CryptStep {
        backing,
        sequence: sequence(backing),
        encryption: wanted.encryption.clone(),
        read_only: wanted.read_only,
        mark: list.device_mark(),
    };
    let segment = wanted.segment(&step, device.size)?;
    let length = length(below, device.size, &segment)?;
    let undo = Undo::CloseCrypt(Box::new(step.clone()));
    let is_keyed = !wanted.encryption.is_ephemeral();
    let mut worth = match is_keyed {
        true => Worth::Kept,
        false => Worth::Noise,
    };
    let has_integrity = wanted.encryption.has_integrity();
    let node = mapped::open(list, &step.names(), undo, |mapper, names| {
        if is_keyed && is_blank(below, &mut device.open, segment.start * SECTOR)? {
            worth = Worth::NoiseIfUnknown;
        } else if !is_keyed && !has_integrity && !wanted.may_destroy {
            refuse_content(below, &mut device.open)?;
        }
        let key = wanted.key(&names.name)?;
        let table = table(&step, &segment, length, &key)?;
        let access = match wanted.read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let made = mapper.create_mapped(names, &table, access);
        key.leave();
        let made = made.map_err(|error| cipher::explain_refusal(mapper, &segment.cipher, error))?;
        if has_integrity {
            tags::write_first(made, &wanted.disk)?;
        }
        Ok(made)
    })?;
    let encrypted = Encrypted {
        worth,
        encryption: wanted.encryption.clone(),
        disk: wanted.disk.clone(),
    };
    Ok((node, encrypted))
}

/// Refuses a device that is read-only, such as a byte range, below one that is not: the kernel writes to it all the same.
/// Blocks.
pub(crate) fn ensure_writable(below: &Path) -> Result<(), BackendError> {
    if !DeviceNumber::at(below)?.is_read_only() {
        return Ok(());
    }
    let below = below.display();
    Err(BackendError::unsuitable(format!(
        "cannot encrypt what is written to {below}: it is read-only, as byte ranges of a device are"
    )))
}

impl Wanted {
    /// What is encrypted of a device of so many bytes, and how.
    fn segment(&self, step: &CryptStep, size: u64) -> Result<Segment, BackendError> {
        if let Some(volume) = &self.volume {
            return Ok(volume.segment.clone());
        }
        Ok(Segment {
            cipher: Cipher::of(&self.encryption)?.name.to_owned(),
            start: 0,
            first: 0,
            unit: step.unit(size / SECTOR * SECTOR),
        })
    }

    fn key(&self, name: &str) -> Result<Key, BackendError> {
        if let Some(volume) = &self.volume {
            return match &volume.key {
                VolumeKey::Known(secret) => Key::of(name, secret),
                VolumeKey::InKeyring(description) => Key::in_keyring(description, volume.length),
            };
        }
        let length = Cipher::of(&self.encryption)?.key;
        match &self.encryption {
            Encryption::Keyed(source) => Key::of_owner(name, source, self.keys.as_deref(), length),
            _ => Key::random(name, length),
        }
    }
}

impl Encrypted {
    /// Adds to an error of reading or mounting that blocks were changed, or to one about the content of a device that the
    /// key may be the wrong one. Blocks.
    pub(crate) fn explained(&self, node: &Path, error: BackendError) -> BackendError {
        let (disk, message) = (self.disk.display(), error.message());
        let is_noise = || {
            let mut open = node::measure(node).ok()?.open;
            let found = probe(&mut open).ok()?;
            Some(found.content == Content::Unknown)
        };
        if self.encryption.has_integrity() {
            if !DeviceNumber::at(node).is_ok_and(tags::are_wrong) {
                return error;
            }
            let message = format!("{message}: blocks of {disk} are not what was written to them");
            return BackendError::invalid(message).with_source(error);
        }
        // A key that was compared with a header is the right one.
        use LuksKey::{Passphrase, Volume};
        let is_proven = matches!(
            &self.encryption,
            Encryption::Luks2(Passphrase(_) | Volume(KeySource::File(_)))
        );
        if self.encryption.is_ephemeral() || is_proven || is_noise() != Some(true) {
            return error;
        }
        let message = format!("{message}: what is on {disk} is not encrypted, or with another key");
        BackendError::new(error.kind(), message).with_source(error)
    }
}

/// Removes the device that encrypts another, and with it the key. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(step: &CryptStep) -> Result<(), BackendError> {
    let names = step.names();
    if step.encryption.has_integrity() {
        tags::report_tampering(step);
    }
    mapped::remove(&names)?;
    key::forget(&names.name);
    Ok(())
}

/// Has the device that encrypts another take all of that, which has so many bytes now. It stays in use. Blocks.
///
/// # Errors
///
/// `Unsuitable` if its key was not kept, or is one that its owner may have changed.
pub(crate) fn grow(list: &UndoList<'_>, step: &CryptStep, bytes: u64) -> Result<(), BackendError> {
    let Names { name, uuid } = step.names();
    use KeySource::Keyring;
    if let Encryption::Keyed(Keyring(key)) | Encryption::Luks2(LuksKey::Volume(Keyring(key))) =
        &step.encryption
    {
        return Err(BackendError::unsuitable(format!(
            "cannot grow {name}: key {key} would have to be taken from the keyring again, where it may be another one by now"
        )));
    }
    let _held = list.hold(locks::Key::Mapped(name.clone()))?;
    let mapper = DeviceMapper::open()?;
    let gone = || BackendError::not_found(format!("mapped device {name} is gone"));
    mapper.find_uuid(&uuid)?.ok_or_else(gone)?;
    let now = mapper.table(&name)?.and_then(|mut table| table.pop());
    let now = now.ok_or_else(gone)?;
    // It goes on as it began.
    let (unit, start, key_length) = read_table(&now.parameters).ok_or_else(|| {
        BackendError::other(format!("the kernel's table of {name} cannot be read"))
    })?;
    let length = bytes.saturating_sub(start.saturating_mul(SECTOR)) / unit * unit / SECTOR;
    if length <= now.length {
        return Ok(());
    }
    let key = Key::find(&name, key_length)?;
    let grown = mapper.replace(&name, &Target { length, ..now }, Access::ReadWrite);
    key.leave();
    grown
}

/// The node of the device that encrypts another. Blocks.
pub(crate) fn node(step: &CryptStep) -> Option<PathBuf> {
    mapped::node(&step.names())
}

/// The size of what a device can have encrypted, in bytes.
fn length(below: &Path, size: u64, segment: &Segment) -> Result<u64, BackendError> {
    let Segment { start, unit, .. } = segment;
    match size.saturating_sub(start * SECTOR) / unit * unit {
        0 => Err(BackendError::invalid(format!(
            "cannot encrypt {}: it has {size} bytes",
            below.display()
        ))),
        length => Ok(length),
    }
}

fn table(
    step: &CryptStep,
    segment: &Segment,
    length: u64,
    key: &Key,
) -> Result<Target, BackendError> {
    let Segment {
        cipher,
        start,
        first,
        unit,
    } = segment;
    let (key, backing) = (key.reference(), step.backing);
    let mut parameters = format!("{cipher} {key} {first} {backing} {start}");
    if step.encryption.has_integrity() {
        let (tag, block) = (Cipher::of(&step.encryption)?.tag, integrity::BLOCK);
        parameters += &format!(" 2 integrity:{tag}:aead sector_size:{block}");
    } else if *unit != SECTOR {
        parameters += &format!(" 1 {UNIT}{unit}");
    }
    Ok(Target {
        start: 0,
        length: length / SECTOR,
        kind: KIND.to_owned(),
        parameters,
    })
}

/// The word of a table for what is encrypted at once.
const UNIT: &str = "sector_size:";

/// The unit of a table, where its content begins on the device below, and the length of its key: two in bytes, the second in
/// sectors. A table is the cipher, the key with its length, the number of the first sector, the device and where it begins.
fn read_table(parameters: &str) -> Option<(u64, u64, usize)> {
    let words: Vec<&str> = parameters.split_ascii_whitespace().collect();
    let key = words.get(1)?.strip_prefix(':')?;
    let key = key.split(':').next()?.parse().ok()?;
    let start = words.get(4)?.parse().ok()?;
    let unit = words.iter().find_map(|word| word.strip_prefix(UNIT));
    Some((unit.map_or(Some(SECTOR), |it| it.parse().ok())?, start, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_is_written() {
        for (parameters, expected) in [
            (
                "aes-xts-plain64 :64:logon:a:b 0 8:0 0 1 sector_size:4096",
                (4096, 0, 64),
            ),
            (
                "aes-xts-plain64 :32:logon:a:b 7 8:0 32768",
                (512, 32768, 32),
            ),
        ] {
            assert_eq!(read_table(parameters), Some(expected), "{parameters}");
        }
        for wrong in [
            "",
            "aes",
            "aes :64:logon:a:b 0 8:0",
            "aes 0011 0 8:0 0",
            "aes :x:y 0 8:0 0",
        ] {
            assert_eq!(read_table(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn g14_the_longest_name_of_an_encrypted_device_fits() {
        let step = CryptStep {
            backing: DeviceNumber {
                major: u32::MAX,
                minor: u32::MAX,
            },
            sequence: None,
            encryption: Encryption::Ephemeral,
            read_only: false,
            mark: Some("m".repeat(40)),
        };
        let Names { name, uuid } = step.names();
        assert!(name.len().max(uuid.len()) <= 127, "{name}");
        assert!(name.starts_with("blockmount-crypt-") && uuid.starts_with("BLKMNT-crypt-"));
    }
}
