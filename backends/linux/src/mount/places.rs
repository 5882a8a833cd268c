//! The directories that were made for mounts, so that exactly those are removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::BackendError;
use rustix::io::Errno;

use crate::mount::target::{FileId, Place, Target};
use crate::undo::journal::{Journal, Made, Note, strike};

/// Removing an empty directory takes microseconds; whoever waits longer has a dead filesystem.
const LONGEST_REMOVAL: Duration = Duration::from_secs(10);

/// Which targets are in use, and which directories were made for them.
///
/// Directories are shared: `/x` may have been made for `/x/a` and be on the way to `/x/b`. The last
/// user of a directory removes it, whoever made it.
///
/// The lock is held for look-ups only, never while a directory is made or removed.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Where directories are put on record, if anywhere.
    journal: Option<Arc<Journal>>,
    state: Mutex<State>,
    removed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    users: BTreeSet<PathBuf>,
    made: BTreeMap<PathBuf, Made>,
    removing: BTreeSet<PathBuf>,
}

/// The use of a target; the directories made for it go when nobody else uses them.
#[derive(Debug)]
pub(crate) struct PlaceUse {
    places: Arc<Places>,
    target: Target,
}

impl Places {
    pub(crate) fn new(journal: Option<Arc<Journal>>) -> Self {
        Places {
            journal,
            ..Places::default()
        }
    }

    /// Takes over a directory that an earlier process has made. Whether it is still that one shows
    /// when it is removed.
    pub(crate) fn adopt(&self, path: &Path, id: FileId, note: Note) {
        let note = Some(note);
        self.insert(path, Made { id, note });
    }

    fn insert(&self, path: &Path, made: Made) {
        let before = self.state().made.insert(path.to_owned(), made);
        // Somebody else removed the one that we made before.
        if let Some(before) = before {
            strike(before.note);
        }
    }

    /// Removes the directories that nobody uses.
    pub(crate) fn sweep(&self) {
        let doomed = self.state().take_unused(|_| true);
        self.remove(doomed);
    }

