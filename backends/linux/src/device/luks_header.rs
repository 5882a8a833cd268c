//! What `cryptsetup` says of a header of LUKS2. All of it is from the disk, and nothing of it is believed.
//!
//! The header is not authenticated: who can write to a disk can put another cipher into it, such as none. So there is a list
//! of those that are taken, for the key slots too: one whose slot is not encrypted is opened by any passphrase.

use std::collections::BTreeMap;
use std::fs;
use std::ops::{Range, RangeInclusive};
use std::path::Path;

use blockmount::BackendError;
use serde::Deserialize;

/// The unit of offsets in a table, in bytes.
const SECTOR: u64 = 512;
/// What may encrypt a volume and its key slots.
const CIPHERS: [&str; 4] = [
    "aes-xts-plain64",
    "camellia-xts-plain64",
    "serpent-xts-plain64",
    "twofish-xts-plain64",
];
/// Lengths of keys, in bytes: two of 128 or 256 bits.
const KEY_LENGTHS: RangeInclusive<usize> = 32..=64;

/// Where and how the content of a volume is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) cipher: String,
    /// Where it begins on the device, in sectors of 512 bytes.
    pub(super) start: u64,
    /// The number of its first sector, as the cipher counts.
    pub(super) first: u64,
    /// What is encrypted at once, in bytes.
    pub(super) unit: u64,
}

/// Why a volume is not opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It makes no sense.
    Malformed(String),
    /// It is of a kind that is not opened.
    Unknown(String),
}

impl Refused {
    /// The error of a disk.
    pub(super) fn of(self, disk: &Path) -> BackendError {
        let disk = disk.display();
        match self {
            Refused::Malformed(why) => BackendError::invalid(format!(
                "the header of LUKS2 on {disk} makes no sense: {why}"
            )),
            Refused::Unknown(what) => BackendError::unsuitable(format!(
                "the volume of LUKS2 on {disk} is not opened: {what}"
            )),
        }
    }
}

#[derive(Deserialize)]
struct Header {
    keyslots: BTreeMap<String, KeySlot>,
    segments: BTreeMap<String, Area>,
    digests: BTreeMap<String, Digest>,
    #[serde(default)]
    config: Config,
}

#[derive(Deserialize)]
struct KeySlot {
    key_size: usize,
    area: Area,
    #[serde(default)]
    kdf: Derivation,
}

/// A segment, or the area of a key slot.
#[derive(Deserialize)]
struct Area {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    sector_size: u64,
    integrity: Option<serde_json::Value>,
}

#[derive(Deserialize, Default)]
struct Derivation {
    /// In KiB.
    #[serde(default)]
    memory: u64,
}

#[derive(Deserialize)]
struct Digest {
    keyslots: Vec<String>,
    segments: Vec<String>,
}

#[derive(Deserialize, Default)]
struct Config {
    #[serde(default)]
    requirements: Requirements,
}

#[derive(Deserialize, Default)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

/// Reads what describes a header, and how long the key of its volume is in bytes. The content may begin at the start of `room`
/// at the latest, which ends where the device does.
pub(super) fn read(json: &[u8], room: &Range<u64>) -> Result<(Segment, usize), Refused> {
    let malformed = |error: serde_json::Error| Refused::Malformed(error.to_string());
    let header: Header = serde_json::from_slice(json).map_err(malformed)?;
    if let Some(needed) = header.config.requirements.mandatory.first() {
        let needed = blockmount::printable(needed).shortened(40);
        return Err(Refused::Unknown(format!("it requires {needed}")));
    }
    let mut segments = header.segments.iter();
    let (Some((name, area)), None) = (segments.next(), segments.next()) else {
        let count = header.segments.len();
        return Err(Refused::Unknown(format!("it has {count} segments")));
    };
    let segment = segment(area, room)?;
    Ok((segment, key_length(&header, name)?))
}

