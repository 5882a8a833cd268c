//! How the content of a device is encrypted, and where its key is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::InvalidOptions;

/// The longest description of a key that fits into a table of device-mapper, in bytes.
const LONGEST_DESCRIPTION: usize = 255;
/// What descriptions of the guest's own keys start with.
const RESERVED: &str = "blockmount:";

/// How the content of a device is encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Encryption {
    /// A random key that never leaves the guest: the content ends with the mount. For scratch disks.
    Ephemeral,
    /// The same, and each block of 4,096 bytes has a tag, which is kept on the disk too: reading a block that was changed there
    /// is `EIO`. One that was put back as it was before, with its tag, is not noticed. It costs about 2 % of the disk, and each
    /// write is two. Its size is fixed. A block that was never written has no tag and cannot be read either, so a filesystem has to be made
    /// on it, and the device cannot be exposed.
    EphemeralWithIntegrity,
    /// The same by one cipher that encrypts and makes the tags, in place of AES with HMAC-SHA-256. Each write of a block has a
    /// random number of its own, which is kept with the tag. The guest's kernel has to have the cipher.
    EphemeralWithAead(Aead),
    /// A key of 64 bytes that the guest's owner has placed in the guest: the content outlives the mount.
    ///
    /// The whole device is encrypted, without a header, with AES-256 in XTS mode in sectors of 4,096 bytes, each by its number
    /// (`plain64`, counted in units of 512 bytes), as `cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512
    /// --sector-size 4096` has it. Nothing tells a wrong key but that there is no filesystem.
    Keyed(KeySource),
    /// The volume of a disk with a header of LUKS2, which says how the rest of the disk is encrypted. The content outlives the
    /// mount, and a key that does not fit is an error.
    ///
    /// The guest reads the header with the program `cryptsetup` (2.4 or later), which has to be installed there. It opens
    /// volumes that are encrypted in XTS mode, as `cryptsetup luksFormat` makes them by default, without tags for their
    /// blocks, and with a header of at most 16 MiB. Nothing is written to the header. Who can write to the disk can replace
    /// header and content together by others that the same passphrase opens only if the passphrase is known.
    Luks2(LuksKey),
}

/// A cipher that authenticates what it encrypts (AEAD).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Aead {
    /// AEGIS-128: the fastest where the processor has AES. Linux 4.18.
    #[serde(rename = "aegis128")]
    Aegis128,
    /// ChaCha20-Poly1305 (RFC 7539): fast without AES in the processor. Its random numbers have 96 bits, so that no more than
    /// some 16 TiB should be written with one key.
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl Aead {
    /// Every cipher.
    pub const ALL: [Aead; 2] = [Self::Aegis128, Self::ChaCha20Poly1305];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Aead::Aegis128 => "aegis128",
            Aead::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }
}

impl fmt::Display for Aead {
    /// Its name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Aead {
    type Err = InvalidOptions;

    fn from_str(name: &str) -> Result<Self, InvalidOptions> {
        let known = Self::ALL.into_iter().find(|known| known.name() == name);
        known.ok_or_else(|| {
            let why = "aegis128 and chacha20-poly1305 are known";
            InvalidOptions::Malformed(format!("cipher {name}"), why)
        })
    }
}

/// What opens a volume of LUKS2.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LuksKey {
    /// A passphrase of one of its key slots, of 1 to 512 bytes, which are taken as they are, with a line end if there is one.
    /// In a keyring it is a key of the type `user`.
    Passphrase(KeySource),
    /// The key of the volume itself. One in a file is compared with the header. One in a keyring, of the type `logon`, can be
    /// read by no program: nothing tells a wrong one but that there is no filesystem.
    Volume(KeySource),
}

/// Where the guest finds a key. The request has only its name: the key itself is in no message, log or journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum KeySource {
    /// In the keyring of the guest's root (`@u`), or one that its agent searches, by the description of a key, such as
    /// `volumes:data`: of the type `logon` for an encryption without a header.
    Keyring(String),
    /// In a file of the directory of keys that the guest's agent was given, by its name.
    File(String),
}

impl Encryption {
    /// Whether what is written ends with the mount.
    pub fn is_ephemeral(&self) -> bool {
        matches!(
            self,
            Encryption::Ephemeral
                | Encryption::EphemeralWithIntegrity
                | Encryption::EphemeralWithAead(_)
        )
    }

    /// Whether reading what was changed on the disk is an error.
    pub fn has_integrity(&self) -> bool {
        matches!(
            self,
            Encryption::EphemeralWithIntegrity | Encryption::EphemeralWithAead(_)
        )
    }

    /// Whether a guest could look for the key.
    pub(super) fn validate(&self) -> Result<(), InvalidOptions> {
        match self {
            Encryption::Ephemeral
            | Encryption::EphemeralWithIntegrity
            | Encryption::EphemeralWithAead(_) => Ok(()),
            Encryption::Keyed(source) => source.validate(),
            Encryption::Luks2(key) => key.source().validate(),
        }
    }
}

impl LuksKey {
    /// Where it is.
    pub fn source(&self) -> &KeySource {
        match self {
            LuksKey::Passphrase(source) | LuksKey::Volume(source) => source,
        }
    }
}

impl KeySource {
    fn validate(&self) -> Result<(), InvalidOptions> {
        let malformed = |what: &str, name: &str, why| {
            Err(InvalidOptions::Malformed(format!("{what} {name}"), why))
        };
        match self {
            KeySource::Keyring(name) if name.starts_with(RESERVED) => {
                malformed("key", name, "keys of this name are the guest's own")
            }
            KeySource::Keyring(name) if !is_description(name) => malformed(
                "key",
                name,
                "a description of a key has 3 to 255 visible ASCII characters, with a colon after a prefix",
            ),
            KeySource::File(name) if !is_file_name(name) => malformed(
                "key file",
                name,
                "it is the name of a file, of at most 255 letters, digits, '.', '_' and '-', and none that is hidden",
            ),
            _ => Ok(()),
        }
    }
}

fn is_description(name: &str) -> bool {
    let parts = name.split_once(':');
    let has_prefix = parts.is_some_and(|(prefix, rest)| !prefix.is_empty() && !rest.is_empty());
    has_prefix && name.len() <= LONGEST_DESCRIPTION && name.bytes().all(|b| b.is_ascii_graphic())
}

fn is_file_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let length = 1..=LONGEST_DESCRIPTION;
    length.contains(&name.len()) && !name.starts_with('.') && name.chars().all(fits)
}
