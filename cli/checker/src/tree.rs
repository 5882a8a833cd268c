//! What is in a tree of files: read from a directory, merged as an overlay does, and compared.

mod json;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, FileType, Metadata};
use std::io::{self, Read};
use std::ops::Bound;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use crate::Context;

/// The content of a file, as SHA-256.
pub type FileDigest = [u8; 32];

/// Asked now and then by work that blocks: whether it is to stop.
pub type Stop<'a> = &'a dyn Fn() -> bool;

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file with this content.
    File(FileDigest),
    /// A symbolic link to this.
    Link(PathBuf),
    /// A device, socket or pipe; only its being there is compared.
    Special,
    /// The mark of an overlay that the name is removed from what lies below.
    Whiteout,
}

/// Every name of a tree, relative to its root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<PathBuf, Node>,
    /// Directories that hide what layers below have under the same name.
    opaque: BTreeSet<PathBuf>,
}

/// How a tree that was seen differs from what it should be.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Regular files whose digest was compared.
    pub files: u64,
    /// One line for each name that is missing, too many, or different.
    pub mismatches: Vec<String>,
}

impl Tree {
    /// Reads all below `root`, calling `seen` once a file, unless it is told to stop. Blocks.
    ///
    /// # Errors
    ///
    /// `Interrupted` when it was told to stop, else what could not be read.
    #[expect(
        clippy::missing_panics_doc,
        reason = "what is found below a root starts with it"
    )]
    pub fn read(root: &Path, stop: Stop<'_>, seen: impl Fn()) -> io::Result<Self> {
        let mut tree = Tree::default();
        for entry in WalkDir::new(root).min_depth(1) {
            let entry = entry.context(|| format!("cannot read the tree at {}", root.display()))?;
            let path = entry.path();
            let name = path
                .strip_prefix(root)
                .expect("what is found below a root starts with it");
            let node = read_node(path, entry.file_type(), stop)
                .context(|| format!("cannot read {}", path.display()))?;
            if node == Node::Directory && is_opaque(path) {
                tree.opaque.insert(name.to_owned());
            }
            if matches!(node, Node::File(_)) {
                seen();
            }
            tree.nodes.insert(name.to_owned(), node);
        }
        Ok(tree)
    }

    /// Adds a name, and the directories above it.
    pub fn insert(&mut self, name: &Path, node: Node) {
        for directory in name
            .ancestors()
            .skip(1)
            .filter(|name| !name.as_os_str().is_empty())
        {
            self.nodes
                .entry(directory.to_owned())
                .or_insert(Node::Directory);
        }
        self.nodes.insert(name.to_owned(), node);
    }

    /// What an overlay of these layers shows, the topmost first.
    pub fn merged<'a>(layers: impl DoubleEndedIterator<Item = &'a Tree>) -> Self {
        let mut merged = Tree::default();
        for layer in layers.rev() {
            for (name, node) in &layer.nodes {
                merged.cover(name, node, layer.opaque.contains(name));
            }
        }
        merged
    }

    /// Puts a name of an upper layer over what is there.
    fn cover(&mut self, name: &Path, node: &Node, opaque: bool) {
        let merges =
            *node == Node::Directory && self.nodes.get(name) == Some(&Node::Directory) && !opaque;
        if !merges {
            self.remove(name);
        }
        if *node != Node::Whiteout {
            self.nodes.insert(name.to_owned(), node.clone());
        }
    }

    /// Removes a name and all below it.
    pub fn remove(&mut self, name: &Path) {
        self.nodes.remove(name);
        // Paths are ordered by component, so that all below a name follows it at once.
        let below = self
            .nodes
            .range::<Path, _>((Bound::Excluded(name), Bound::Unbounded));
        let below: Vec<PathBuf> = below
            .map(|(path, _)| path)
            .take_while(|path| path.starts_with(name))
            .cloned()
            .collect();
        for path in below {
            self.nodes.remove(&path);
        }
    }

    /// Compares what was seen with this tree.
    pub fn compare(&self, seen: &Tree) -> Comparison {
        let mut comparison = Comparison::default();
        for (name, node) in &seen.nodes {
            let expected = self.nodes.get(name);
            if let (Node::File(_), Some(Node::File(_))) = (node, expected) {
                comparison.files += 1;
            }
            let problem = match (node, expected) {
                (Node::Whiteout, None) => continue,
                (node, Some(expected)) if node == expected => continue,
                (Node::File(_), Some(Node::File(_))) => "has another content",
                (Node::Link(_), Some(Node::Link(_))) => "points elsewhere",
                (_, Some(_)) => "is of another type",
                (_, None) => "should not be there",
            };
            comparison
                .mismatches
                .push(format!("{} {problem}", name.display()));
        }
        let missing = self
            .nodes
            .keys()
            .filter(|name| !seen.nodes.contains_key(*name));
        comparison
            .mismatches
            .extend(missing.map(|name| format!("{} is missing", name.display())));
        comparison
    }

    /// The regular files in it, with their digests.
    pub fn files(&self) -> impl DoubleEndedIterator<Item = (&Path, &FileDigest)> {
        self.nodes.iter().filter_map(|(name, node)| match node {
            Node::File(digest) => Some((name.as_path(), digest)),
            _ => None,
        })
    }

    /// Whether a name is in it.
    pub fn contains(&self, name: &Path) -> bool {
        self.nodes.contains_key(name)
    }
}

