//! Archives in the form that Linux unpacks as its first file system: cpio, "newc".
//!
//! The form is described in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`: for each
//! file a header of `070701` and thirteen numbers of eight hexadecimal digits, the name with a NUL, and the
//! content, each padded to four bytes; at the end a file with the name `TRAILER!!!`.

use std::collections::BTreeSet;

/// An archive in the making. The same calls give the same bytes: there are no times and no owners in it.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    files: u32,
    directories: BTreeSet<String>,
}

/// An archive cannot hold it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path:?} cannot be in an archive: {reason}")]
pub(super) struct Unfit {
    path: String,
    reason: &'static str,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

impl Archive {
    /// Adds a file, and the directories on the way to it.
    ///
    /// # Errors
    ///
    /// [`Unfit`] if the path is not absolute and plain, or the content is 4 GiB or longer.
    pub(super) fn file(&mut self, path: &str, content: &[u8], program: bool) -> Result<(), Unfit> {
        let name = plain(path)?;
        for (end, _) in name.match_indices('/') {
            self.directory_named(&name[..end]);
        }
        let size = u32::try_from(content.len()).map_err(|_| Unfit {
            path: path.to_owned(),
            reason: "it has 4 GiB or more",
        })?;
        self.entry(name, if program { PROGRAM } else { FILE }, size, content);
        Ok(())
    }

    /// Adds an empty directory, and those on the way to it.
    ///
    /// # Errors
    ///
    /// [`Unfit`] if the path is not absolute and plain.
    pub(super) fn directory(&mut self, path: &str) -> Result<(), Unfit> {
        let name = plain(path)?;
        for (end, _) in name.match_indices('/') {
            self.directory_named(&name[..end]);
        }
        self.directory_named(name);
        Ok(())
    }

    /// The bytes of the whole archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 0, &[]);
        self.bytes
    }

    fn directory_named(&mut self, name: &str) {
        if self.directories.insert(name.to_owned()) {
            self.entry(name, DIRECTORY, 0, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, size: u32, content: &[u8]) {
        self.files += 1;
        let name_size = u32::try_from(name.len() + 1).expect("a name was checked to be short");
        let (owner, group, links, time) = (0, 0, 1, 0);
        let numbers = [
            self.files, mode, owner, group, links, time, size, 0, 0, 0, 0, name_size, 0,
        ];
        self.bytes.extend(b"070701");
        for number in numbers {
            self.bytes.extend(format!("{number:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The name of an absolute path in the archive: without the first slash.
fn plain(path: &str) -> Result<&str, Unfit> {
    let unfit = |reason| {
        Err(Unfit {
            path: path.chars().take(128).collect(),
            reason,
        })
    };
    let Some(name) = path.strip_prefix('/') else {
        return unfit("it is not absolute");
    };
    // The kernel takes names of less than PATH_MAX, 4,096 bytes.
    if name.len() >= 4_095 || name.contains('\0') {
        return unfit("it is too long, or has a NUL in it");
    }
    match name.split('/').all(|part| !matches!(part, "" | "." | "..")) {
        true => Ok(name),
        false => unfit("it has empty parts, . or .. in it"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn another_program_unpacks_it() {
        let mut archive = Archive::default();
        archive.file("/init", b"#!", true).unwrap();
        archive.file("/a/b/c", b"12345", false).unwrap();
        archive.file("/a/b/d", b"", false).unwrap();
        archive.directory("/a/e").unwrap();
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);

        let room = tempfile::tempdir().unwrap();
        let mut unpack = Command::new("cpio")
            .args(["--extract", "--quiet"])
            .current_dir(room.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio is installed by tests/setup.sh");
        std::io::Write::write_all(&mut unpack.stdin.take().unwrap(), &bytes).unwrap();
        assert!(unpack.wait().unwrap().success());
        assert_eq!(std::fs::read(room.path().join("a/b/c")).unwrap(), b"12345");
        assert_eq!(std::fs::read(room.path().join("a/b/d")).unwrap(), b"");
        assert!(room.path().join("a/e").is_dir());
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| {
            let metadata = room.path().join(name).metadata().unwrap();
            metadata.permissions().mode() & 0o7777
        };
        assert_eq!(
            (mode("init"), mode("a/b/c"), mode("a")),
            (0o755, 0o644, 0o755)
        );
    }

    #[test]
    fn a_directory_is_in_it_once() {
        let mut archive = Archive::default();
        archive.file("/a/b", b"", false).unwrap();
        archive.file("/a/c", b"", false).unwrap();
        archive.directory("/a").unwrap();
        assert_eq!(archive.files, 3);
    }

    #[test]
    fn paths_that_are_not_plain_are_refused() {
        for path in ["", "a", "/", "//a", "/a/", "/a/../b", "/./a", "/a\0b"] {
            assert!(
                Archive::default().file(path, b"", false).is_err(),
                "{path:?}"
            );
        }
        let long = format!("/{}", "a".repeat(4_096));
        let error = Archive::default().directory(&long).unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
    }
}