fn segment(area: &Area, room: &Range<u64>) -> Result<Segment, Refused> {
    let malformed = |what: &str| Err(Refused::Malformed(what.to_owned()));
    let unknown = |what: &str| Err(Refused::Unknown(what.to_owned()));
    if area.kind != "crypt" || area.size != "dynamic" {
        return unknown("its content is not all that follows the header");
    }
    if area.integrity.is_some() {
        return unknown("its blocks have tags");
    }
    ensure_cipher(&area.encryption)?;
    let (Ok(offset), Ok(first)) = (area.offset.parse::<u64>(), area.iv_tweak.parse()) else {
        return malformed("an offset is no number");
    };
    let unit = area.sector_size;
    if !unit.is_power_of_two() || !(SECTOR..=4096).contains(&unit) {
        return malformed("no cipher has such sectors");
    }
    if offset == 0 || !offset.is_multiple_of(unit) || offset >= room.end {
        return malformed("its content is not behind the header");
    }
    if offset > room.start {
        return unknown("its header is larger than 16 MiB");
    }
    Ok(Segment {
        cipher: area.encryption.clone(),
        start: offset / SECTOR,
        first,
        unit,
    })
}

fn ensure_cipher(name: &str) -> Result<(), Refused> {
    match CIPHERS.contains(&name) {
        true => Ok(()),
        false => {
            let name = blockmount::printable(name).shortened(40);
            Err(Refused::Unknown(format!("it is encrypted by {name}")))
        }
    }
}

/// The length of the key of a segment, which its key slots say. All of these could be opened.
fn key_length(header: &Header, segment: &String) -> Result<usize, Refused> {
    for slot in header.keyslots.values() {
        ensure_cipher(&slot.area.encryption)?;
        ensure_memory(slot.kdf.memory, available_memory())?;
    }
    let mut digests = header.digests.values();
    let digest = digests.find(|digest| digest.segments.contains(segment));
    let slots = digest.into_iter().flat_map(|digest| &digest.keyslots);
    let mut slots = slots.filter_map(|name| header.keyslots.get(name));
    match slots.next() {
        None => Err(Refused::Unknown("it has no key slot".to_owned())),
        Some(slot) if !KEY_LENGTHS.contains(&slot.key_size) => {
            let bytes = slot.key_size;
            Err(Refused::Malformed(format!("its key has {bytes} bytes")))
        }
        Some(slot) => Ok(slot.key_size),
    }
}

/// Refuses what would have the kernel end processes, this one among them.
fn ensure_memory(needed: u64, available: Option<u64>) -> Result<(), Refused> {
    match available {
        Some(available) if needed > available => Err(Refused::Unknown(format!(
            "a passphrase takes {} MiB of memory to try, and this guest has {} MiB",
            needed >> 10,
            available >> 10
        ))),
        _ => Ok(()),
    }
}

/// What the kernel says that programs can still have, in KiB.
fn available_memory() -> Option<u64> {
    let table = fs::read_to_string("/proc/meminfo").ok()?;
    let line = table
        .lines()
        .find_map(|it| it.strip_prefix("MemAvailable:"));
    line?.trim().strip_suffix(" kB")?.parse().ok()
}

/// The key in what `luksDump --dump-volume-key` says: hexadecimal digits behind the last of its words.
pub(super) fn dumped_key(said: &[u8]) -> Option<Vec<u8>> {
    let marker = b"dump:";
    let at = said.windows(marker.len()).position(|part| part == marker)?;
    let digits = said[at + marker.len()..]
        .iter()
        .filter(|byte| !byte.is_ascii_whitespace());
    let mut key = Vec::with_capacity(*KEY_LENGTHS.end());
    let mut half = None;
    for byte in digits {
        let digit = char::from(*byte).to_digit(16)? as u8;
        match half.take() {
            None => half = Some(digit << 4),
            Some(_) if key.len() == *KEY_LENGTHS.end() => return None,
            Some(high) => key.push(high | digit),
        }
    }
    (half.is_none() && KEY_LENGTHS.contains(&key.len())).then_some(key)
}

