//! Where something may be mounted: checked component by component, made where it is missing.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockmount::BackendError;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Statx, StatxFlags, fstat,
    makedev, openat, openat2, statx,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::errno::errno_error;

/// The kernel's `PATH_MAX` without the NUL, in bytes.
const LONGEST: usize = 4095;
/// Where a mount would cover what the system runs on: these, and everything below them.
const SYSTEM: [&str; 9] = [
    "proc", "sys", "dev", "etc", "usr", "bin", "sbin", "lib", "boot",
];
/// Where a mount would cover what others use: exactly these.
const SHARED: [&str; 9] = [
    "var", "home", "root", "run", "tmp", "opt", "srv", "mnt", "media",
];

/// How a directory is opened that is only a place in the tree.
const FOUND: OFlags = OFlags::PATH
    .union(OFlags::NOFOLLOW)
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// A path at which something could be mounted, as far as its text tells.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    path: PathBuf,
    /// What was found since then counts for it.
    asked: Instant,
}

/// The names in an absolute and plain path; there is at least one.
fn names(path: &Path) -> Result<Vec<&[u8]>, BackendError> {
    let bytes = path.as_os_str().as_bytes();
    if !bytes.starts_with(b"/") {
        return refused(path, "the path is not absolute");
    }
    if bytes.len() > LONGEST {
        return Err(BackendError::invalid(
            "cannot mount at a path longer than 4,095 bytes",
        ));
    }
    if bytes.contains(&0) {
        return refused(path, "the path has a NUL byte");
    }
    let names: Vec<&[u8]> = bytes
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
        .collect();
    if names.iter().any(|name| matches!(*name, b"." | b"..")) {
        return refused(path, "the path has a '.' or '..' component");
    }
    match names.is_empty() {
        true => refused(path, "it is the root directory"),
        false => Ok(names),
    }
}

fn refused<T>(path: &Path, why: &str) -> Result<T, BackendError> {
    Err(BackendError::invalid(format!(
        "cannot mount at {}: {why}",
        path.display()
    )))
}

impl Target {
    /// Checks the text of a path: absolute, below `allowed` if that names any directories,
    /// not a directory of the system.
    pub(crate) fn parse(path: &Path, allowed: &[PathBuf]) -> Result<Self, BackendError> {
        let names = names(path)?;
        // The dynamic linker's directories differ by machine: lib64, lib32, libx32.
        let is_library = |first: &str| {
            first.starts_with("lib") && first[3..].chars().all(|c| c.is_ascii_digit() || c == 'x')
        };
        let is_systems = |first: &str| {
            SYSTEM.contains(&first)
                || is_library(first)
                || (names.len() == 1 && SHARED.contains(&first))
        };
        let first = names
            .first()
            .and_then(|name| std::str::from_utf8(name).ok());
        match first {
            Some(first) if is_systems(first) => refused(path, "it is a directory of the system"),
            _ => Self::within(names, allowed),
        }
    }

    /// A directory that is not mounted on itself: one that was made on the way to a target, or a scratch.
    pub(crate) fn directory(path: &Path) -> Result<Self, BackendError> {
        Self::within(names(path)?, &[])
    }

    fn within(names: Vec<&[u8]>, allowed: &[PathBuf]) -> Result<Self, BackendError> {
        let mut path = PathBuf::from("/");
        path.extend(names.into_iter().map(OsStr::from_bytes));
        if allowed.is_empty()
            || allowed
                .iter()
                .any(|root| path.starts_with(root) && path != *root)
        {
            let asked = Instant::now();
            return Ok(Target { path, asked });
        }
        let allowed: Vec<String> = allowed
            .iter()
            .map(|root| root.display().to_string())
            .collect();
        Err(BackendError::invalid(format!(
            "cannot mount at {}: targets must be below {}",
            path.display(),
            allowed.join(" or "),
        )))
    }

    /// The path without redundant slashes.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same as a key: two targets are one exactly if these are equal.
    pub(crate) fn key(&self) -> &OsStr {
        self.path.as_os_str()
    }

