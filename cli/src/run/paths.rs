//! Where a run has its files, and what it notes of those that are elsewhere.

use std::fs;
use std::path::{Path, PathBuf};

use blockmount_linux::mountinfo;
use serde::{Deserialize, Serialize};

use super::files::{self, absent_is_done, remove_directories_in, remove_directory, remove_in};
use super::{ENGINE, KEYS, MARK, RECORDS, STATE, WORK, runs};
use crate::failure::{Context, Failure};

/// Where a run has its files.
#[derive(Debug, Clone)]
pub(crate) struct RunPaths {
    pub(crate) id: String,
    /// The run's directory.
    pub(crate) dir: PathBuf,
    /// The directory for image files.
    pub(crate) work: PathBuf,
}

/// A line of the journal: what is going to be made that the kernel's tables do not show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Entry {
    /// A directory that was not there, and is made for a target.
    Directory(Name),
}

/// A path, readable where it is text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Name {
    Text(String),
    Other(PathBytes),
}

/// A path that is no text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PathBytes {
    bytes: Vec<u8>,
}

impl Name {
    pub(super) fn of(path: &Path) -> Self {
        use std::os::unix::ffi::OsStrExt;
        match path.to_str() {
            Some(text) => Name::Text(text.to_owned()),
            None => Name::Other(PathBytes {
                bytes: path.as_os_str().as_bytes().to_owned(),
            }),
        }
    }

    pub(crate) fn into_path(self) -> PathBuf {
        use std::os::unix::ffi::OsStringExt;
        match self {
            Name::Text(text) => text.into(),
            Name::Other(other) => std::ffi::OsString::from_vec(other.bytes).into(),
        }
    }
}

impl RunPaths {
    pub(crate) fn of(id: &str) -> Self {
        RunPaths {
            id: id.to_owned(),
            dir: runs().join(id),
            work: Path::new(WORK).join(format!("blockmount-{id}")),
        }
    }

    /// Whether the directory for image files is there, and this user's alone.
    pub(crate) fn has_private_work(&self) -> bool {
        let opened = files::open_directory(&self.work);
        opened.is_ok_and(|directory| files::ensure_private(&directory, &self.work).is_ok())
    }

    /// What loop devices and overlays of the run carry.
    pub(crate) fn mark(&self) -> String {
        format!("{MARK}{}", self.id)
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// Where a living run says how it is doing.
    pub(crate) fn status_socket(&self) -> PathBuf {
        self.dir.join("status")
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// What the journal says. What a last line that was cut off names was never made.
    pub(crate) fn read_journal(&self) -> Vec<Entry> {
        let text = files::read(&self.journal()).unwrap_or_default();
        String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Removes both directories, unless something is mounted below them. What is gone is removed.
    ///
    /// The work directory has the run's image files; the run's own only empty directories
    /// besides the journal and the lock. Anything else stays, with an error.
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        self.remove_images()?;
        let what = || format!("cannot remove {}", self.dir.display());
        // Journal and lock go last: with them, what could not be removed is found again.
        absent_is_done(remove_directories_in(&self.dir)).context(what)?;
        absent_is_done(fs::remove_file(self.journal())).context(what)?;
        absent_is_done(fs::remove_file(self.lock())).context(what)?;
        absent_is_done(remove_directory(&self.dir, false)).context(what)
    }

    /// Removes the name of the run and its image files, unless something is mounted below its directories.
    pub(crate) fn remove_images(&self) -> Result<(), Failure> {
        self.refuse_mounted(&self.dir)?;
        self.refuse_mounted(&self.work)?;
        // A run with a name keeps its image files, so the name goes first, and its last sign at the end.
        let what = || {
            format!(
                "cannot remove the name of the run in {}",
                self.dir.display()
            )
        };
        for name in [KEYS, STATE, ENGINE, RECORDS] {
            absent_is_done(remove_in(&self.dir, name)).context(what)?;
        }
        for file in [
            self.remembered_draft(),
            self.remembered_file(),
            self.unheld_file(),
            self.lost_file(),
            self.status_socket(),
        ] {
            absent_is_done(fs::remove_file(file)).context(what)?;
        }
        absent_is_done(remove_directory(&self.work, true))
            .context(|| format!("cannot remove {}", self.work.display()))
    }

    fn refuse_mounted(&self, dir: &Path) -> Result<(), Failure> {
        let mounts = mountinfo::read().context(|| "cannot read the table of mounts".to_owned())?;
        match mounts
            .iter()
            .find(|mount| mount.mount_point.starts_with(dir))
        {
            None => Ok(()),
            Some(mount) => {
                let at = mount.mount_point.display();
                Err(Failure::new(format!(
                    "{} stays: something is mounted at {at}",
                    dir.display()
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_journal_reads_back_any_path() {
        for bytes in [&b"/a b\n\"c"[..], b"/\xff\xfe", b"/"] {
            let path = Path::new(std::ffi::OsStr::from_bytes(bytes));
            let line = serde_json::to_string(&Entry::Directory(Name::of(path))).unwrap();
            assert!(!line.contains('\n'));
            let Entry::Directory(name) = serde_json::from_str(&line).unwrap();
            assert_eq!(name.into_path(), path);
        }
    }
}
