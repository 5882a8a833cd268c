//! The directories that are made for mounts, so that exactly those are removed.
//!
//! They are shared: `/x` may have been made for `/x/a` and be on the way to `/x/b`. Each directory of ours on the way to a
//! target is on the target's undo list.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmount::BackendError;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, StatxFlags, fstat, mkdirat, openat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::errno::errno_error;
use crate::mount::parents::Parent;
use crate::mount::target::{FileId, MountPoint, Place, Target, open_below};
use crate::undo::ledger::UndoList;
use crate::undo::locks::Key;
use crate::undo::step::{DirectoryStep, Undo};

/// Goes to the target of a list, makes what is missing (mode 0700), and checks that it is free.
pub(crate) fn prepare(list: &UndoList<'_>) -> Result<MountPoint, BackendError> {
    let found = reach(list, list.target())?;
    found.check_free(list.target().path())?;
    Ok(found)
}

/// A directory that was made a moment ago, by its name in an open one.
#[derive(Debug)]
pub(crate) struct Fresh {
    parent: Arc<Parent>,
    name: OsString,
}

impl Fresh {
    /// Where a mount is moved to. The directory is empty and ours, so that it need not be opened: if somebody puts another one
    /// in its place, the mount is where it was asked for all the same.
    pub(crate) fn place(&self) -> Place<'_> {
        Place {
            directory: self.parent.directory(),
            name: Some(&self.name),
            mount: self.parent.mount,
        }
    }
}

/// Looks at the target of a list without changing anything: it must be free to be mounted on, or missing.
pub(crate) fn check_free(list: &UndoList<'_>) -> Result<(), BackendError> {
    let name = list.target().path().file_name();
    if let Some((parent, name)) = list.parent().ok().zip(name)
        && let Err(Errno::NOENT) = parent.look(name, StatxFlags::empty())
    {
        return Ok(());
    }
    list.target().check_free()
}

/// Makes the target of a list, in a directory that is there, and then adds the step that is `next`: to mount there. With a
/// journal both are on record before the directory has its name. `None` if the target is there already, or if the way to it has
/// to be gone one component after the other ([`prepare`]).
pub(crate) fn make_fresh(list: &UndoList<'_>, next: &Undo) -> Result<Option<Fresh>, BackendError> {
    let path = list.target().path();
    let Some((above, name)) = path.parent().zip(path.file_name()) else {
        return Ok(None);
    };
    let Ok(parent) = list.parent() else {
        return Ok(None);
    };
    // Each directory of ours on the way is shared, which needs a look at it. Asked after the way was gone: by then whoever
    // has made one has it on a list.
    let is_farther = |made: &PathBuf| made != above;
    if list.made_above().iter().any(is_farther) {
        return Ok(None);
    }
    let is_missing = || matches!(parent.look(name, StatxFlags::empty()), Err(Errno::NOENT));
    let staged = list.staged_name();
    if staged.is_some() && !is_missing() {
        return Ok(None);
    }
    {
        let _held = list.hold(Key::Directory(above.into()))?;
        join(list, parent.id, above);
    }
    let _held = list.hold(Key::Directory(path.into()))?;
    let wanted = Wanted {
        parent: parent.directory(),
        name,
        path,
        mode: Mode::RWXU,
        scratch: false,
    };
    let unmade = staged.as_deref().map(|name| wanted.step(Some(name), None));
    if let Some(unmade) = &unmade {
        list.add(unmade.clone())?;
    }
    let first = staged.as_deref().map_or(name, OsStr::new);
    if mkdirat(parent.directory(), first, wanted.mode).is_err() {
        list.retain(|step| Some(step) != unmade.as_ref());
        // The walk says what is there, or what is wrong.
        return Ok(None);
    }
    let trouble = |errno| errno_error(format!("cannot look at {}", path.display()), errno);
    let seen = parent.look(first, StatxFlags::MNT_ID).map_err(trouble)?;
    let is_ours = FileType::from_raw_mode(seen.stx_mode.into()) == FileType::Directory
        && seen.stx_mnt_id == parent.mount;
    if !is_ours {
        return Ok(None);
    }
    let id = FileId::seen(&seen);
    let Some(staged) = staged else {
        list.add(wanted.step(None, Some(id)))?;
        list.add(next.clone())?;
        let name = name.to_owned();
        return Ok(Some(Fresh { parent, name }));
    };
    let made = wanted.step(Some(&staged), Some(id));
    list.replace_last(made.clone());
    list.add(next.clone())?;
    let Err(errno) = wanted.give_name(&staged) else {
        list.replace(&made, wanted.step(None, Some(id)));
        let name = name.to_owned();
        return Ok(Some(Fresh { parent, name }));
    };
    // Nothing is mounted there.
    list.retain(|step| step != next);
    match errno {
        // Somebody else was faster, or not every filesystem can rename without replacing.
        Errno::EXIST | Errno::INVAL | Errno::NOSYS => {
            wanted.remove(&staged)?;
            list.retain(|step| *step != made);
            Ok(None)
        }
        errno => Err(wanted.trouble(errno)),
    }
}

