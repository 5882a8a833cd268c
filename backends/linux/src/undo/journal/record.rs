//! One thing there is to undo, as it is written down.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use blockmount::MountOptions;
use serde::{Deserialize, Serialize};

use crate::device::DeviceNumber;
use crate::mount::mounting::MountId;
use crate::mount::target::FileId;

/// The version of the records. Whatever another version says could be misread, and is set aside.
const VERSION: u32 = 1;

/// One thing there is to undo. Each is undone for itself, so that no record has to be in step with
/// another one: a mount says which directories and partitions it needs, not who made them.
///
/// One more kind of thing is one more variant here and one more arm in the recovery; what a mount
/// needs of it is one more optional field of [`MountRecord`]. Unknown fields are refused: a step
/// that is not known cannot be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Record {
    /// A mount. Boxed because it is several times the size of the others.
    Mount(Box<MountRecord>),
    /// A directory that was made for a mount.
    Directory(DirectoryRecord),
    /// A partition that was made known to the kernel.
    Partition(PartitionRecord),
}

/// A mount, and what it keeps others from doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MountRecord {
    pub(crate) target: RecordedPath,
    pub(crate) mount: Identity,
    /// The device that is mounted, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<DeviceUse>,
    /// The partition that is known to the kernel for this mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partition: Option<PartitionId>,
    /// The scratch directory of an overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch: Option<FileId>,
}

/// Which mount it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Identity {
    /// The one with these numbers. A mount that is built detached has them before it is visible.
    Known(MountId),
    /// What `mount(2)` is about to make visible, as the kernel's table will show it; it has no
    /// numbers before.
    Expected {
        filesystem: String,
        source: RecordedPath,
        /// Options that its filesystem was given, each of which the table shows.
        options: Vec<String>,
    },
}

/// A device that is in use, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceUse {
    pub(crate) number: DeviceNumber,
    pub(crate) options: MountOptions,
}

/// A directory. It is made under a name that nobody else uses and then renamed, so that its
/// identity is on record before it can be taken for somebody else's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DirectoryRecord {
    pub(crate) path: RecordedPath,
    /// The name that it has at first, in the same directory.
    pub(crate) staged: String,
    /// Nothing until it is made under its first name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<FileId>,
    /// The target of the overlay that it is a part of the scratch of: once there is that overlay,
    /// the directory stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_of: Option<RecordedPath>,
}

/// A partition by its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PartitionId {
    pub(crate) disk: DeviceNumber,
    pub(crate) number: u32,
}

/// A partition, with what tells it from one of a disk that got the same number later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PartitionRecord {
    pub(crate) id: PartitionId,
    /// The sequence number of the disk, which no other one gets: Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// In bytes.
    pub(crate) start: u64,
    /// In bytes.
    pub(crate) size: u64,
}

/// A path of any bytes: text if it is text, else its bytes as numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Spelled", from = "Spelled")]
pub(crate) struct RecordedPath(pub(crate) PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelled {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&Path> for RecordedPath {
    fn from(path: &Path) -> Self {
        RecordedPath(path.to_owned())
    }
}

impl From<RecordedPath> for Spelled {
    fn from(RecordedPath(path): RecordedPath) -> Self {
        match path.to_str() {
            Some(text) => Spelled::Text(text.to_owned()),
            None => Spelled::Bytes(path.as_os_str().as_bytes().to_owned()),
        }
    }
}

impl From<Spelled> for RecordedPath {
    fn from(spelled: Spelled) -> Self {
        RecordedPath(match spelled {
            Spelled::Text(text) => text.into(),
            Spelled::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

/// What is in a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<R, O> {
    version: u32,
    origin: O,
    record: R,
}

/// The text of a record that is made in `origin`: a boot and a table of mounts.
pub(crate) fn encode(record: &Record, origin: &str) -> Vec<u8> {
    let envelope = Envelope {
        version: VERSION,
        origin,
        record,
    };
    serde_json::to_vec(&envelope).expect("records are plain data with string keys")
}

/// Reads a record; the error says why it cannot be used here.
pub(crate) fn decode(bytes: &[u8], origin: &str) -> Result<Record, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let damaged = |error: serde_json::Error| format!("it is damaged: {error}");
    let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version != VERSION {
        return Err(format!("it is of version {version}, not {VERSION}"));
    }
    let found: Envelope<Record, String> = serde_json::from_slice(bytes).map_err(damaged)?;
    if found.origin != origin {
        return Err("it is about another boot or another namespace of mounts".to_owned());
    }
    Ok(found.record)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use proptest::prelude::*;

    use super::*;

    fn directory(path: &[u8]) -> Record {
        Record::Directory(DirectoryRecord {
            path: Path::new(OsStr::from_bytes(path)).into(),
            staged: ".staged".to_owned(),
            id: None,
            scratch_of: Some(Path::new("/run/c").into()),
        })
    }

    fn mount() -> Record {
        Record::Mount(Box::new(MountRecord {
            target: Path::new("/run/x").into(),
            mount: Identity::Expected {
                filesystem: "ext4".to_owned(),
                source: Path::new("/dev/loop3").into(),
                options: vec!["data=ordered".to_owned()],
            },
            device: Some(DeviceUse {
                number: DeviceNumber { major: 7, minor: 3 },
                options: MountOptions::read_only(),
            }),
            partition: None,
            scratch: None,
        }))
    }

    #[test]
    fn reads_what_it_writes() {
        for record in [directory(b"/run/a"), directory(b"/run/\xff\n"), mount()] {
            assert_eq!(decode(&encode(&record, "here"), "here"), Ok(record));
        }
    }

    #[test]
    fn refuses_what_it_could_misread() {
        let text = String::from_utf8(encode(&mount(), "here")).unwrap();
        let refused = |text: &str| decode(text.as_bytes(), "here").unwrap_err();
        assert!(refused(&text.replace("here", "there")).contains("another boot"));
        assert!(refused(&text.replace("\"version\":1", "\"version\":2")).contains("version 2"));
        let more = text.replace("\"target\"", "\"mapping\":\"dm\",\"target\"");
        assert!(refused(&more).contains("mapping"));
        for cut in 0..text.len() {
            assert!(refused(&text[..cut]).contains("damaged"));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, "here");
        }

        #[test]
        fn never_panics_on_damage(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let mut bytes = encode(&mount(), "here");
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode(&bytes, "here");
            bytes.truncate(cut.index(bytes.len()));
            let _ = decode(&bytes, "here");
        }
    }
}
