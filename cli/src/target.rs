//! Where a tree is to appear on this machine: the user's path, with the links on its way followed once.
//!
//! `/var/run` is a link everywhere, and `/mnt` or `/home` on some systems. From here on no link is followed: a path that was
//! exchanged meanwhile is refused by the guest.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use crate::failure::{Context, Failure};

/// As many links as Linux follows in a path (`MAXSYMLINKS`).
const MOST_LINKS: usize = 40;

/// The path without `.` and `..`, absolute, with each link followed that is root's or the user's own. Blocks.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf, Failure> {
    let advice = "name a directory, such as --at /mnt/tree";
    let what = || format!("cannot mount at {}", path.display());
    let absolute = std::path::absolute(path)
        .context(|| format!("--at {path:?} is no path"))
        .map_err(|failure| failure.advise(advice))?;
    let owners = [0, rustix::process::getuid().as_raw(), sudo_uid()];
    follow(&absolute, &owners)
        .context(what)
        .map_err(|failure| failure.advise(advice))
}

/// Who has called sudo; root if nobody has.
fn sudo_uid() -> u32 {
    let uid = std::env::var("SUDO_UID").ok();
    uid.and_then(|uid| uid.parse().ok()).unwrap_or(0)
}

fn follow(path: &Path, owners: &[u32]) -> io::Result<PathBuf> {
    let mut rest: VecDeque<OsString> = names(path);
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        let next = resolved.join(&name);
        let Ok(found) = next.symlink_metadata() else {
            // What is not there is made later.
            resolved = next;
            continue;
        };
        if !found.is_symlink() {
            resolved = next;
            continue;
        }
        links += 1;
        let refuse = |why: &str| Err(io::Error::other(format!("{} {why}", next.display())));
        if links > MOST_LINKS {
            return refuse("leads in a circle");
        }
        if !owners.contains(&found.uid()) {
            return refuse("is a link of another user");
        }
        let leads_to = fs::read_link(&next)?;
        if !next.exists() {
            return refuse("is a link that leads nowhere");
        }
        if leads_to.is_absolute() {
            resolved = PathBuf::from("/");
        }
        for name in names(&leads_to).into_iter().rev() {
            rest.push_front(name);
        }
    }
    Ok(resolved)
}

/// The names in a path, with `..` as it is.
fn names(path: &Path) -> VecDeque<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn u13_links_on_the_way_are_followed_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        fs::create_dir_all(dir.join("real/below")).unwrap();
        symlink("real", dir.join("relative")).unwrap();
        symlink(dir.join("real/below"), dir.join("absolute")).unwrap();
        symlink("relative/below", dir.join("twice")).unwrap();
        let owners = [0, rustix::process::getuid().as_raw()];
        for (given, expected) in [
            ("relative/x", "real/x"),
            ("relative/below/../y", "real/y"),
            ("absolute", "real/below"),
            ("absolute/../z", "real/z"),
            ("twice/a/b", "real/below/a/b"),
            ("not/there/../x", "not/x"),
        ] {
            let found = follow(&dir.join(given), &owners).unwrap();
            assert_eq!(found, dir.join(expected), "{given}");
        }
        assert!(!dir.join("not").exists() && !dir.join("real/x").exists());
        assert_eq!(
            follow(Path::new("/../../x"), &owners).unwrap(),
            Path::new("/x")
        );
    }

    #[test]
    fn u13_links_of_others_and_to_nowhere_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        symlink("circle", dir.path().join("circle")).unwrap();
        symlink("/", dir.path().join("root")).unwrap();
        let owners = [0, rustix::process::getuid().as_raw()];
        for (name, why) in [("dangling", "nowhere"), ("circle", "nowhere")] {
            let error = follow(&dir.path().join(name), &owners).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
        let error = follow(&dir.path().join("root/x"), &[u32::MAX]).unwrap_err();
        assert!(error.to_string().contains("of another user"), "{error}");
    }
}