/// Goes to the directory that a list's target is to be in, and makes what is missing.
pub(crate) fn prepare_parent(list: &UndoList<'_>) -> Result<OwnedFd, BackendError> {
    let parent = list.target().path().parent().unwrap_or(Path::new("/"));
    if parent == Path::new("/") {
        return open_tree(parent, "directory");
    }
    let found = reach(list, &Target::directory(parent)?)?;
    Ok(found.into_directory())
}

/// The directory at a path, through no symbolic link; nothing if it is not there.
pub(crate) fn find(path: &Path) -> Option<OwnedFd> {
    if path == Path::new("/") {
        return open_tree(path, "directory").ok();
    }
    let found = Target::directory(path).and_then(|target| target.find());
    found.ok().flatten().map(MountPoint::into_directory)
}

fn reach(list: &UndoList<'_>, target: &Target) -> Result<MountPoint, BackendError> {
    let found = target.walk(&mut |parent, name, path| {
        let _held = list.hold(Key::Directory(path.into()))?;
        if let Some(there) = open_below(parent, name, path)? {
            let stat = fstat(&there).map_err(|errno| {
                errno_error(format!("cannot look at {}", path.display()), errno)
            })?;
            join(list, FileId::of(&stat), path);
            return Ok(Some(there));
        }
        let wanted = Wanted {
            parent,
            name,
            path,
            mode: Mode::RWXU,
            scratch: false,
        };
        make(list, &wanted)?;
        open_below(parent, name, path)
    })?;
    found.ok_or_else(|| {
        let path = target.path().display();
        BackendError::other(format!("{path} was removed while it was prepared"))
    })
}

/// Shares a directory, if it was made for a mount.
fn join(list: &UndoList<'_>, id: FileId, path: &Path) {
    let is_it = |step: &Undo| matches!(step, Undo::RemoveDirectory(made) if made.id == Some(id) && made.path.is(path));
    list.join(is_it);
}

/// A directory that is to be made.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) parent: &'a OwnedFd,
    /// Its name below its parent.
    pub(crate) name: &'a OsStr,
    pub(crate) path: &'a Path,
    pub(crate) mode: Mode,
    /// See [`DirectoryStep::scratch`].
    pub(crate) scratch: bool,
}

impl Wanted<'_> {
    fn trouble(&self, errno: Errno) -> BackendError {
        let path = self.path.display();
        errno_error(format!("cannot make directory {path}"), errno)
    }

    fn step(&self, staged: Option<&str>, id: Option<FileId>) -> Undo {
        Undo::RemoveDirectory(DirectoryStep {
            path: self.path.into(),
            staged: staged.map(str::to_owned),
            id,
            scratch: self.scratch,
        })
    }

    fn make_as(&self, name: &OsStr) -> rustix::io::Result<FileId> {
        mkdirat(self.parent, name, self.mode)?;
        id_below(self.parent, name)
    }

    /// Gives it its name, if there is nothing of that name.
    fn give_name(&self, staged: &str) -> rustix::io::Result<()> {
        let flags = RenameFlags::NOREPLACE;
        renameat_with(self.parent, staged, self.parent, self.name, flags)
    }

    /// Removes it before it has its name.
    fn remove(&self, staged: &str) -> Result<(), BackendError> {
        unlinkat(self.parent, staged, AtFlags::REMOVEDIR).map_err(|errno| self.trouble(errno))
    }
}

