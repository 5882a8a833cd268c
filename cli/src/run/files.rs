//! Removing directories of a run, and nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What is gone needs no removal.
pub(super) fn absent_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a directory with the directories in it, and with files if asked to. Never leaves the filesystem
/// that the directory is on, and follows no links.
pub(super) fn remove_directory(path: &Path, with_files: bool) -> io::Result<()> {
    let metadata = path.symlink_metadata()?;
    if !metadata.is_dir() {
        return Err(io::Error::other(format!(
            "{} is not a directory",
            path.display()
        )));
    }
    remove_below(path, metadata.dev(), with_files)?;
    fs::remove_dir(path)
}

/// Removes the directories in a directory, which may have nothing but directories in them.
pub(super) fn remove_directories_in(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            absent_is_done(remove_directory(&entry.path(), false))?;
        }
    }
    Ok(())
}

fn remove_below(directory: &Path, device: u64, with_files: bool) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = path.symlink_metadata()?;
        if metadata.dev() != device {
            return Err(io::Error::other(format!(
                "{} is another filesystem",
                path.display()
            )));
        }
        if metadata.is_dir() {
            remove_below(&path, device, with_files)?;
            fs::remove_dir(&path)?;
        } else if with_files {
            fs::remove_file(&path)?;
        } else {
            return Err(io::Error::other(format!("{} is not ours", path.display())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_removed_only_where_asked_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, tree) = (dir.path().join("kept"), dir.path().join("tree"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(&kept, "x").unwrap();
        std::os::unix::fs::symlink(dir.path(), tree.join("a/link")).unwrap();
        assert!(remove_directory(&tree, false).is_err());
        assert!(tree.join("a/link").symlink_metadata().is_ok());
        remove_directory(&tree, true).unwrap();
        assert!(!tree.exists() && kept.exists());
    }
}