/// What the fuzz target calls: a header, and what is said of a key.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let room = (16 << 20)..(64 << 20);
    if let Ok((segment, length)) = read(bytes, &room) {
        let start = segment.start * SECTOR;
        assert!(start > 0 && start <= room.start && start.is_multiple_of(segment.unit));
        assert!(CIPHERS.contains(&&*segment.cipher) && KEY_LENGTHS.contains(&length));
    }
    if let Some(key) = dumped_key(bytes) {
        assert!(KEY_LENGTHS.contains(&key.len()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ROOM: Range<u64> = 16 << 20..64 << 20;

    fn header() -> Value {
        json!({
            "keyslots": {"0": {
                "type": "luks2", "key_size": 64,
                "area": {"type": "raw", "offset": "32768", "size": "258048", "encryption": "aes-xts-plain64", "key_size": 64},
                "kdf": {"type": "argon2id", "time": 4, "memory": 1, "cpus": 1, "salt": "c2FsdA=="}
            }},
            "tokens": {},
            "segments": {"0": {
                "type": "crypt", "offset": "16777216", "size": "dynamic", "iv_tweak": "0",
                "encryption": "aes-xts-plain64", "sector_size": 4096
            }},
            "digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"]}},
            "config": {"json_size": "12288", "keyslots_size": "16744448"}
        })
    }

    fn try_with(pointer: &str, value: Value) -> Result<(Segment, usize), Refused> {
        let mut header = header();
        *header.pointer_mut(pointer).unwrap() = value;
        read(header.to_string().as_bytes(), &ROOM)
    }

    #[test]
    fn a_header_as_cryptsetup_makes_it_is_read() {
        let (segment, length) = read(header().to_string().as_bytes(), &ROOM).unwrap();
        let expected = Segment {
            cipher: "aes-xts-plain64".to_owned(),
            start: 32768,
            first: 0,
            unit: 4096,
        };
        assert_eq!((segment, length), (expected, 64));
    }

    #[test]
    fn a_header_that_somebody_has_changed_is_refused() {
        for (pointer, value) in [
            ("/segments/0/encryption", json!("cipher_null-ecb")),
            ("/segments/0/encryption", json!("aes-xts-plain64 x")),
            ("/segments/0/encryption", json!("aes-ecb-null")),
            ("/keyslots/0/area/encryption", json!("cipher_null-ecb")),
            ("/keyslots/0/kdf/memory", json!(u64::MAX)),
            ("/keyslots/0/key_size", json!(65)),
            ("/keyslots/0/key_size", json!(0)),
            ("/keyslots/0/key_size", json!(-1)),
            ("/segments/0/offset", json!("0")),
            ("/segments/0/offset", json!("16777217")),
            ("/segments/0/offset", json!("33554432")),
            ("/segments/0/offset", json!("18446744073709551615")),
            ("/segments/0/offset", json!("18446744073709547520")),
            ("/segments/0/iv_tweak", json!("-1")),
            ("/segments/0/sector_size", json!(0)),
            ("/segments/0/sector_size", json!(8192)),
            ("/segments/0/sector_size", json!(513)),
            ("/segments/0/size", json!("4096")),
            ("/segments/0/type", json!("linear")),
            ("/segments", json!({})),
            ("/digests", json!({})),
            (
                "/config",
                json!({"requirements": {"mandatory": ["online-reencrypt"]}}),
            ),
        ] {
            let tried = try_with(pointer, value.clone());
            assert!(tried.is_err(), "{pointer} {value}: {tried:?}");
        }
        let mut tags = header();
        tags["segments"]["0"]["integrity"] = json!({"type": "hmac(sha256)"});
        assert!(read(tags.to_string().as_bytes(), &ROOM).is_err());
        assert!(read(b"{", &ROOM).is_err());
    }

    #[test]
    fn a_key_is_read_from_what_is_said() {
        let said = |key: &str| format!("UUID:  \tdump\nMK bits: \t256\nMK dump:\t{key}\n");
        let digits = "0f 1e 2d 3c 4b 5a 69 78 87 96 a5 b4 c3 d2 e1 f0 \n\t\t".repeat(2);
        let key = dumped_key(said(&digits).as_bytes()).unwrap();
        assert_eq!((key.len(), key[0], key[31]), (32, 0x0f, 0xf0));
        for wrong in [
            "",
            "0f",
            &digits[..digits.len() - 5],
            &digits.repeat(3),
            "xy",
        ] {
            assert_eq!(dumped_key(said(wrong).as_bytes()), None, "{wrong}");
        }
        assert_eq!(dumped_key(b"no key"), None);
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        assert_eq!(ensure_memory(1 << 20, Some(1 << 20)), Ok(()));
        let refused = ensure_memory(1 << 20, Some(200 << 10)).unwrap_err();
        let error = refused.of(Path::new("/dev/sdb")).to_string();
        assert!(
            error.contains("1024 MiB") && error.contains("200 MiB"),
            "{error}"
        );
        assert!(available_memory().is_some_and(|all| all > 1000));
    }
}