/// Makes a directory and puts it on a list; false if there is something of that name already.
pub(crate) fn make(list: &UndoList<'_>, wanted: &Wanted<'_>) -> Result<bool, BackendError> {
    let trouble = |errno| wanted.trouble(errno);
    let Some(staged) = list.staged_name() else {
        return match wanted.make_as(wanted.name) {
            Ok(id) => list.add(wanted.step(None, Some(id))).map(|()| true),
            // Somebody else was faster; then it is theirs.
            Err(Errno::EXIST) => Ok(false),
            Err(errno) => Err(trouble(errno)),
        };
    };
    list.add(wanted.step(Some(&staged), None))?;
    let mut id = wanted.make_as(OsStr::new(&staged)).map_err(trouble)?;
    list.amend(wanted.step(Some(&staged), Some(id)))?;
    let renamed = match wanted.give_name(&staged) {
        // Not every filesystem can rename without replacing. Killed before the identity is on record, we leave an
        // empty directory.
        Err(Errno::INVAL | Errno::NOSYS) => {
            let made = wanted.make_as(wanted.name);
            if let Ok(made) = made {
                id = made;
                list.amend(wanted.step(Some(&staged), Some(id)))?;
            }
            made.and_then(|_| unlinkat(wanted.parent, &*staged, AtFlags::REMOVEDIR))
        }
        renamed => renamed,
    };
    match renamed {
        Ok(()) => {
            list.replace_last(wanted.step(None, Some(id)));
            Ok(true)
        }
        Err(Errno::EXIST) => {
            wanted.remove(&staged)?;
            let given_up = wanted.step(Some(&staged), Some(id));
            list.retain(|step| *step != given_up);
            Ok(false)
        }
        Err(errno) => Err(trouble(errno)),
    }
}

fn id_below(parent: impl AsFd, name: &OsStr) -> rustix::io::Result<FileId> {
    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileId::of(&stat))
}

/// Removes an empty directory, and says whether that is settled. One that somebody else has put something into
/// stays: it is theirs as well.
pub(crate) fn undo(list: &UndoList<'_>, step: &DirectoryStep) -> bool {
    let path = &step.path.0;
    if undo_target(list, step) {
        return true;
    }
    if let Some(staged) = &step.staged {
        remove_staged(&path.with_file_name(staged));
    }
    let find = || Target::directory(path).and_then(|target| target.find());
    let (Some(id), Ok(Some(found))) = (step.id, find()) else {
        return true;
    };
    if step.scratch && found.id() == Ok(id) {
        empty_of_kernels(found.directory());
    }
    match found.into_path_at().remove(id) {
        Ok(()) | Err(Errno::NOENT) => true,
        // Another one; or what somebody has mounted on ours.
        Err(Errno::EXIST) => {
            let is_covered = |found: MountPoint| found.is_mount_point().unwrap_or(false);
            !find().is_ok_and(|found| found.is_some_and(is_covered))
        }
        // What somebody has written to a scratch is not ours to remove.
        Err(Errno::NOTEMPTY) if step.scratch => true,
        Err(Errno::NOTEMPTY | Errno::BUSY) => false,
        Err(errno) => {
            tracing::warn!(path = %blockmount::printable(path.display()), %errno, "cannot remove a directory made for a mount");
            false
        }
    }
}

/// Removes the target of a list, if it is an empty directory that was made for it.
fn undo_target(list: &UndoList<'_>, step: &DirectoryStep) -> bool {
    let path = list.target().path();
    let (Some(id), None, false, true) = (step.id, &step.staged, step.scratch, step.path.is(path))
    else {
        return false;
    };
    let parent = list.parent().ok().zip(path.file_name());
    let removed = parent.map(|(parent, name)| parent.path_at(name).remove(id));
    // Without the directory there, the parent may have been removed and made again since it was found.
    matches!(removed, Some(Ok(())))
}

