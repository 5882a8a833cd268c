//! The file beside a sealed image, as containerd writes and reads it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::from_hexadecimal;
use crate::error::VerityError;

/// The longest file that is read: many times that of the longest digest.
const LONGEST: u64 = 64 << 10;

/// What vouches for a sealed image: `IMAGE.dmverity`, JSON.
///
/// Everything else is in the superblock of the image. Fields that are not known here are skipped, as containerd does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The root digest, as hexadecimal digits.
    #[serde(rename = "roothash")]
    pub root_digest: String,
    /// Where the superblock is in the image, in bytes.
    #[serde(rename = "hashoffset")]
    pub hash_offset: u64,
}

impl Metadata {
    /// The path of the file that belongs to an image.
    pub fn path_of(image: &Path) -> PathBuf {
        let mut name = OsString::from(image);
        name.push(".dmverity");
        name.into()
    }

    /// Reads such a file.
    ///
    /// # Errors
    ///
    /// [`VerityError::Io`]; [`VerityError::Invalid`] if it is none, or its digest is none.
    pub fn read(path: &Path) -> Result<Self, VerityError> {
        let trouble = VerityError::io("read a .dmverity file");
        let file = fs::File::open(path).map_err(&trouble)?;
        let mut bytes = Vec::new();
        file.take(LONGEST)
            .read_to_end(&mut bytes)
            .map_err(&trouble)?;
        Self::parse(&bytes)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    ///
    /// [`VerityError::Invalid`] if it is none, or its digest is none.
    pub fn parse(text: &[u8]) -> Result<Self, VerityError> {
        let metadata: Metadata = serde_json::from_slice(text).map_err(|error| {
            VerityError::invalid(
                format!("a .dmverity file ({error})"),
                "it is JSON with roothash and hashoffset",
            )
        })?;
        let digest = from_hexadecimal(&metadata.root_digest);
        if digest.is_none_or(|digest| digest.is_empty()) {
            let what = format!("root digest {:?}", metadata.root_digest);
            return Err(VerityError::invalid(what, "it is a hexadecimal number"));
        }
        Ok(metadata)
    }

    /// Writes a new file, whole or not at all. Blocks.
    ///
    /// # Errors
    ///
    /// [`VerityError::Io`], of the kind `AlreadyExists` if there is one.
    pub fn write_new(&self, path: &Path) -> Result<(), VerityError> {
        self.write(path)
            .map_err(VerityError::io("write a .dmverity file"))
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        if path.symlink_metadata().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut draft = OsString::from(path);
        draft.push(format!(".{}.new", std::process::id()));
        let draft = PathBuf::from(draft);
        let mut file = fs::File::create_new(&draft)?;
        let text = serde_json::to_vec_pretty(self)?;
        let written = file
            .write_all(&text)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&draft, path));
        // What is left of a file that could not be written is worth nothing.
        written.inspect_err(|_| drop(fs::remove_file(&draft)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `json.MarshalIndent` of Go writes it.
    const OF_CONTAINERD: &str = "{\n  \"roothash\": \"b576fb772077f697eca5a96e8f6f0bc3cbc1d408e53e7c8b6da7d28d91146e06\",\n  \"hashoffset\": 4489216\n}";

    #[test]
    fn containerds_files_are_read_and_written_as_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let path = Metadata::path_of(&directory.path().join("layer.erofs"));
        assert!(path.ends_with("layer.erofs.dmverity"));
        let read = Metadata::parse(OF_CONTAINERD.as_bytes()).unwrap();
        assert_eq!(read.hash_offset, 4_489_216);
        read.write_new(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), OF_CONTAINERD);
        assert_eq!(Metadata::read(&path).unwrap(), read);
        let again = read.write_new(&path).unwrap_err();
        assert!(
            matches!(again, VerityError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_such_file_is_refused() {
        for text in [
            "",
            "{}",
            r#"{"roothash": "", "hashoffset": 1}"#,
            r#"{"roothash": "abc", "hashoffset": 1}"#,
            r#"{"roothash": "xy", "hashoffset": 1}"#,
            r#"{"roothash": "ab", "hashoffset": -1}"#,
            r#"{"roothash": "ab"}"#,
        ] {
            let refused = Metadata::parse(text.as_bytes()).unwrap_err();
            assert!(
                matches!(refused, VerityError::Invalid { .. }),
                "{text}: {refused}"
            );
        }
    }
}