    /// Since when it is asked for.
    pub(crate) fn asked(&self) -> Instant {
        self.asked
    }

    /// Looks at the target without changing anything: it must be free to be mounted on, or missing.
    pub(crate) fn check_free(&self) -> Result<(), BackendError> {
        match self.find()? {
            None => Ok(()),
            Some(found) => found.check_free(self.path()),
        }
    }

    /// Whether something is mounted here.
    pub(crate) fn is_mount_point(&self) -> Result<bool, BackendError> {
        self.find()?
            .map_or(Ok(false), |found| found.is_mount_point())
    }

    /// Finds the target as it is; nothing if it does not exist.
    pub(crate) fn find(&self) -> Result<Option<MountPoint>, BackendError> {
        match self.find_in_one_step() {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            // A kernel before 5.6, a filter of system calls, or something that the walk tells better.
            Err(_) => self.walk(&mut |parent, name, path| open_below(parent, name, path)),
        }
    }

    /// As a walk finds it: through no symbolic link, and all of it a directory.
    fn find_in_one_step(&self) -> rustix::io::Result<MountPoint> {
        let name = self.path.file_name().ok_or(Errno::INVAL)?;
        let parent = self.open_parent()?;
        let directory = openat(&parent, name, FOUND, Mode::empty())?;
        Ok(MountPoint {
            parent,
            name: name.to_owned(),
            directory,
        })
    }

    /// The directory that it is in, as a walk finds it.
    pub(crate) fn open_parent(&self) -> rustix::io::Result<OwnedFd> {
        let above = self.path.parent().ok_or(Errno::INVAL)?;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(CWD, above, FOUND, Mode::empty(), resolve)
    }

    /// Goes down from the root, one component at a time, through no symbolic link. `open` opens each, and may make it;
    /// one that is missing ends the walk.
    pub(crate) fn walk(&self, open: &mut Open<'_>) -> Result<Option<MountPoint>, BackendError> {
        let mut at = PathBuf::from("/");
        let mut parent =
            open_path(CWD, OsStr::new("/")).map_err(|errno| unreachable_component(&at, errno))?;
        let mut names = self.path.iter().skip(1).peekable();
        while let Some(name) = names.next() {
            at.push(name);
            let Some(directory) = open(&parent, name, &at)? else {
                return Ok(None);
            };
            check_directory(&directory, &at, self.path())?;
            if names.peek().is_none() {
                let name = name.to_owned();
                return Ok(Some(MountPoint {
                    parent,
                    name,
                    directory,
                }));
            }
            parent = directory;
        }
        Ok(None)
    }
}

/// Opens a component of a path in its directory; nothing if it is missing.
type Open<'a> = dyn FnMut(&OwnedFd, &OsStr, &Path) -> Result<Option<OwnedFd>, BackendError> + 'a;

/// Opens what has a name in a directory, not following a link; nothing if it is missing.
pub(crate) fn open_below(
    directory: &OwnedFd,
    name: &OsStr,
    path: &Path,
) -> Result<Option<OwnedFd>, BackendError> {
    match open_path(directory, name) {
        Ok(below) => Ok(Some(below)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(unreachable_component(path, errno)),
    }
}

fn unreachable_component(path: &Path, errno: Errno) -> BackendError {
    errno_error(format!("cannot reach directory {}", path.display()), errno)
}

fn check_directory(fd: &OwnedFd, at: &Path, target: &Path) -> Result<(), BackendError> {
    let stat = fstat(fd).map_err(|errno| unreachable_component(at, errno))?;
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => return Ok(()),
        FileType::Symlink => "a symbolic link",
        _ => "not a directory",
    };
    Err(BackendError::invalid(format!(
        "cannot mount at {}: {} is {what}",
        target.display(),
        at.display()
    )))
}

