//! Removing directories of a run, and nothing else: by descriptor, so that no link and no renamed directory on the way
//! leads anywhere else.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, statat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::is_root;

/// What is gone needs no removal.
pub(super) fn absent_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// More than a run has to write down, in bytes.
const LONGEST_FILE: u64 = 16 << 20;

/// Opens a file of a run. What is no regular file is refused: a pipe would keep us waiting, and a link lead elsewhere.
pub(crate) fn open_file(path: &Path, options: &mut fs::OpenOptions) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other(format!(
            "{} is no regular file, so no run has made it",
            path.display()
        ))),
    }
}

/// Reads a file of a run.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = open_file(path, File::options().read(true))?;
    let mut bytes = Vec::new();
    file.take(LONGEST_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a directory; a link in its place is refused.
pub(crate) fn open_directory(path: &Path) -> io::Result<File> {
    Ok(openat(CWD, path, DIRECTORY, Mode::empty())?.into())
}

const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Refuses a directory that others than this user (mostly root) may have filled, or may look into.
pub(crate) fn ensure_private(directory: &File, path: &Path) -> io::Result<()> {
    let found = fstat(directory)?;
    match found.st_uid == geteuid().as_raw() && found.st_mode & 0o077 == 0 {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{} is not {} alone, so it is no directory of a run",
            path.display(),
            if is_root() { "root's" } else { "this user's" },
        ))),
    }
}

/// Removes a private directory of root's with the directories in it, and with files if asked to. Never leaves the
/// filesystem that the directory is on, and follows no links.
pub(super) fn remove_directory(path: &Path, with_files: bool) -> io::Result<()> {
    let directory = open_directory(path)?;
    ensure_private(&directory, path)?;
    remove_below(&directory, path, with_files)?;
    drop(directory);
    // Only an empty one goes, whatever it is by now.
    std::fs::remove_dir(path)
}

/// Removes the directories in a private directory of root's, which may have nothing but directories in them.
pub(super) fn remove_directories_in(path: &Path) -> io::Result<()> {
    let directory = open_directory(path)?;
    ensure_private(&directory, path)?;
    let device = fstat(&directory)?.st_dev;
    for (name, found) in entries(&directory)? {
        if is_directory(&found) {
            absent_is_done(remove_entry(&directory, path, &name, device, false))?;
        }
    }
    Ok(())
}

/// Removes a directory in a private directory of root's, with all that is in it.
pub(super) fn remove_in(path: &Path, name: &str) -> io::Result<()> {
    let directory = open_directory(path)?;
    ensure_private(&directory, path)?;
    let device = fstat(&directory)?.st_dev;
    remove_entry(&directory, path, OsStr::new(name), device, true)
}

/// Removes an empty directory that root has made at a path of the user's. A path that leads over a link is refused.
pub(crate) fn remove_empty(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = openat2(
        CWD,
        parent,
        DIRECTORY,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )?;
    let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if found.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("it is another user's"));
    }
    Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?)
}

fn remove_below(directory: &File, path: &Path, with_files: bool) -> io::Result<()> {
    let device = fstat(directory)?.st_dev;
    for (name, _) in entries(directory)? {
        remove_entry(directory, path, &name, device, with_files)?;
    }
    Ok(())
}

fn remove_entry(
    parent: &File,
    path: &Path,
    name: &OsStr,
    device: u64,
    with_files: bool,
) -> io::Result<()> {
    let path = path.join(name);
    let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if found.st_dev != device {
        let what = format!("{} is another filesystem", path.display());
        return Err(io::Error::other(what));
    }
    if is_directory(&found) {
        let directory = File::from(openat(parent, name, DIRECTORY, Mode::empty())?);
        remove_below(&directory, &path, with_files)?;
        return Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?);
    }
    match with_files {
        true => Ok(unlinkat(parent, name, AtFlags::empty())?),
        false => Err(io::Error::other(format!("{} is not ours", path.display()))),
    }
}

/// What is in a directory; what vanishes meanwhile is left out.
fn entries(directory: &File) -> io::Result<Vec<(std::ffi::OsString, Stat)>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => entries.push((name.to_owned(), found)),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(entries)
}

fn is_directory(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Directory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_u13_what_is_no_regular_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "text").unwrap();
        let (mode, fifo) = (Mode::from_raw_mode(0o600), FileType::Fifo);
        rustix::fs::mknodat(CWD, path("fifo"), fifo, mode, 0).unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        fs::create_dir(path("directory")).unwrap();
        assert_eq!(read(&path("file")).unwrap(), b"text");
        for name in ["fifo", "link", "directory"] {
            read(&path(name)).unwrap_err();
        }
        assert!(read(&path("absent")).unwrap_err().kind() == io::ErrorKind::NotFound);
    }

    #[test]
    fn root_files_are_removed_only_where_asked_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, tree) = (dir.path().join("kept"), dir.path().join("tree"));
        super::super::make_private(&tree).unwrap();
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(&kept, "x").unwrap();
        std::os::unix::fs::symlink(dir.path(), tree.join("a/link")).unwrap();
        assert!(remove_directory(&tree, false).is_err());
        assert!(tree.join("a/link").symlink_metadata().is_ok());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&tree, &link).unwrap();
        assert!(remove_directory(&link, true).is_err());
        remove_directory(&tree, true).unwrap();
        assert!(!tree.exists() && kept.exists());
    }

    #[test]
    fn root_x01_only_a_private_directory_of_roots_is_removed() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        super::super::make_private(&tree).unwrap();
        fs::write(tree.join("kept"), "x").unwrap();
        for (owner, mode) in [(0, 0o755), (0, 0o770), (65_534, 0o700)] {
            std::os::unix::fs::chown(&tree, Some(owner), None).unwrap();
            fs::set_permissions(&tree, fs::Permissions::from_mode(mode)).unwrap();
            let error = remove_directory(&tree, true).unwrap_err();
            assert!(error.to_string().contains("not root's alone"), "{error}");
            assert!(tree.join("kept").exists());
        }
    }

    #[test]
    fn root_x01_an_empty_directory_is_not_reached_over_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let victim = dir.join("real/victim");
        fs::create_dir_all(&victim).unwrap();
        std::os::unix::fs::symlink(dir.join("real"), dir.join("link")).unwrap();
        remove_empty(&dir.join("link/victim")).unwrap_err();
        assert!(victim.exists());
        std::os::unix::fs::chown(&victim, Some(65_534), None).unwrap();
        remove_empty(&victim).unwrap_err();
        std::os::unix::fs::chown(&victim, Some(0), None).unwrap();
        remove_empty(&victim).unwrap();
        assert!(!victim.exists());
    }
}