/// Removes a directory that has not got its name. Nobody else makes one of that name.
fn remove_staged(path: &Path) {
    let found = Target::directory(path).and_then(|target| target.find());
    let Ok(Some(found)) = found else { return };
    let at = found.into_path_at();
    if let Err(errno) = at.id().and_then(|id| at.remove(id)) {
        tracing::warn!(path = %blockmount::printable(path.display()), %errno, "cannot remove a directory made for a mount");
    }
}

/// Removes from a directory of a scratch what the kernel made in it before there was no overlay
/// after all.
fn empty_of_kernels(directory: &OwnedFd) {
    for name in ["work", "index"] {
        // There is most often none; and if one stays, so does the directory.
        let _none_is_fine = unlinkat(directory, name, AtFlags::REMOVEDIR);
    }
}

/// Opens a directory by its path for reading.
pub(crate) fn open_tree(path: &Path, what: &str) -> Result<OwnedFd, BackendError> {
    if !path.is_absolute() {
        return Err(BackendError::invalid(format!(
            "{what} {} is not an absolute path",
            path.display()
        )));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
        .map_err(|errno| errno_error(format!("cannot open {what} {}", path.display()), errno))
}

/// Opens a directory below another one, through no symbolic link. Kernels before 6.15 want the layers of an overlay
/// open for reading.
pub(crate) fn readable(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    openat(
        directory,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use blockmount::ErrorKind;

    use super::*;
    use crate::kernel::Kernel;
    use crate::undo::journal::Journal;
    use crate::undo::ledger::Ledger;
    use crate::undo::step::{Identity, MountStep};
    use crate::undo::teardown;

    fn target(path: PathBuf) -> Target {
        Target::parse(&path, &[]).unwrap()
    }

    fn make_ready(ledger: &Ledger, path: PathBuf) -> Target {
        let target = target(path);
        let list = ledger.list(&target);
        list.begin().unwrap();
        prepare(&list).unwrap();
        target
    }

    fn leave(ledger: &Ledger, target: &Target) {
        teardown::undo_all(&ledger.list(target), Kernel::default()).unwrap();
    }

    fn mounted_next() -> Undo {
        Undo::Unmount(Box::new(MountStep {
            mount: Identity::Expected {
                filesystem: "none".to_owned(),
                source: Path::new("/dev/none").into(),
                further_sources: Vec::new(),
                options: Vec::new(),
            },
            device: None,
            scratch: None,
            view: None,
        }))
    }

    /// A place for the journals of a test, and one for its targets.
    fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        let targets = at.join("targets");
        std::fs::create_dir(&targets).unwrap();
        (dir, at.join("journal"), targets)
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_fresh_target_and_its_mount_are_on_record_before_it_has_its_name() {
        let (_dir, journal, targets) = places();
        let journal = Journal::open(&journal, None).unwrap();
        let ledger = Ledger::new(Some(journal.clone()));
        let target = target(targets.join("m"));
        let list = ledger.list(&target);
        list.begin().unwrap();
        let next = mounted_next();
        let fresh = make_fresh(&list, &next).unwrap().unwrap();
        assert_eq!(fresh.place().name, Some(OsStr::new("m")));
        assert_eq!(names(&targets), ["m"]);
        let [Undo::RemoveDirectory(made), mount] = &list.steps()[..] else {
            panic!("{:?}", list.steps());
        };
        assert!(made.staged.is_none() && made.id.is_some() && *mount == next);
        let [(_, record)] = &journal.read().unwrap()[..] else {
            panic!("one record");
        };
        let [Undo::RemoveDirectory(noted), mount] = &record.steps[..] else {
            panic!("{record:?}");
        };
        // What has either name is found by this.
        assert!(noted.staged.is_some() && noted.id == made.id && *mount == next);
        list.retain(|step| *step != next);
        leave(&ledger, &target);
        assert!(names(&targets).is_empty() && journal.read().unwrap().is_empty());
    }

    #[test]
    fn a_target_that_another_makes_at_the_same_time_is_theirs() {
        static THEIRS: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
        // At the first change of the journal, which is after the look at what is there.
        fn make_theirs() {
            drop(std::fs::create_dir(THEIRS.get().unwrap()));
        }
        let (_dir, journal, targets) = places();
        let theirs = THEIRS.get_or_init(|| targets.join("m"));
        let journal = Journal::open(&journal, Some(make_theirs)).unwrap();
        let ledger = Ledger::new(Some(journal.clone()));
        let target = target(theirs.clone());
        let list = ledger.list(&target);
        list.begin().unwrap();
        assert!(make_fresh(&list, &mounted_next()).unwrap().is_none());
        assert!(list.steps().is_empty());
        assert_eq!(names(&targets), ["m"], "what had its first name is gone");
        prepare(&list).unwrap();
        leave(&ledger, &target);
        assert_eq!(names(&targets), ["m"], "it stays");
        assert!(journal.read().unwrap().is_empty());
    }

    #[test]
    fn many_who_come_at_once_share_what_is_missing_with_a_journal() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal"), None).unwrap();
        for round in 0..50 {
            let round = dir.path().join(round.to_string());
            let ledger = Ledger::new(Some(journal.clone()));
            std::thread::scope(|scope| {
                for n in 0..4 {
                    let (ledger, path) = (&ledger, round.join(format!("x/{n}")));
                    scope.spawn(move || leave(ledger, &make_ready(ledger, path)));
                }
            });
            assert!(!round.exists());
        }
        assert!(journal.read().unwrap().is_empty());
    }

    #[test]
    fn of_many_who_leave_at_once_somebody_removes_what_they_shared() {
        for _ in 0..200 {
            let dir = tempfile::tempdir().unwrap();
            let ledger = Ledger::default();
            let ready = |n| make_ready(&ledger, dir.path().join(format!("x/y/{n}")));
            let users = [0, 1, 2, 3].map(ready);
            std::thread::scope(|scope| {
                for user in users {
                    let ledger = &ledger;
                    scope.spawn(move || leave(ledger, &user));
                }
            });
            assert!(!dir.path().join("x").exists());
        }
    }

    #[test]
    fn the_last_user_removes_what_the_first_made() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::default();
        let one = make_ready(&ledger, dir.path().join("x/y/one"));
        let two = make_ready(&ledger, dir.path().join("x/two"));
        leave(&ledger, &one);
        assert!(!dir.path().join("x/y").exists() && dir.path().join("x/two").exists());
        leave(&ledger, &two);
        assert!(!dir.path().join("x").exists() && dir.path().exists());
        assert!(ledger.list(&one).steps().is_empty() && ledger.list(&two).steps().is_empty());
    }

    #[test]
    fn what_was_there_and_what_others_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal"), None).unwrap();
        let ledger = Ledger::new(Some(journal.clone()));
        std::fs::create_dir(dir.path().join("old")).unwrap();
        let old = make_ready(&ledger, dir.path().join("old"));
        let new = make_ready(&ledger, dir.path().join("new/x"));
        std::fs::write(dir.path().join("new/theirs"), "").unwrap();
        leave(&ledger, &old);
        leave(&ledger, &new);
        assert!(dir.path().join("old").exists() && dir.path().join("new/theirs").exists());
        assert!(!dir.path().join("new/x").exists());
        let y = make_ready(&ledger, dir.path().join("new/y"));
        leave(&ledger, &y);
        assert_eq!(journal.read().unwrap().len(), 1);
        std::fs::remove_file(dir.path().join("new/theirs")).unwrap();
        let y = make_ready(&ledger, dir.path().join("new/y"));
        leave(&ledger, &y);
        assert!(!dir.path().join("new").exists());
        assert!(journal.read().unwrap().is_empty());
    }

    #[test]
    fn a_target_has_one_user_and_a_replaced_directory_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::default();
        let one = make_ready(&ledger, dir.path().join("x"));
        let error = ledger.list(&one).begin().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        std::fs::rename(dir.path().join("x"), dir.path().join("moved")).unwrap();
        std::fs::create_dir(dir.path().join("x")).unwrap();
        leave(&ledger, &one);
        assert!(dir.path().join("x").exists() && dir.path().join("moved").exists());
    }

    #[test]
    fn many_at_once_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Arc::new(Ledger::default());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (ledger, dir) = (&ledger, dir.path());
                scope.spawn(move || {
                    for _ in 0..200 {
                        leave(
                            ledger,
                            &make_ready(ledger, dir.join(format!("a/b/{thread}"))),
                        );
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
