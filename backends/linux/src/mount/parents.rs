//! The directories that targets are in, each found once for all calls that are under way.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Statx, StatxFlags, statx};
use rustix::io::Errno;

use crate::mount::target::{FileId, PathAt, Target};

/// Who never has a moment without a call must not keep a filesystem in use for ever.
const LONGEST: Duration = Duration::from_secs(1);

/// The directory that targets are in.
#[derive(Debug)]
pub(crate) struct Parent {
    directory: Arc<OwnedFd>,
    /// Which directory it is.
    pub(crate) id: FileId,
    /// The number of the mount that it is on.
    pub(crate) mount: u64,
    since: Instant,
}

impl Parent {
    /// As a walk from the root finds it, through no symbolic link.
    fn find(target: &Target) -> rustix::io::Result<Self> {
        let since = Instant::now();
        let directory = target.open_parent()?;
        let seen = statx(
            &directory,
            "",
            AtFlags::EMPTY_PATH,
            StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
        )?;
        if seen.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
            return Err(Errno::NOSYS);
        }
        Ok(Parent {
            directory: Arc::new(directory),
            id: FileId::seen(&seen),
            mount: seen.stx_mnt_id,
            since,
        })
    }

    pub(crate) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// The path of a file in it.
    pub(crate) fn path_at(&self, name: &OsStr) -> PathAt {
        PathAt::new(Arc::clone(&self.directory), name)
    }

    /// Looks at a file in it, not following a link.
    pub(crate) fn look(&self, name: &OsStr, what: StatxFlags) -> rustix::io::Result<Statx> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        statx(&self.directory, name, flags, StatxFlags::BASIC_STATS | what)
    }
}

/// What the calls that are under way have found.
#[derive(Debug, Default)]
pub(crate) struct Parents(Mutex<Found>);

#[derive(Debug, Default)]
struct Found {
    calls: usize,
    /// By their paths as they are in those of targets.
    parents: HashMap<OsString, Arc<Parent>>,
}

impl Parents {
    // Held to look up and to change it.
    fn found(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call begins, which ends with the answer.
    pub(crate) fn enter(&self) {
        self.found().calls += 1;
    }

    /// A call ends. Whether it was the last.
    pub(crate) fn leave(&self) -> bool {
        let mut found = self.found();
        found.calls -= 1;
        let is_last = found.calls == 0;
        if is_last {
            let closed = std::mem::take(&mut found.parents);
            drop(found);
            drop(closed);
        }
        is_last
    }

    /// The directory of a target, as it was found since the target was asked for.
    ///
    /// # Errors
    ///
    /// Those of opening it; `ENOSYS` if this kernel cannot tell all that is to be known of it.
    pub(crate) fn of(&self, target: &Target) -> rustix::io::Result<Arc<Parent>> {
        let path = target.path().parent().ok_or(Errno::INVAL)?;
        if let Some(parent) = self.found().parents.get(path.as_os_str())
            && parent.since > target.asked()
        {
            return Ok(Arc::clone(parent));
        }
        let parent = Arc::new(Parent::find(target)?);
        let mut found = self.found();
        let mut closed = Vec::new();
        if found.calls > 0 {
            closed.extend(
                found
                    .parents
                    .extract_if(|_, known| known.since.elapsed() > LONGEST),
            );
            let before = found.parents.insert(path.into(), Arc::clone(&parent));
            closed.extend(before.map(|before| (OsString::new(), before)));
        }
        drop(found);
        drop(closed);
        Ok(parent)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn target(path: &Path) -> Target {
        Target::directory(path).unwrap()
    }

    #[test]
    fn a_parent_is_shared_by_calls_under_way_that_asked_before_it_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| target(&dir.path().canonicalize().unwrap().join(name));
        let parents = Parents::default();
        let (early, other) = (at("a"), at("b"));
        // Without a call, nothing stays open.
        let alone = parents.of(&early).unwrap();
        assert_eq!(Arc::strong_count(&alone), 1);
        parents.enter();
        parents.enter();
        let found = parents.of(&early).unwrap();
        assert!(Arc::ptr_eq(&found, &parents.of(&other).unwrap()));
        let late = parents.of(&at("c")).unwrap();
        assert!(!Arc::ptr_eq(&found, &late));
        assert_eq!((found.id, found.mount), (late.id, late.mount));
        drop(found);
        assert!(!parents.leave());
        assert_eq!(Arc::strong_count(&late), 2);
        assert!(parents.leave());
        assert_eq!(Arc::strong_count(&late), 1);
    }

    #[test]
    fn a_parent_is_reached_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        std::fs::create_dir(path.join("real")).unwrap();
        std::os::unix::fs::symlink("real", path.join("link")).unwrap();
        let parents = Parents::default();
        let real = parents.of(&target(&path.join("real/x"))).unwrap();
        assert!(real.look(OsStr::new("x"), StatxFlags::MNT_ID).is_err());
        assert!(parents.of(&target(&path.join("link/x"))).is_err());
        assert!(parents.of(&target(&path.join("gone/x"))).is_err());
    }
}
