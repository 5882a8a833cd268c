//! Whose runs these are: root's, which mount on this machine, or those of a user, whose disks are all in virtual machines.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::geteuid;

use super::ROOTS_RUNS;

pub(crate) fn is_root() -> bool {
    geteuid().is_root()
}

/// What stands before a command in advice.
pub(crate) fn sudo() -> &'static str {
    match is_root() {
        true => "sudo ",
        false => "",
    }
}

/// Where the runs of this user have their directories: root's in `/run`, those of others in their own directory for such files
/// (`XDG_RUNTIME_DIR`), or else in that for temporary ones.
pub(crate) fn runs() -> &'static Path {
    static RUNS: OnceLock<PathBuf> = OnceLock::new();
    RUNS.get_or_init(|| match is_root() {
        true => ROOTS_RUNS.into(),
        false => of_user(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)),
    })
}

fn of_user(directory: Option<PathBuf>) -> PathBuf {
    let user = geteuid().as_raw();
    // Somebody else's, kept by `su` or `sudo -u`, is none.
    let is_own = |path: &PathBuf| {
        let found = fs::symlink_metadata(path);
        path.is_absolute() && found.is_ok_and(|found| found.is_dir() && found.uid() == user)
    };
    match directory.filter(is_own) {
        Some(directory) => directory.join("blockmount"),
        None => std::env::temp_dir().join(format!("blockmount-{user}")),
    }
}

/// Where this user keeps what may be removed at any moment.
pub(crate) fn cache() -> PathBuf {
    if is_root() {
        return "/var/cache/blockmount".into();
    }
    let absolute = |name: &str| {
        let path = std::env::var_os(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    match cache {
        Some(cache) => cache.join("blockmount"),
        None => runs().join("cache"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_directory_is_believed_if_it_is_the_users_own() {
        let own = tempfile::tempdir().unwrap();
        assert_eq!(
            of_user(Some(own.path().into())),
            own.path().join("blockmount")
        );
        let user = geteuid().as_raw();
        let fallback = std::env::temp_dir().join(format!("blockmount-{user}"));
        let link = own.path().join("link");
        std::os::unix::fs::symlink(own.path(), &link).unwrap();
        for other in [
            None,
            Some("relative".into()),
            Some("/absent".into()),
            Some(link),
        ] {
            assert_eq!(of_user(other), fallback);
        }
    }
}
