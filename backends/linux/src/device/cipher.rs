//! The ciphers of devices without a header.

use blockmount::{Aead, BackendError, Encryption};
use rustix::io::Errno;

use crate::device::crypt::KIND;
use crate::device::mapper::DeviceMapper;
use crate::errno::errno_of;

/// How content without a header is encrypted.
pub(super) struct Cipher {
    /// As a table has it.
    pub(super) name: &'static str,
    /// The length of its key, in bytes.
    pub(super) key: usize,
    /// How much it keeps for each block, in bytes: the tag, and the initialization vector if that is random.
    pub(super) tag: usize,
    /// Those of the kernel that have it.
    modules: &'static str,
}

impl Cipher {
    /// That of an encryption.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this guest does not know it.
    pub(super) fn of(encryption: &Encryption) -> Result<&'static Cipher, BackendError> {
        match encryption {
            Encryption::Ephemeral | Encryption::Keyed(_) => Ok(&CIPHER),
            Encryption::EphemeralWithIntegrity => Ok(&AES_WITH_HMAC),
            Encryption::EphemeralWithAead(Aead::Aegis128) => Ok(&AEGIS),
            Encryption::EphemeralWithAead(Aead::ChaCha20Poly1305) => Ok(&CHACHA),
            other => Err(BackendError::unsuitable(format!(
                "this guest does not know the encryption {other:?}"
            ))),
        }
    }
}

/// How much an encryption keeps for each block, in bytes.
///
/// # Errors
///
/// `Unsuitable` if it is not known.
pub(crate) fn tag_length(encryption: &Encryption) -> Result<usize, BackendError> {
    Cipher::of(encryption).map(|cipher| cipher.tag)
}

/// AES-256 in the mode XTS, which has two keys of 32 bytes, by the number of the sector.
const CIPHER: Cipher = Cipher {
    name: "aes-xts-plain64",
    key: 64,
    tag: 0,
    modules: "module xts",
};
/// The same, and a tag by HMAC-SHA-256 over a block, its number and its initialization vector, with a key of
/// 32 bytes.
const AES_WITH_HMAC: Cipher = Cipher {
    name: "capi:authenc(hmac(sha256),xts(aes))-plain64",
    key: 64 + 32,
    tag: 32,
    modules: "the modules authenc and xts",
};
/// A tag of 16 bytes and a random initialization vector.
const AEGIS: Cipher = Cipher {
    name: "capi:aegis128-random",
    key: 16,
    tag: 16 + 16,
    modules: "module aegis128",
};
/// The same with a shorter vector.
const CHACHA: Cipher = Cipher {
    name: "capi:rfc7539(chacha20,poly1305)-random",
    key: 32,
    tag: 16 + 12,
    modules: "the modules chacha20poly1305, chacha_generic and poly1305_generic",
};
const ALL: [&Cipher; 4] = [&CIPHER, &AES_WITH_HMAC, &AEGIS, &CHACHA];

/// Says why the kernel refuses a table that is well-formed.
pub(super) fn explain_refusal(
    mapper: &DeviceMapper,
    cipher: &str,
    error: BackendError,
) -> BackendError {
    let why = match (mapper.version_of(KIND), errno_of(&error)) {
        (Ok(None), _) => "this kernel has no dm-crypt (is its module loaded?)".to_owned(),
        (_, Some(Errno::NOENT)) => {
            let known = ALL.iter().find(|known| known.name == cipher);
            let modules = known.map_or(String::new(), |known| {
                format!(" (is it loaded? It needs {})", known.modules)
            });
            format!("this kernel has no cipher {cipher}{modules}")
        }
        // It was there a moment ago.
        (_, Some(Errno::NOKEY)) => {
            let message = format!("{}: its key is gone", error.message());
            return BackendError::not_found(message).with_source(error);
        }
        _ => return error,
    };
    let message = format!("{}: {why}", error.message());
    BackendError::unsuitable(message).with_source(error)
}
