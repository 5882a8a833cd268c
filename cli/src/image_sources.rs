//! Real directories of this machine as the content of the demo's images.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use blockmount_checker::tree::{self, Node, Tree};
use walkdir::WalkDir;

use crate::failure::{Context, Failure};
use crate::interrupt::Stop;

/// Directories that machines have, with many files and no secrets; the ones of a minimal Debian last.
const CANDIDATES: [&str; 16] = [
    "/usr/share/zoneinfo",
    "/usr/share/perl",
    "/usr/include",
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/vim",
    "/usr/share/icons",
    "/usr/share/i18n",
    "/usr/share/mime",
    "/usr/share/locale",
    "/usr/lib/git-core",
    "/usr/lib/gcc",
    "/usr/share/terminfo",
    "/usr/share/bash-completion",
    "/usr/bin",
    "/usr/sbin",
];

/// Directories whose names end in a version or an architecture: where, and how the name starts or ends.
const VERSIONED: [(&str, &str); 2] = [("/usr/lib", "python3"), ("/usr/lib", "-linux-gnu")];

/// A directory with fewer files says little.
const MIN_FILES: usize = 100;

/// How much of a directory becomes a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    files: usize,
    bytes: u64,
    file_bytes: u64,
}

impl Limits {
    /// Enough to be real, little enough to be quick.
    pub(crate) const LAYER: Limits = Limits {
        files: 1_000,
        bytes: 8 << 20,
        file_bytes: 2 << 20,
    };
    /// The same where the guest reads every file several times, perhaps under emulation.
    pub(crate) const LAYER_OF_MACHINE: Limits = Limits {
        files: 300,
        bytes: 2 << 20,
        file_bytes: 256 << 10,
    };
    /// Everything.
    pub(crate) const NONE: Limits = Limits {
        files: usize::MAX,
        bytes: u64::MAX,
        file_bytes: u64::MAX,
    };
}

/// Up to `count` directories of this machine with many files, none below another.
pub(crate) fn choose(count: usize) -> Vec<PathBuf> {
    let mut chosen: Vec<PathBuf> = Vec::new();
    for candidate in versioned().into_iter().chain(CANDIDATES.map(PathBuf::from)) {
        // Where /usr/sbin is a link to /usr/bin, both are one directory.
        let Ok(candidate) = fs::canonicalize(candidate) else {
            continue;
        };
        let apart =
            |other: &PathBuf| !candidate.starts_with(other) && !other.starts_with(&candidate);
        if chosen.len() < count && chosen.iter().all(apart) && is_rich(&candidate) {
            chosen.push(candidate);
        }
    }
    chosen
}

fn versioned() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (parent, part) in VERSIONED {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let matching = entries.filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(part) || name.ends_with(part)
        });
        found.extend(matching.map(|entry| entry.path()));
    }
    found.sort();
    found
}

fn is_rich(directory: &Path) -> bool {
    let files = WalkDir::new(directory)
        .into_iter()
        .flatten()
        .filter(|entry| entry.file_type().is_file());
    files.take(MIN_FILES).count() == MIN_FILES
}

/// Copies directories, links and regular files from `source` to `name` below `root`, up to the limits.
/// Returns what was copied, with the digests of what was read from the source.
///
/// Files that cannot be read, or vanish meanwhile, are left out: the machine lives on.
pub(crate) fn copy(
    source: &Path,
    root: &Path,
    name: &Path,
    limits: Limits,
    stop: &Stop,
) -> Result<Tree, Failure> {
    let mut tree = Tree::default();
    let (mut files, mut bytes) = (0, 0);
    fs::create_dir_all(root.join(name))
        .context(|| format!("cannot make a directory for {name:?}"))?;
    if !name.as_os_str().is_empty() {
        tree.insert(name, Node::Directory);
    }
    for entry in WalkDir::new(source)
        .min_depth(1)
        .sort_by_file_name()
        .into_iter()
        .flatten()
    {
        stop.check()?;
        let below = entry
            .path()
            .strip_prefix(source)
            .expect("what is found below starts with it");
        let name = name.join(below);
        let to = root.join(&name);
        let Ok(metadata) = entry.path().symlink_metadata() else {
            continue;
        };
        let fits = metadata.len() <= limits.file_bytes && metadata.len() + bytes <= limits.bytes;
        let node = if metadata.is_dir() {
            fs::create_dir(&to).context(|| format!("cannot make {}", to.display()))?;
            Node::Directory
        } else if metadata.is_symlink() {
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            symlink(&target, &to).context(|| format!("cannot make {}", to.display()))?;
            Node::Link(target)
        } else if metadata.is_file() && fits && fs::File::open(entry.path()).is_ok() {
            let digest = stop.bound(|stop| tree::copy_file(entry.path(), &to, stop))?;
            let mode = fs::Permissions::from_mode(metadata.permissions().mode() & 0o777);
            fs::set_permissions(&to, mode).context(|| format!("cannot finish {}", to.display()))?;
            files += 1;
            bytes += metadata.len();
            Node::File(digest)
        } else {
            continue;
        };
        tree.insert(&name, node);
        if files >= limits.files {
            break;
        }
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_what_it_says_and_keeps_the_limits() {
        let directory = tempfile::tempdir().unwrap();
        let (source, root) = (directory.path().join("s"), directory.path().join("r"));
        fs::create_dir_all(source.join("d")).unwrap();
        (0..9).for_each(|n| fs::write(source.join(format!("d/{n}")), vec![n; 10]).unwrap());
        fs::write(source.join("d/0big"), vec![0; 100]).unwrap();
        symlink("d/1", source.join("link")).unwrap();

        let limits = Limits {
            files: 4,
            bytes: 1_000,
            file_bytes: 50,
        };
        let copied = copy(&source, &root, Path::new("x/y"), limits, &Stop::never()).unwrap();
        assert_eq!(copied.files().count(), 4);
        assert!(!copied.contains(Path::new("x/y/d/0big")));
        assert_eq!(Tree::read(&root, &|| false, || ()).unwrap(), copied);
    }

    #[test]
    fn chooses_directories_that_are_apart() {
        let chosen = choose(5);
        assert!(!chosen.is_empty());
        for (index, one) in chosen.iter().enumerate() {
            assert!(
                chosen[index + 1..]
                    .iter()
                    .all(|other| !other.starts_with(one))
            );
        }
    }
}
