//! Volumes of LUKS2: how they are encrypted, and the key that opens them.
//!
//! Header and key slots are copied once into memory, and `cryptsetup` reads that copy: it never has the device, makes none,
//! and what it says of the header holds for all that it is asked for, whoever writes to the disk meanwhile. The device that
//! decrypts is made from the answers as others are.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, KeySource, LuksKey};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::device::key;
use crate::device::luks_header::{self, Segment};
use crate::device::secret::Secret;
use crate::errno::{blocking, errno_error};
use crate::filesystem::tool::{Answer, Tool};

const TOOL: &str = "cryptsetup";
const PACKAGE: &str = "cryptsetup-bin";
/// How much of a disk is its header, in bytes: as much as `cryptsetup luksFormat` takes by default.
const LONGEST_HEADER: u64 = 16 << 20;
/// How long it takes to try a passphrase: two seconds for each key slot, unless the machine is slow or busy.
const UNLOCKING: Duration = Duration::from_secs(60);
/// The longest passphrase that `cryptsetup` reads from a terminal, in bytes.
const PASSPHRASES: RangeInclusive<usize> = 1..=512;
/// As much as is read of what describes a header, and of a key in hexadecimal with what is said before it, in bytes.
const LONGEST_DESCRIPTION: usize = 256 << 10;
const LONGEST_KEY_DUMP: usize = 4 << 10;
/// How `cryptsetup` ends when a passphrase or key does not fit, and when it has not enough memory.
const NO_PERMISSION: i32 = 2;
const OUT_OF_MEMORY: i32 = 3;

/// How a volume is encrypted, and its key.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(super) segment: Segment,
    pub(super) key: VolumeKey,
    /// Of the key, in bytes.
    pub(super) length: usize,
}

/// The key of a volume.
#[derive(Clone)]
pub(super) enum VolumeKey {
    Known(Arc<Secret>),
    /// In a keyring, where nobody can read it, by its description.
    InKeyring(String),
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VolumeKey::Known(secret) => secret.fmt(f),
            VolumeKey::InKeyring(description) => write!(f, "key {description}"),
        }
    }
}

/// Reads the header of a volume and finds its key.
///
/// # Errors
///
/// `NotFound` if there is no volume of LUKS2, or the key or passphrase is not there; `Invalid` if it is another one;
/// `Unsuitable` if the volume is of a kind that is not opened, or `cryptsetup` is not installed.
///
/// # Cancel safety
///
/// Nothing is left.
pub(crate) async fn unlock(
    disk: &Path,
    key: &LuksKey,
    keys: Option<PathBuf>,
) -> Result<Opened, BackendError> {
    let tool = Tool::find(TOOL, PACKAGE)?;
    let path = disk.to_owned();
    let (header, size) = blocking(move || copy_header(&path)).await?;
    let volume = Volume { tool, header, disk };
    let arguments = ["luksDump", "--dump-json-metadata"];
    let answer = volume.ask(&arguments, &[], LONGEST_DESCRIPTION).await?;
    if answer.status != Some(0) {
        let (disk, said) = (disk.display(), answer.complaint);
        let message = format!("there is no volume of LUKS2 on {disk}: {said}");
        return Err(BackendError::not_found(message));
    }
    let room = LONGEST_HEADER.min(size)..size;
    let described = luks_header::read(&answer.out, &room);
    let (segment, length) = described.map_err(|error| error.of(disk))?;
    let source = key.source().clone();
    let key = match key {
        LuksKey::Passphrase(_) => {
            let passphrase = find(source, keys, PASSPHRASES, key::read_user_key).await?;
            VolumeKey::Known(volume.key_by(&passphrase, key).await?.into())
        }
        LuksKey::Volume(KeySource::Keyring(description)) => {
            VolumeKey::InKeyring(description.clone())
        }
        LuksKey::Volume(_) => {
            let secret = find(source, keys, length..=length, key::read_user_key).await?;
            volume.prove(&secret, key).await?;
            VolumeKey::Known(secret.into())
        }
        other => {
            let message = format!("this guest does not know how {other:?} opens a volume of LUKS2");
            return Err(BackendError::unsuitable(message));
        }
    };
    Ok(Opened {
        segment,
        key,
        length,
    })
}

