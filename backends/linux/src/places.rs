//! The directories that were made for mounts, so that exactly those are removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::BackendError;
use rustix::io::Errno;

use crate::target::{FileId, Place, Target};

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
    state: Mutex<State>,
    removed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    users: BTreeSet<PathBuf>,
    made: BTreeMap<PathBuf, FileId>,
    removing: BTreeSet<PathBuf>,
}

/// The use of a target; the directories made for it go when nobody else uses them.
#[derive(Debug)]
pub(crate) struct PlaceUse {
    places: Arc<Places>,
    target: Target,
}

impl Places {
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
    fn leave(&self, path: &Path) -> Vec<(PathBuf, FileId)> {
        let mut state = self.state();
        state.users.remove(path);
        let State {
            users,
            made,
            removing,
        } = &mut *state;
        let unused =
            |dir: &Path| path.starts_with(dir) && !users.iter().any(|user| user.starts_with(dir));
        let mut doomed: Vec<(PathBuf, FileId)> = made
            .iter()
            .filter(|(dir, _)| unused(dir))
            .map(|(dir, id)| (dir.clone(), *id))
            .collect();
        doomed.reverse();
        made.retain(|dir, _| !doomed.iter().any(|(gone, _)| gone == dir));
        removing.extend(doomed.iter().map(|(dir, _)| dir.clone()));
        doomed
    }

    fn finish(&self, removing: &[(PathBuf, FileId)], kept: Option<usize>) {
        let mut state = self.state();
        for (index, (dir, id)) in removing.iter().enumerate() {
            state.removing.remove(dir);
            if kept.is_some_and(|kept| index >= kept) {
                state.made.insert(dir.clone(), *id);
            }
        }
        self.removed.notify_all();
    }
}

impl PlaceUse {
    /// The target that is used.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Makes what is missing of the target, and checks that it is free.
    pub(crate) fn prepare(&self) -> Result<Place, BackendError> {
        let made = &mut |path: &Path, id| {
            self.places.state().made.insert(path.to_owned(), id);
        };
        self.target.prepare(made)
    }
}

impl Drop for PlaceUse {
    fn drop(&mut self) {
        let doomed = self.places.leave(self.target.path());
        let kept = doomed.iter().position(|(dir, id)| !remove(dir, *id));
        self.places.finish(&doomed, kept);
    }
}

/// Removes an empty directory, and says whether that is settled. One that somebody else has put
/// something into stays: it is theirs as well.
fn remove(path: &Path, id: FileId) -> bool {
    let found = Target::parse(path, &[]).and_then(|target| target.find());
    let Ok(Some(place)) = found else { return true };
    match place.into_way().remove(id) {
        Ok(()) | Err(Errno::NOENT | Errno::EXIST) => true,
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
