//! The undo list of one target as the bytes of a file.

use serde::{Deserialize, Serialize};

use crate::undo::step::{RecordedPath, Undo};

/// The version of the records. Those of another version could be misread, and are set aside: version 1 had a
/// record for each thing and not for each target.
const VERSION: u32 = 2;

/// What there is to undo for a target, in the order in which it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) target: RecordedPath,
    pub(crate) steps: Vec<Undo>,
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

/// Where a record comes from, as far as it can be read.
pub(crate) fn origin_of(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Origin {
        origin: String,
    }
    let Origin { origin } = serde_json::from_slice(bytes).ok()?;
    Some(origin)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use blockmount::{Aead, Encryption, KeySource, MountOptions};
    use proptest::prelude::*;

    use super::*;
    use crate::device::number::DeviceNumber;
    use crate::undo::step::{
        CryptStep, DeviceUse, DirectoryStep, Identity, MountStep, NodeStep, PartitionStep,
        RangeStep,
    };

    /// A list with a step of each kind.
    fn record(path: &[u8]) -> Record {
        let disk = DeviceNumber { major: 7, minor: 3 };
        let path = RecordedPath::from(Path::new(OsStr::from_bytes(path)));
        Record {
            target: path.clone(),
            steps: vec![
                Undo::RemoveRange(RangeStep {
                    backing: disk,
                    sequence: Some(3),
                    start: 512,
                    end: 1024,
                    mark: Some("run:1".to_owned()),
                }),
                Undo::DeletePartition(PartitionStep {
                    disk,
                    number: 2,
                    sequence: None,
                    start: 512,
                    size: 512,
                }),
                Undo::RemoveDirectory(DirectoryStep {
                    path,
                    staged: Some(".staged".to_owned()),
                    id: None,
                    scratch: true,
                }),
                Undo::Unmount(Box::new(MountStep {
                    mount: Identity::Expected {
                        filesystem: "ext4".to_owned(),
                        source: Path::new("/dev/loop3").into(),
                        further_sources: vec![Path::new("/dev/loop4").into()],
                        options: vec!["data=ordered".to_owned()],
                    },
                    device: Some(DeviceUse {
                        locator: None,
                        number: disk,
                        options: MountOptions::read_only(),
                    }),
                    scratch: None,
                    view: None,
                })),
                Undo::RemoveNode(Box::new(NodeStep {
                    path: RecordedPath::from(Path::new("/run/node")),
                    staged: None,
                    id: None,
                    device: DeviceUse {
                        locator: None,
                        number: disk,
                        options: MountOptions::default(),
                    },
                })),
            ],
        }
    }

    #[test]
    fn reads_what_it_writes() {
        for record in [record(b"/run/a"), record(b"/run/\xff\n")] {
            assert_eq!(decode(&encode(&record, "here"), "here"), Ok(record));
        }
    }

    #[test]
    fn an_encryption_comes_back_as_it_was_and_a_record_without_one_is_of_the_first_kind() {
        let record = |encryption: &Encryption| Record {
            target: Path::new("/run/a").into(),
            steps: vec![Undo::CloseCrypt(Box::new(CryptStep {
                backing: DeviceNumber { major: 7, minor: 3 },
                sequence: None,
                encryption: encryption.clone(),
                read_only: false,
                mark: None,
            }))],
        };
        for encryption in [
            Encryption::Ephemeral,
            Encryption::EphemeralWithIntegrity,
            Encryption::EphemeralWithAead(Aead::Aegis128),
            Encryption::Keyed(KeySource::File("data".to_owned())),
        ] {
            let written = record(&encryption);
            let text = encode(&written, "here");
            assert_eq!(decode(&text, "here"), Ok(written), "{encryption:?}");
            let names_it = String::from_utf8(text).unwrap().contains("encryption");
            assert_eq!(names_it, encryption != Encryption::Ephemeral);
        }
    }

    #[test]
    fn refuses_what_it_could_misread() {
        let text = String::from_utf8(encode(&record(b"/run/x"), "here")).unwrap();
        let refused = |text: &str| decode(text.as_bytes(), "here").unwrap_err();
        assert!(refused(&text.replace("here", "there")).contains("another boot"));
        for other in ["1", "3"] {
            let text = text.replace("\"version\":2", &format!("\"version\":{other}"));
            assert!(refused(&text).contains(&format!("version {other}, not 2")));
        }
        let more = text.replace("\"mount\"", "\"mapping\":\"dm\",\"mount\"");
        assert!(refused(&more).contains("mapping"));
        assert!(refused(&text.replace("remove-range", "close-cache")).contains("close-cache"));
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
            let mut bytes = encode(&record(b"/run/x"), "here");
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode(&bytes, "here");
            bytes.truncate(cut.index(bytes.len()));
            let _ = decode(&bytes, "here");
        }
    }
}