    /// Starts to use a target. Waits while a directory on the way to it is being removed.
    pub(crate) fn enter(self: &Arc<Self>, target: &Target) -> Result<PlaceUse, BackendError> {
        let path = target.path();
        let on_the_way = |state: &mut State| state.removing.iter().any(|dir| path.starts_with(dir));
        let (mut state, waited) = self
            .removed
            .wait_timeout_while(self.state(), LONGEST_REMOVAL, on_the_way)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            let message = format!(
                "a directory on the way to {} is being removed for too long",
                path.display()
            );
            return Err(BackendError::busy(message));
        }
        if !state.users.insert(path.to_owned()) {
            let message = format!("cannot mount at {}: it is in use already", path.display());
            return Err(BackendError::conflict(message));
        }
        Ok(PlaceUse {
            places: self.clone(),
            target: target.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is one insertion or removal: a panic leaves nothing half
        // done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the use of a target and takes over the directories that nobody needs now, deepest
    /// first.
    fn leave(&self, path: &Path) -> Vec<(PathBuf, Made)> {
        let mut state = self.state();
        state.users.remove(path);
        state.take_unused(|dir| path.starts_with(dir))
    }

    /// Removes directories, deepest first, and then those above them that nobody needs any more.
    fn remove(&self, mut doomed: Vec<(PathBuf, Made)>) {
        while !doomed.is_empty() {
            let (removed, mut kept) = try_to_remove(doomed);
            let mut state = self.state();
            for dir in removed.iter().chain(kept.keys()) {
                state.removing.remove(dir);
            }
            state.made.append(&mut kept);
            // Whoever left before has not taken those, because something below them was still there.
            doomed = state.take_unused(|dir| removed.iter().any(|below| below.starts_with(dir)));
            drop(state);
            self.removed.notify_all();
        }
    }
}

impl State {
    /// Takes out the directories among `those` that are on nobody's way, and below which nothing is being removed by
    /// somebody else, deepest first.
    fn take_unused(&mut self, those: impl Fn(&Path) -> bool) -> Vec<(PathBuf, Made)> {
        let State {
            users,
            made,
            removing,
        } = self;
        let is_needed = |dir: &PathBuf| {
            let mut below = users.iter().chain(removing.iter());
            below.any(|path| path.starts_with(dir))
        };
        let unused = |dir: &PathBuf| those(dir) && !is_needed(dir);
        let doomed: Vec<PathBuf> = made.keys().filter(|dir| unused(dir)).cloned().collect();
        removing.extend(doomed.iter().cloned());
        let take = |dir: PathBuf| made.remove_entry(&dir);
        doomed.into_iter().rev().filter_map(take).collect()
    }
}

impl PlaceUse {
    /// The target that is used.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Makes what is missing of the target, and checks that it is free.
    pub(crate) fn prepare(&self) -> Result<Place, BackendError> {
        let made = &mut |path: &Path, made| self.places.insert(path, made);
        self.target.prepare(self.places.journal.as_ref(), made)
    }
}

impl Drop for PlaceUse {
    fn drop(&mut self) {
        let doomed = self.places.leave(self.target.path());
        self.places.remove(doomed);
    }
}

/// Removes directories, deepest first, and says which are gone and which must stay: after one, so must those above it.
fn try_to_remove(doomed: Vec<(PathBuf, Made)>) -> (Vec<PathBuf>, BTreeMap<PathBuf, Made>) {
    let (mut removed, mut kept) = (Vec::new(), BTreeMap::new());
    for (dir, mut made) in doomed {
        let has_kept = kept.keys().any(|below: &PathBuf| below.starts_with(&dir));
        if !has_kept && remove(&dir, made.id) {
            strike(made.note.take());
            removed.push(dir);
        } else {
            kept.insert(dir, made);
        }
    }
    (removed, kept)
}

/// Removes an empty directory, and says whether that is settled. One that somebody else has put
/// something into stays: it is theirs as well.
fn remove(path: &Path, id: FileId) -> bool {
    let find = || Target::made(path).and_then(|target| target.find());
    let Ok(Some(place)) = find() else { return true };
    match place.into_path_at().remove(id) {
        Ok(()) | Err(Errno::NOENT) => true,
        // Another one; or what somebody has mounted on ours.
        Err(Errno::EXIST) => {
            let is_covered = |place: Place| place.is_mount_point().unwrap_or(false);
            !find().is_ok_and(|place| place.is_some_and(is_covered))
        }
        Err(Errno::NOTEMPTY | Errno::BUSY) => false,
        Err(errno) => {
            tracing::warn!(path = %path.display(), %errno, "cannot remove a directory made for a mount");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: PathBuf) -> Target {
        Target::parse(&path, &[]).unwrap()
    }

    fn prepare(places: &Arc<Places>, path: PathBuf) -> PlaceUse {
        let place = places.enter(&target(path)).unwrap();
        place.prepare().unwrap();
        place
    }

    #[test]
    fn many_who_come_at_once_share_what_is_missing_with_a_journal() {
        let room = tempfile::tempdir().unwrap();
        let journal = Journal::open(&room.path().join("journal")).unwrap();
        for round in 0..50 {
            let dir = room.path().join(round.to_string());
            let places = Arc::new(Places::new(Some(journal.clone())));
            std::thread::scope(|scope| {
                for n in 0..4 {
                    let (places, path) = (&places, dir.join(format!("x/{n}")));
                    scope.spawn(move || drop(prepare(places, path)));
                }
            });
            assert!(!dir.exists());
        }
        assert!(journal.read().unwrap().is_empty());
    }

    #[test]
    fn of_many_who_leave_at_once_somebody_removes_what_they_shared() {
        for _ in 0..200 {
            let dir = tempfile::tempdir().unwrap();
            let places = Arc::<Places>::default();
            let users = [0, 1, 2, 3].map(|n| prepare(&places, dir.path().join(format!("x/y/{n}"))));
            std::thread::scope(|scope| {
                for user in users {
                    scope.spawn(move || drop(user));
                }
            });
            assert!(!dir.path().join("x").exists());
        }
    }

    #[test]
    fn the_last_user_removes_what_the_first_made() {
        let dir = tempfile::tempdir().unwrap();
        let places = Arc::<Places>::default();
        let one = prepare(&places, dir.path().join("x/y/one"));
        let two = prepare(&places, dir.path().join("x/two"));
        drop(one);
        assert!(!dir.path().join("x/y").exists() && dir.path().join("x/two").exists());
        drop(two);
        assert!(!dir.path().join("x").exists() && dir.path().exists());
        assert!(places.state().made.is_empty() && places.state().removing.is_empty());
    }

    #[test]
    fn what_was_there_and_what_others_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let places = Arc::<Places>::default();
        std::fs::create_dir(dir.path().join("old")).unwrap();
        let old = prepare(&places, dir.path().join("old"));
        let new = prepare(&places, dir.path().join("new/x"));
        std::fs::write(dir.path().join("new/theirs"), "").unwrap();
        drop((old, new));
        assert!(dir.path().join("old").exists() && dir.path().join("new/theirs").exists());
        assert!(!dir.path().join("new/x").exists());
        std::fs::remove_file(dir.path().join("new/theirs")).unwrap();
        drop(prepare(&places, dir.path().join("new/y")));
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn a_target_has_one_user_and_a_replaced_directory_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let places = Arc::<Places>::default();
        let one = prepare(&places, dir.path().join("x"));
        let error = places.enter(&target(dir.path().join("x"))).unwrap_err();
        assert_eq!(error.kind(), blockmount::ErrorKind::Conflict);
        std::fs::rename(dir.path().join("x"), dir.path().join("moved")).unwrap();
        std::fs::create_dir(dir.path().join("x")).unwrap();
        drop(one);
        assert!(dir.path().join("x").exists() && dir.path().join("moved").exists());
    }

    #[test]
    fn many_at_once_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let places = Arc::<Places>::default();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (places, dir) = (&places, dir.path());
                scope.spawn(move || {
                    for _ in 0..200 {
                        drop(prepare(places, dir.join(format!("a/b/{thread}"))));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
