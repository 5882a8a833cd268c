//! The bytes of a key, for as long as it takes to give them to the kernel.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockmount::BackendError;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::geteuid;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::errno::{errno_error, is_absent};

/// The rights of everybody but the owner.
const OTHERS: u32 = 0o077;

/// Bytes that are wiped when they are dropped.
pub(super) struct Secret(Vec<u8>);

impl Secret {
    fn blank(length: usize) -> Self {
        Secret(vec![0; length])
    }

    /// So many random bytes.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn random(length: usize) -> Result<Self, BackendError> {
        let mut secret = Secret::blank(length);
        let mut filled = 0;
        while filled < length {
            filled += getrandom(&mut secret.0[filled..], GetRandomFlags::empty())
                .map_err(|errno| errno_error("cannot make a random key", errno))?;
        }
        Ok(secret)
    }

    /// Reads a key of as many bytes as it may have from a file of a directory, neither of which anybody but their owner, the user of this
    /// process, may use. Blocks.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such file; `Invalid` if it has another length, or others could read or change it.
    pub(super) fn read(
        directory: &Path,
        name: &str,
        lengths: RangeInclusive<usize>,
    ) -> Result<Self, BackendError> {
        let at = directory.join(name);
        let at = at.display();
        let trouble = |error: std::io::Error| match is_absent(&error) {
            true => {
                BackendError::not_found(format!("there is no key file {at}")).with_source(error)
            }
            false => errno_error(format!("cannot read key file {at}"), error),
        };
        let private = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let open_directory = private | OFlags::RDONLY | OFlags::DIRECTORY;
        let parent = openat(CWD, directory, open_directory, Mode::empty());
        let parent = File::from(parent.map_err(|errno| trouble(errno.into()))?);
        let flags = private | OFlags::RDONLY | OFlags::NOFOLLOW;
        let file = openat(&parent, name, flags, Mode::empty());
        let mut file = File::from(file.map_err(|errno| trouble(errno.into()))?);
        let own = geteuid().as_raw();
        for (open, what) in [(&parent, "the directory of key file"), (&file, "key file")] {
            let metadata = open.metadata().map_err(trouble)?;
            if metadata.uid() != own || metadata.mode() & OTHERS != 0 {
                return Err(BackendError::invalid(format!(
                    "{what} {at} can be used by others than its owner, or is not that of this process: chmod go= it"
                )));
            }
        }
        let metadata = file.metadata().map_err(trouble)?;
        let found = metadata.len();
        let length = usize::try_from(found).ok();
        let length = length.filter(|length| metadata.is_file() && lengths.contains(length));
        let Some(length) = length else {
            let expected = spelled(&lengths);
            return Err(BackendError::invalid(format!(
                "key file {at} has {found} bytes, and a key has {expected}"
            )));
        };
        let mut secret = Secret::blank(length);
        file.read_exact(&mut secret.0).map_err(trouble)?;
        Ok(secret)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Secret {
    fn from(bytes: Vec<u8>) -> Self {
        Secret(bytes)
    }
}

/// How long a key may be.
pub(super) fn spelled(lengths: &RangeInclusive<usize>) -> String {
    match (lengths.start(), lengths.end()) {
        (least, most) if least == most => least.to_string(),
        (least, most) => format!("{least} to {most}"),
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // What nobody reads any more is written all the same.
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a key of {} bytes", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use blockmount::ErrorKind;

    use super::*;

    #[test]
    fn a_key_file_is_private_and_has_its_length() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let chmod = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
        chmod(at, 0o700).unwrap();
        let file = at.join("volume");
        fs::write(&file, [7; 64]).unwrap();
        chmod(&file, 0o600).unwrap();
        let secret = Secret::read(at, "volume", 64..=64).unwrap();
        assert_eq!(secret.bytes(), [7; 64]);
        assert_eq!(format!("{secret:?}"), "a key of 64 bytes");
        let refused = |name: &str| Secret::read(at, name, 64..=64).unwrap_err();
        assert_eq!(refused("absent").kind(), ErrorKind::NotFound);
        symlink("volume", at.join("link")).unwrap();
        fs::create_dir(at.join("directory")).unwrap();
        chmod(&at.join("directory"), 0o700).unwrap();
        for name in ["link", "directory"] {
            refused(name);
        }
        fs::write(at.join("short"), [7; 63]).unwrap();
        chmod(&at.join("short"), 0o600).unwrap();
        assert!(refused("short").message().contains("63 bytes"));
        for (path, mode) in [(&*file, 0o640), (at, 0o711)] {
            let before = path.metadata().unwrap().permissions();
            chmod(path, mode).unwrap();
            let error = refused("volume");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.message().contains("used by others"), "{error}");
            fs::set_permissions(path, before).unwrap();
        }
        Secret::read(at, "volume", 64..=64).unwrap();
    }
}
