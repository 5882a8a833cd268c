//! Keys of encrypted layers: by their descriptions in a keyring of the guest, or in files of this machine.
//!
//! A key in a file is put where the guest looks for it, in memory, while its layers are mounted. What is asked of the guest has
//! only its name.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blockmount::KeySource;
use blockmount_checker::tree::digest_bytes;
use rustix::fs::OFlags;

use crate::args::Layer;
use crate::failure::{Context, Failure};

/// More than any key or passphrase has, in bytes.
const LONGEST: u64 = 4 << 10;

/// Where the key or the passphrase of a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeyFrom {
    /// In the keyring of the guest's root, by its description.
    Keyring(String),
    /// In a file of this machine.
    File(PathBuf),
}

/// `DESCRIPTION`, which has a colon, or `file=FILE`.
impl FromStr for KeyFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("file=") {
            Some(path) if !path.is_empty() => Ok(KeyFrom::File(path.into())),
            None if text.contains(':') => Ok(KeyFrom::Keyring(text.to_owned())),
            _ => Err(
                "it is file=FILE, or the description of a key in a keyring, such as volumes:data"
                    .to_owned(),
            ),
        }
    }
}

impl KeyFrom {
    /// What the guest is told of it.
    pub(crate) fn source(&self) -> KeySource {
        match self {
            KeyFrom::Keyring(description) => KeySource::Keyring(description.clone()),
            KeyFrom::File(path) => KeySource::File(name_of(path)),
        }
    }

    /// The same, with a path that starts at a directory.
    pub(crate) fn within(&self, directory: &Path) -> Self {
        match self {
            KeyFrom::Keyring(description) => KeyFrom::Keyring(description.clone()),
            KeyFrom::File(path) => KeyFrom::File(directory.join(path)),
        }
    }
}

/// A name for the key of a file: the same for the same file, and one that a guest takes.
fn name_of(path: &Path) -> String {
    let digest = digest_bytes(path.as_os_str().as_bytes());
    let digits = digest.iter().take(16).map(|byte| format!("{byte:02x}"));
    digits.collect()
}

/// A key that was read from a file.
pub(crate) struct KeyFile {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

impl fmt::Debug for KeyFile {
    /// Only its name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Reads the keys of layers that are in files, each once. Blocks.
pub(crate) fn read(layers: &[Layer]) -> Result<Vec<KeyFile>, Failure> {
    let mut keys: Vec<KeyFile> = Vec::new();
    let given = layers.iter().flat_map(|layer| [&layer.key, &layer.luks]);
    for from in given.flatten() {
        let KeyFrom::File(path) = from else { continue };
        let name = name_of(path);
        if keys.iter().any(|known| known.name == name) {
            continue;
        }
        let bytes = read_file(path).context(|| format!("cannot read key {}", path.display()))?;
        keys.push(KeyFile { name, bytes });
    }
    Ok(keys)
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe would keep us waiting.
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 <= LONGEST {
        true => Ok(bytes),
        false => Err(io::Error::other("it is longer than any key, 4 KiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_in_a_keyring_or_in_a_file() {
        let parsed = |text: &str| text.parse::<KeyFrom>();
        let keyring = KeyFrom::Keyring("volumes:data".to_owned());
        assert_eq!(parsed("volumes:data"), Ok(keyring.clone()));
        assert_eq!(
            keyring.within(Path::new("/x")).source(),
            KeySource::Keyring("volumes:data".to_owned())
        );
        let file = parsed("file=keys/a:b").unwrap();
        assert_eq!(file, KeyFrom::File("keys/a:b".into()));
        assert_eq!(
            file.within(Path::new("/x")),
            KeyFrom::File("/x/keys/a:b".into())
        );
        for wrong in ["", "data", "file=", "data.key"] {
            assert!(parsed(wrong).unwrap_err().contains("file=FILE"), "{wrong}");
        }
    }

    #[test]
    fn each_file_is_read_once_and_its_name_is_one_that_a_guest_takes() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "o t/h\u{e9}r"].map(|name| dir.path().join(name));
        std::fs::create_dir(dir.path().join("o t")).unwrap();
        std::fs::write(&one, "1").unwrap();
        std::fs::write(&other, "2").unwrap();
        let layer = |path: &Path| Layer {
            luks: Some(KeyFrom::File(path.to_owned())),
            ..Layer::of("image")
        };
        let keys = read(&[layer(&one), layer(&other), layer(&one)]).unwrap();
        let bytes: Vec<&[u8]> = keys.iter().map(|key| &*key.bytes).collect();
        assert_eq!(bytes, [b"1", b"2"]);
        for (path, key) in [(&one, &keys[0]), (&other, &keys[1])] {
            let source = KeyFrom::File(path.clone()).source();
            assert_eq!(source, KeySource::File(key.name.clone()));
            let encryption = blockmount::Encryption::Keyed(source);
            let options = blockmount::MountOptions::builder().encryption(encryption);
            options.build().unwrap();
            assert!(!format!("{key:?}").contains("bytes"));
        }
        std::fs::write(&one, vec![7; 5000]).unwrap();
        for wrong in [&*one, dir.path(), &dir.path().join("absent")] {
            let failure = read(&[layer(wrong)]).unwrap_err().to_string();
            assert!(failure.contains(wrong.to_str().unwrap()), "{failure}");
        }
    }
}