fn read_node(path: &Path, kind: FileType, stop: Stop<'_>) -> io::Result<Node> {
    if kind.is_dir() {
        Ok(Node::Directory)
    } else if kind.is_file() {
        Ok(Node::File(digest(
            &mut File::open(path)?,
            &mut io::sink(),
            stop,
        )?))
    } else if kind.is_symlink() {
        Ok(Node::Link(std::fs::read_link(path)?))
    } else if kind.is_char_device() {
        match path.symlink_metadata() {
            // An overlay lists the whiteouts of its lowest layer, but does not find them.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Node::Whiteout),
            metadata => Ok(if is_whiteout(&metadata?) {
                Node::Whiteout
            } else {
                Node::Special
            }),
        }
    } else {
        Ok(Node::Special)
    }
}

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Whether an overlay takes the directory for one that hides those below.
fn is_opaque(directory: &Path) -> bool {
    let mut value = [0; 1];
    let found = rustix::fs::lgetxattr(directory, "trusted.overlay.opaque", &mut value);
    matches!(found, Ok(1)) && value == *b"y"
}

/// Digests what a reader gives, and passes it on.
fn digest(from: &mut impl Read, to: &mut impl io::Write, stop: Stop<'_>) -> io::Result<FileDigest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        // Sources can be large and slow; a signal does not wait for the end of one.
        if stop() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match from.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            length => {
                hasher.update(&buffer[..length]);
                to.write_all(&buffer[..length])?;
            }
        }
    }
}

/// Copies a regular file, and digests what was read. Blocks.
///
/// # Errors
///
/// As [`Tree::read`], also for what cannot be written.
pub fn copy_file(from: &Path, to: &Path, stop: Stop<'_>) -> io::Result<FileDigest> {
    let copy = || digest(&mut File::open(from)?, &mut File::create_new(to)?, stop);
    copy().context(|| format!("cannot read {}", from.display()))
}

/// The digest of a file's content.
pub fn digest_bytes(bytes: &[u8]) -> FileDigest {
    Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(names: &[(&str, Node)]) -> Tree {
        let mut tree = Tree::default();
        names
            .iter()
            .for_each(|(name, node)| tree.insert(Path::new(name), node.clone()));
        tree
    }

    fn file(content: u8) -> Node {
        Node::File([content; 32])
    }

    #[test]
    fn the_topmost_wins_and_directories_merge() {
        let top = tree(&[("d/a", file(1)), ("x", file(1))]);
        let base = tree(&[("d/a", file(2)), ("d/b", file(2)), ("x/y", file(2))]);
        let expected = tree(&[("d/a", file(1)), ("d/b", file(2)), ("x", file(1))]);
        assert_eq!(Tree::merged([&top, &base].into_iter()), expected);
    }

    #[test]
    fn whiteouts_and_opaque_directories_hide() {
        let mut top = tree(&[("gone", Node::Whiteout), ("d/new", file(1))]);
        top.opaque.insert("d".into());
        let base = tree(&[("gone/a", file(2)), ("gone2", file(2)), ("d/old", file(2))]);
        let expected = tree(&[("gone2", file(2)), ("d/new", file(1))]);
        let merged = Tree::merged([&top, &base].into_iter());
        assert_eq!(merged.nodes, expected.nodes);
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let expected = tree(&[
            ("a", file(1)),
            ("b", file(1)),
            ("c", Node::Link("x".into())),
            ("e", file(1)),
        ]);
        let seen = tree(&[
            ("a", file(2)),
            ("b", Node::Directory),
            ("c", Node::Link("y".into())),
            ("d", Node::Special),
        ]);
        let comparison = expected.compare(&seen);
        assert_eq!(comparison.files, 1);
        assert_eq!(
            comparison.mismatches,
            [
                "a has another content",
                "b is of another type",
                "c points elsewhere",
                "d should not be there",
                "e is missing"
            ]
        );
        assert!(expected.compare(&expected).mismatches.is_empty());
    }

    #[test]
    fn reads_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir(root.join("d")).unwrap();
        std::fs::write(root.join("d/f"), "content").unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("l")).unwrap();
        let expected = tree(&[
            ("d/f", Node::File(digest_bytes(b"content"))),
            ("l", Node::Link("nowhere".into())),
        ]);
        assert_eq!(Tree::read(root, &|| false, || ()).unwrap(), expected);
    }
}
