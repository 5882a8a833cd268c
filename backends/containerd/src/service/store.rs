//! The records of activations, a file for each.
//!
//! They belong beside the manager's journal, in `/run`: nothing of them outlives a boot. A file is replaced by renaming, so that a
//! process that is killed leaves the old one or the new one.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use blockmount::{BackendError, blocking};

use super::record::{Info, Progress, Record};

/// The longest record that is read, in bytes: a list with all its words, several times over.
const LONGEST: u64 = 16 << 20;
/// The longest one that is written: what is added as an activation ends is far less than the rest.
const LONGEST_WRITTEN: usize = LONGEST as usize / 2;

#[derive(Debug, Clone)]
pub(super) struct Store(PathBuf);

impl Store {
    /// Opens the directory (0700), which is made where it is missing. Blocks.
    pub(super) fn open(directory: &Path) -> Result<Self, BackendError> {
        let made = DirBuilder::new().mode(0o700).create(directory);
        match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(failed("make", directory, error))
            }
            _ => Ok(Store(directory.to_owned())),
        }
    }

    /// All records. One that cannot be read is set aside under another name. Blocks.
    pub(super) fn load(&self) -> Result<Vec<Record>, BackendError> {
        let unread = |error| failed("read", &self.0, error);
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(unread)? {
            let path = entry.map_err(unread)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) if path == self.path(record.id) => records.push(record),
                Ok(_) => set_aside(&path, "it has the name of another"),
                Err(error) => set_aside(&path, &error.to_string()),
            }
        }
        records.sort_by_key(|record| record.id);
        Ok(records)
    }

    /// Writes a record, new or again. `Invalid` if it would not be read again.
    pub(super) async fn put(&self, record: &Record) -> Result<(), BackendError> {
        let text = serde_json::to_vec(record);
        let text = text.map_err(|error| BackendError::invalid(error.to_string()))?;
        if text.len() > LONGEST_WRITTEN {
            return Err(BackendError::invalid(format!(
                "the record of an activation has at most {LONGEST_WRITTEN} bytes, and this one would have {}: give fewer or shorter mounts, options or labels",
                text.len()
            )));
        }
        let path = self.path(record.id);
        blocking(move || replace(&path, &text).map_err(|error| failed("write", &path, error))).await
    }

    /// Removes a record. One that cannot be removed is of what is gone, and found out after a restart.
    pub(super) async fn remove(&self, id: u64) {
        let path = self.path(id);
        let removed = blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path, error))
            }
            _ => Ok(()),
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "the record of an activation that is gone stays");
        }
    }

    fn path(&self, id: u64) -> PathBuf {
        self.0.join(format!("{id}.json"))
    }
}

/// What is activated as the records in a directory say, for who has to tell that it is lost. Blocks.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn recorded(directory: &Path) -> Result<Vec<Info>, BackendError> {
    let records = Store::open(directory)?.load()?.into_iter();
    let up = records.filter(|record| record.progress != Progress::Begun);
    Ok(up.map(|record| record.info).collect())
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options
        .open(&draft)
        .and_then(|mut file| file.write_all(text))
        .and_then(|()| fs::rename(&draft, path));
    written.inspect_err(|_| drop(fs::remove_file(&draft)))
}

fn read(path: &Path) -> io::Result<Record> {
    let length = path.symlink_metadata()?.len();
    if length > LONGEST {
        return Err(io::Error::other(format!("it has {length} bytes")));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn set_aside(path: &Path, why: &str) {
    let aside = path.with_extension("damaged");
    let renamed = fs::rename(path, &aside);
    let (path, aside) = (path.display(), aside.display());
    match renamed {
        Ok(()) => {
            tracing::warn!(%path, %aside, why, "the record of an activation makes no sense; it was set aside, and what it held is released")
        }
        Err(error) => {
            tracing::warn!(%path, why, %error, "the record of an activation makes no sense, and cannot be set aside")
        }
    }
}

fn failed(doing: &str, path: &Path, error: io::Error) -> BackendError {
    BackendError::other(format!("cannot {doing} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn records_are_replaced_and_what_is_damaged_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("activations");
        let store = Store::open(&path).unwrap();
        let record = |id, progress| Record {
            id,
            progress,
            temporary: false,
            is_writable: false,
            info: Info {
                namespace: "n".to_owned(),
                name: id.to_string(),
                active: Vec::new(),
                system: Vec::new(),
                labels: [("k".to_owned(), "v".to_owned())].into(),
            },
            holders: vec![blockmount::HolderName::new("h").unwrap()],
        };
        for (id, progress) in [
            (7, Progress::Begun),
            (7, Progress::Up),
            (9, Progress::Ending),
        ] {
            store.put(&record(id, progress)).await.unwrap();
        }
        fs::write(path.join("10.json"), "{\"id\":10").unwrap();
        fs::copy(path.join("7.json"), path.join("11.json")).unwrap();
        let expected = [record(7, Progress::Up), record(9, Progress::Ending)];
        assert_eq!(Store::open(&path).unwrap().load().unwrap(), expected);
        assert!(path.join("10.damaged").exists() && path.join("11.damaged").exists());
        // What would be set aside at the next start is not written.
        let mut large = record(9, Progress::Up);
        large
            .info
            .labels
            .insert("k".to_owned(), "v".repeat(LONGEST_WRITTEN));
        let error = store.put(&large).await.unwrap_err();
        assert_eq!(error.kind(), blockmount::ErrorKind::Invalid);
        assert_eq!(store.load().unwrap(), expected);
        store.put(&record(12, Progress::Begun)).await.unwrap();
        let names = recorded(&path).unwrap().into_iter().map(|info| info.name);
        assert_eq!(names.collect::<Vec<_>>(), ["7", "9"]);
        store.remove(12).await;
        store.remove(7).await;
        store.remove(7).await;
        assert_eq!(store.load().unwrap(), expected[1..]);
    }
}