fn open_path(directory: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    openat(
        directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn stat_below(directory: impl AsFd, name: &OsStr) -> rustix::io::Result<Stat> {
    rustix::fs::statat(directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
}

/// A directory as it was found, whatever its path leads to later.
#[derive(Debug)]
pub(crate) struct MountPoint {
    parent: OwnedFd,
    name: OsString,
    directory: OwnedFd,
}

impl MountPoint {
    /// The directory itself; as long as it is open, a mount there is in use.
    pub(crate) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Which directory it is.
    pub(crate) fn id(&self) -> rustix::io::Result<FileId> {
        fstat(&self.directory).map(|stat| FileId::of(&stat))
    }

    /// The directory alone.
    pub(crate) fn into_directory(self) -> OwnedFd {
        self.directory
    }

    /// Closes the directory and keeps only a path to it through the open parent, which no change of
    /// the tree above can lead elsewhere.
    pub(crate) fn into_path_at(self) -> PathAt {
        PathAt {
            parent: Arc::new(self.parent),
            name: self.name,
        }
    }

    /// The directory as the place for a mount.
    pub(crate) fn place(&self) -> Result<Place<'_>, BackendError> {
        Ok(Place {
            directory: &self.directory,
            name: None,
            mount: self.mount_id()?,
        })
    }

    /// The number of the mount that the directory is on.
    pub(crate) fn mount_id(&self) -> Result<u64, BackendError> {
        mount_id(&self.directory)
    }

    /// Whether something is mounted here.
    pub(crate) fn is_mount_point(&self) -> Result<bool, BackendError> {
        Ok(mount_id(&self.parent)? != self.mount_id()?)
    }

    pub(crate) fn check_free(&self, path: &Path) -> Result<(), BackendError> {
        let taken = |why| {
            Err(BackendError::conflict(format!(
                "cannot mount at {}: {why}",
                path.display()
            )))
        };
        if self.is_mount_point()? {
            return taken("something is mounted there already");
        }
        if !self.is_empty(path)? {
            return taken("the directory is not empty");
        }
        Ok(())
    }

    fn is_empty(&self, path: &Path) -> Result<bool, BackendError> {
        let trouble =
            |errno| errno_error(format!("cannot read directory {}", path.display()), errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let readable = openat(&self.directory, ".", flags, Mode::empty()).map_err(trouble)?;
        for entry in Dir::new(readable).map_err(trouble)? {
            let entry = entry.map_err(trouble)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Where a mount is moved to: an open directory, or a name in one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) directory: &'a OwnedFd,
    pub(crate) name: Option<&'a OsStr>,
    /// The number of the mount that it is on.
    pub(crate) mount: u64,
}

/// A path to a directory through its open parent.
#[derive(Debug)]
pub(crate) struct PathAt {
    parent: Arc<OwnedFd>,
    name: OsString,
}

impl PathAt {
    pub(crate) fn new(parent: Arc<OwnedFd>, name: &OsStr) -> Self {
        let name = name.to_owned();
        PathAt { parent, name }
    }

    /// A path for system calls that take nothing else. Valid in this process while this value
    /// lives.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new(&format!("/proc/self/fd/{}", self.parent.as_raw_fd())).join(&self.name)
    }

    /// What is there now, on top of whatever is mounted.
    pub(crate) fn open(&self) -> rustix::io::Result<OwnedFd> {
        open_path(&*self.parent, &self.name)
    }

    /// Which file is there now, on top of whatever is mounted.
    pub(crate) fn id(&self) -> rustix::io::Result<FileId> {
        stat_below(&*self.parent, &self.name).map(|stat| FileId::of(&stat))
    }

    /// Removes the directory, if it is the one that is meant and empty.
    pub(crate) fn remove(&self, meant: FileId) -> rustix::io::Result<()> {
        if self.id()? != meant {
            return Err(Errno::EXIST);
        }
        rustix::fs::unlinkat(&*self.parent, &self.name, rustix::fs::AtFlags::REMOVEDIR)
    }
}

/// A file by identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn seen(stat: &Statx) -> Self {
        FileId {
            device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }

    pub(crate) fn of(stat: &Stat) -> Self {
        FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// The number of the mount that an open file is on, as `mountinfo` has it.
pub(crate) fn mount_id(fd: impl AsFd) -> Result<u64, BackendError> {
    // Linux 5.8 and later, unless a filter of system calls refuses it.
    let asked = statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
    match asked {
        Ok(told) if told.stx_mask & StatxFlags::MNT_ID.bits() != 0 => Ok(told.stx_mnt_id),
        _ => mount_id_by_proc(fd),
    }
}

fn mount_id_by_proc(fd: impl AsFd) -> Result<u64, BackendError> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(&path)
        .map_err(|error| errno_error(format!("cannot read {path}"), error))?;
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| BackendError::other(format!("{path} has no mount id")))
}

#[cfg(test)]
mod tests {
    use blockmount::ErrorKind;

    use super::*;

    fn refused(path: impl AsRef<OsStr>) -> String {
        let error = Target::parse(Path::new(path.as_ref()), &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.message().to_owned()
    }

    #[test]
    fn refuses_what_no_mount_may_cover() {
        for path in [
            "", "relative", "/", "//", "/a/./b", "/a/../b", "/a/..", "/a\0b", "/tmp", "/run/",
            "//var",
        ] {
            refused(path);
        }
        for path in [
            "/proc",
            "/proc/1",
            "/sys/x",
            "/dev/shm/x",
            "/usr/lib/x",
            "/lib64/x",
            "/lib32",
            "/etc/x",
            "/boot",
        ] {
            assert!(refused(path).ends_with("a directory of the system"));
        }
        refused("/x".repeat(2048) + "y");
    }

    #[test]
    fn both_ways_to_find_a_directory_and_its_mount_agree() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        for name in [
            "a/b",
            "a",
            "missing",
            "missing/b",
            "a/b/c",
            "file",
            "file/b",
            "link",
            "link/b",
        ] {
            let target = Target::parse(&dir.path().join(name), &[]).unwrap();
            let walked = target.walk(&mut |parent, name, path| open_below(parent, name, path));
            let found = target.find();
            match (walked, found) {
                (Ok(Some(walked)), Ok(Some(found))) => {
                    assert_eq!(walked.id().unwrap(), found.id().unwrap(), "{name}");
                    let by_proc = mount_id_by_proc(found.directory()).unwrap();
                    assert_eq!(found.mount_id().unwrap(), by_proc);
                    assert!(target.find_in_one_step().is_ok(), "{name}");
                }
                (Ok(None), Ok(None)) => assert!(name.contains("missing") || name == "a/b/c"),
                (Err(walked), Err(found)) => assert_eq!(walked.message(), found.message()),
                (walked, found) => panic!("{name}: {walked:?} and {found:?}"),
            }
        }
        let proc = Target::directory(Path::new("/proc/self")).unwrap();
        assert!(proc.find().is_err(), "it is a link");
    }

    #[test]
    fn takes_any_bytes_elsewhere() {
        for path in [
            &b"/run/a b,c:d\n\\e"[..],
            b"/\xff\xfe",
            b"/tmp//x/",
            b"/library/x",
            b"/runner",
            b"/mnt/...",
            b"/procx",
        ] {
            Target::parse(Path::new(OsStr::from_bytes(path)), &[]).unwrap();
        }
        let target = Target::parse(Path::new("//tmp///x//"), &[]).unwrap();
        assert_eq!(target.path().as_os_str(), "/tmp/x");
        Target::parse(Path::new(&("/x".repeat(2047))), &[]).unwrap();
    }

    #[test]
    fn keeps_to_the_allowed_roots() {
        let allowed = [PathBuf::from("/run/gcs"), PathBuf::from("/run/mounts")];
        for path in ["/run/gcs/c", "/run/mounts/scsi/m0"] {
            Target::parse(Path::new(path), &allowed).unwrap();
        }
        for path in [
            "/run/gcs",
            "/run/gcsx/c",
            "/run/other",
            "/run/gcs/../x",
            "/proc/x",
        ] {
            Target::parse(Path::new(path), &allowed).unwrap_err();
        }
    }
}
