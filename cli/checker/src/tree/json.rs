//! Trees as JSON, for one that was read on another machine.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{FileDigest, Node, Tree};

#[derive(Serialize, Deserialize)]
struct Json {
    nodes: Vec<(Name, Kind)>,
    opaque: Vec<Name>,
}

/// A name is text, as almost all are, or else its bytes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Name {
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Directory,
    /// The digest in hexadecimal.
    File(String),
    Link(Name),
    Special,
    Whiteout,
}

impl From<&Path> for Name {
    fn from(path: &Path) -> Self {
        match path.to_str() {
            Some(text) => Name::Text(text.to_owned()),
            None => Name::Bytes(path.as_os_str().as_bytes().to_vec()),
        }
    }
}

impl From<Name> for PathBuf {
    fn from(name: Name) -> Self {
        match name {
            Name::Text(text) => text.into(),
            Name::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

impl Name {
    /// The name of something in a tree: below its root, and nowhere else.
    fn within(self) -> Result<PathBuf, String> {
        let path = PathBuf::from(self);
        let mut parts = path.components();
        let stays = parts.all(|part| matches!(part, Component::Normal(_)));
        match stays && !path.as_os_str().is_empty() {
            true => Ok(path),
            false => Err(format!("{path:?} is no name in a tree")),
        }
    }
}

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let kind = |node: &Node| match node {
            Node::Directory => Kind::Directory,
            Node::File(digest) => Kind::File(to_hex(digest)),
            Node::Link(to) => Kind::Link(to.as_path().into()),
            Node::Special => Kind::Special,
            Node::Whiteout => Kind::Whiteout,
        };
        let nodes = self.nodes.iter();
        let json = Json {
            nodes: nodes
                .map(|(name, node)| (name.as_path().into(), kind(node)))
                .collect(),
            opaque: self
                .opaque
                .iter()
                .map(|name| name.as_path().into())
                .collect(),
        };
        json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Json::deserialize(deserializer)?;
        let mut tree = Tree::default();
        for (name, kind) in json.nodes {
            let node = match kind {
                Kind::Directory => Node::Directory,
                Kind::File(hex) => {
                    let digest = from_hex(&hex);
                    Node::File(digest.ok_or_else(|| D::Error::custom("a digest is 64 digits"))?)
                }
                Kind::Link(to) => Node::Link(to.into()),
                Kind::Special => Node::Special,
                Kind::Whiteout => Node::Whiteout,
            };
            let name = name.within().map_err(D::Error::custom)?;
            tree.nodes.insert(name, node);
        }
        for name in json.opaque {
            tree.opaque.insert(name.within().map_err(D::Error::custom)?);
        }
        Ok(tree)
    }
}

fn to_hex(digest: &FileDigest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<FileDigest> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect();
    let bytes: Vec<u8> = digits?
        .chunks_exact(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect();
    match text.len() == 2 * size_of::<FileDigest>() {
        true => bytes.try_into().ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_comes_back_as_it_was() {
        let mut tree = Tree::default();
        let odd = PathBuf::from(OsString::from_vec(b"d/\xff\n".to_vec()));
        tree.insert(&odd, Node::File([0xa7; 32]));
        tree.insert(Path::new("l"), Node::Link("/nowhere/..".into()));
        tree.insert(Path::new("s"), Node::Special);
        tree.insert(Path::new("w"), Node::Whiteout);
        tree.opaque.insert("d".into());
        let text = serde_json::to_string(&tree).unwrap();
        assert_eq!(serde_json::from_str::<Tree>(&text).unwrap(), tree);
        assert!(text.contains(r#""w","whiteout""#), "{text}");
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        for (name, node) in [
            (r#""/etc""#, r#""directory""#),
            (r#""a/../b""#, r#""directory""#),
            (r#""""#, r#""directory""#),
            (r#""a""#, r#"{"file":"00"}"#),
            (r#""a""#, r#""other""#),
            ("[256]", r#""directory""#),
        ] {
            let text = format!(r#"{{"nodes":[[{name},{node}]],"opaque":[]}}"#);
            assert!(serde_json::from_str::<Tree>(&text).is_err(), "{text}");
        }
        let digits = format!(
            r#"{{"nodes":[["a",{{"file":"{}"}}]],"opaque":[]}}"#,
            "é".repeat(32)
        );
        assert!(serde_json::from_str::<Tree>(&digits).is_err());
    }
}