/// Finds a passphrase or a key that a program may read.
async fn find(
    source: KeySource,
    keys: Option<PathBuf>,
    lengths: RangeInclusive<usize>,
    in_keyring: fn(&str, RangeInclusive<usize>) -> Result<Secret, BackendError>,
) -> Result<Secret, BackendError> {
    let find = move || match &source {
        KeySource::Keyring(description) => in_keyring(description, lengths),
        other => key::in_directory(other, keys.as_deref(), lengths),
    };
    blocking(find).await
}

/// A header and key slots, in memory, and how large the device is in bytes. Blocks.
fn copy_header(disk: &Path) -> Result<(File, u64), BackendError> {
    let copy = || -> io::Result<(File, u64)> {
        let mut device = File::open(disk)?;
        let size = device.seek(SeekFrom::End(0))?;
        device.rewind()?;
        let mut header = File::from(memfd_create("luks2", MemfdFlags::CLOEXEC)?);
        io::copy(&mut device.take(LONGEST_HEADER), &mut header)?;
        header.flush()?;
        Ok((header, size))
    };
    copy().map_err(|error| {
        let disk = disk.display();
        errno_error(format!("cannot read the header of {disk}"), error)
    })
}

/// A volume, as `cryptsetup` sees it.
struct Volume<'a> {
    tool: Tool,
    header: File,
    disk: &'a Path,
}

impl Volume<'_> {
    async fn ask(
        &self,
        arguments: &[&str],
        input: &[u8],
        most: usize,
    ) -> Result<Answer, BackendError> {
        // What has no other name is in `/proc`.
        let own = std::process::id();
        let header = format!("/proc/{own}/fd/{}", self.header.as_raw_fd());
        // Nobody else has the copy.
        let always = ["--disable-locks", "--batch-mode"].map(Into::into);
        let arguments = arguments.iter().map(Into::into).chain(always);
        let arguments = arguments.chain([header.into()]);
        self.tool.answer(arguments, input, most, UNLOCKING).await
    }

    /// The key of the volume, by a passphrase.
    async fn key_by(&self, passphrase: &Secret, key: &LuksKey) -> Result<Secret, BackendError> {
        let arguments = ["luksDump", "--dump-volume-key", "--key-file=-"];
        let answer = self.ask(&arguments, passphrase.bytes(), LONGEST_KEY_DUMP);
        let Answer {
            status,
            out,
            complaint,
        } = answer.await?;
        let out = Secret::from(out);
        self.judge(status, &complaint, key)?;
        luks_header::dumped_key(out.bytes())
            .map(Secret::from)
            .ok_or_else(|| BackendError::other(format!("{TOOL} does not say the key of a volume")))
    }

    /// Proves that a key is that of the volume.
    async fn prove(&self, secret: &Secret, key: &LuksKey) -> Result<(), BackendError> {
        let arguments = [
            "open",
            "--type=luks2",
            "--test-passphrase",
            "--volume-key-file=/proc/self/fd/0",
        ];
        let answer = self.ask(&arguments, secret.bytes(), LONGEST_KEY_DUMP);
        let answer = answer.await?;
        self.judge(answer.status, &answer.complaint, key)
    }

    fn judge(&self, status: Option<i32>, said: &str, key: &LuksKey) -> Result<(), BackendError> {
        let (disk, name) = (self.disk.display(), spelled(key));
        match status {
            Some(0) => Ok(()),
            Some(NO_PERMISSION) => Err(BackendError::invalid(format!(
                "{name} does not open the volume of LUKS2 on {disk}: {said}"
            ))),
            Some(OUT_OF_MEMORY) => Err(BackendError::unsuitable(format!(
                "this guest has not enough memory to open the volume of LUKS2 on {disk}: {said}"
            ))),
            Some(status) => Err(BackendError::other(format!(
                "{TOOL} failed with status {status} on {disk}: {said}"
            ))),
            None => Err(BackendError::other(format!(
                "{TOOL} was killed while it opened the volume of LUKS2 on {disk}"
            ))),
        }
    }
}

/// A passphrase or a key, by its name.
fn spelled(key: &LuksKey) -> String {
    let kind = match key {
        LuksKey::Passphrase(_) => "passphrase",
        _ => "volume key",
    };
    match key.source() {
        KeySource::Keyring(name) | KeySource::File(name) => format!("{kind} {name}"),
        _ => kind.to_owned(),
    }
}
