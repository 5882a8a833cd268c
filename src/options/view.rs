//! How a view shows a mount.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{InvalidOptions, MountFlags, MountOptions, Propagation};

/// How many ranges a map has at most. (`UID_GID_MAP_MAX_EXTENTS` of Linux)
const MOST_RANGES: usize = 340;

/// How a view shows a mount: what it refuses beyond what the mount refuses, which directory of it appears, and with which
/// owners.
///
/// ```
/// use blockmount::{IdMap, ViewOptions};
///
/// let options = ViewOptions::new(["ro", "nosuid", "noexec"])?
///     .with_subpath("data/db")?
///     .with_id_map("0:100000:65536".parse::<IdMap>()?);
/// assert!(options.is_read_only());
/// assert!(ViewOptions::default().with_subpath("../etc").is_err());
/// assert!(ViewOptions::new(["noload"]).is_err());
/// # Ok::<(), blockmount::InvalidOptions>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Spelled", into = "Spelled")]
pub struct ViewOptions {
    read_only: bool,
    flags: MountFlags,
    propagation: Option<Propagation>,
    subpath: PathBuf,
    id_map: Option<IdMap>,
    new_directory: Option<NewDirectory>,
}

/// A directory that is made where it is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDirectory {
    /// Its permissions: at most `0o7777`.
    pub mode: u32,
    /// Its user.
    pub user: u32,
    /// Its group.
    pub group: u32,
}

/// As they travel: what is at its default is left out, and a field that the reader does not know is an error.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Spelled {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    options: Vec<String>,
    #[serde(skip_serializing_if = "is_empty")]
    subpath: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    id_map: Option<IdMap>,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_directory: Option<NewDirectory>,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

impl ViewOptions {
    /// Options by their names in mount(8): `ro`, `nosuid`, `nodev`, `noexec`, `noatime`, `nodiratime`, `strictatime`,
    /// `nosymfollow`, and `rshared` and the like. A view never allows what its mount refuses: `rw` and `exec` change nothing.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions`] where two exclude each other, and for those that belong to the filesystem, which all views of a
    /// mount have in common.
    pub fn new<S: Into<String>>(
        options: impl IntoIterator<Item = S>,
    ) -> Result<Self, InvalidOptions> {
        let options = MountOptions::builder().options(options).build()?;
        let of_superblock = options.flags().iter().find(|flag| flag.is_of_superblock());
        let of_superblock = of_superblock.map(|flag| flag.name().to_owned());
        if let Some(option) = options.data().first().cloned().or(of_superblock) {
            let reason = "it belongs to the filesystem, which all views of a mount have in common";
            return Err(InvalidOptions::Inapplicable(option, reason));
        }
        Ok(ViewOptions {
            read_only: options.is_read_only(),
            flags: options.flags(),
            propagation: options.propagation(),
            ..ViewOptions::default()
        })
    }

    /// The same of a directory of the mount, by its path from the mount's root. No link is followed on the way to it, and no
    /// other mount is entered.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions::Malformed`] if it is not a plain relative path.
    pub fn with_subpath(mut self, subpath: impl AsRef<Path>) -> Result<Self, InvalidOptions> {
        let subpath = subpath.as_ref();
        let malformed = |reason| {
            let shown: String = subpath.to_string_lossy().chars().take(128).collect();
            Err(InvalidOptions::Malformed(
                format!("subpath {shown}"),
                reason,
            ))
        };
        let mut parts = subpath.components();
        if !parts.all(|part| matches!(part, Component::Normal(_))) {
            return malformed("it is not a plain path from the root of the mount");
        }
        let bytes = subpath.as_os_str().as_encoded_bytes();
        if bytes.contains(&0) || bytes.len() > 4095 {
            return malformed("a path has no zero byte, and at most 4,095 bytes");
        }
        self.subpath = subpath.components().collect();
        Ok(self)
    }

    /// The same with other owners of the files.
    #[must_use]
    pub fn with_id_map(mut self, map: IdMap) -> Self {
        self.id_map = Some(map);
        self
    }

    /// The same of a directory that is made where it is missing: the last one of the [subpath](Self::with_subpath), whose parent
    /// must be there. One that is there is shown as it is. It stays when the view goes.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions::Malformed`] without a subpath, and for permissions that are none.
    pub fn with_new_directory(mut self, directory: NewDirectory) -> Result<Self, InvalidOptions> {
        let malformed = |reason| {
            let what = format!("new directory {:o}", directory.mode);
            Err(InvalidOptions::Malformed(what, reason))
        };
        if self.subpath.as_os_str().is_empty() {
            return malformed("the root of a mount is there; name a subpath");
        }
        if directory.mode > 0o7777 {
            return malformed("permissions are at most 7777, in octal");
        }
        self.new_directory = Some(directory);
        Ok(self)
    }

    /// Whether writing through the view is refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The flags that the view has in addition to those of its mount.
    pub fn flags(&self) -> MountFlags {
        self.flags
    }

    /// Whether mounts below the view appear elsewhere, and others below it. Without one, nothing that is mounted below the
    /// view appears below its mount, and the other way round.
    pub fn propagation(&self) -> Option<Propagation> {
        self.propagation
    }

    /// The directory of the mount that appears; its root if it is empty.
    pub fn subpath(&self) -> &Path {
        &self.subpath
    }

    /// How the directory is made, if it is made where it is missing.
    pub fn new_directory(&self) -> Option<NewDirectory> {
        self.new_directory
    }

    /// The owners that files appear with.
    pub fn id_map(&self) -> Option<&IdMap> {
        self.id_map.as_ref()
    }
}

impl TryFrom<Spelled> for ViewOptions {
    type Error = InvalidOptions;

    fn try_from(spelled: Spelled) -> Result<Self, InvalidOptions> {
        let mut options = ViewOptions::new(spelled.options)?.with_subpath(spelled.subpath)?;
        options.id_map = spelled.id_map;
        match spelled.new_directory {
            Some(directory) => options.with_new_directory(directory),
            None => Ok(options),
        }
    }
}

impl From<ViewOptions> for Spelled {
    fn from(options: ViewOptions) -> Self {
        let mut words: Vec<String> = Vec::new();
        words.extend(options.read_only.then(|| "ro".to_owned()));
        words.extend(options.flags.iter().map(|flag| flag.name().to_owned()));
        words.extend(options.propagation.map(|mode| mode.to_string()));
        Spelled {
            options: words,
            subpath: options.subpath,
            id_map: options.id_map,
            new_directory: options.new_directory,
        }
    }
}

/// Which owners the files of a mount appear with.
///
/// Its text has ranges as mount(8) takes them in `X-mount.idmap`: `u:1000:0:1` shows files of user 1000 as files of root,
/// `g:` is for groups, and `b:` or neither for both; several are separated by spaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ranges", into = "Ranges")]
pub struct IdMap {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

/// Owners that appear as others, which follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// The first one as the filesystem has it.
    pub stored: u32,
    /// What that appears as.
    pub shown: u32,
    /// How many there are.
    pub count: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ranges {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    users: Vec<IdRange>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    groups: Vec<IdRange>,
}

impl IdMap {
    /// A map of users and of groups. Whoever is in none of the ranges appears as `nobody` (65534), and cannot own a new file.
    /// Where there are no ranges at all, users or groups appear as they are.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions::Malformed`] if there are no ranges, more than 340 of a kind, or some that are empty, too long or
    /// overlap.
    pub fn new(users: Vec<IdRange>, groups: Vec<IdRange>) -> Result<Self, InvalidOptions> {
        let malformed = |reason| Err(InvalidOptions::Malformed("id map".to_owned(), reason));
        if users.is_empty() && groups.is_empty() {
            return malformed("it has no ranges");
        }
        for ranges in [&users, &groups] {
            if ranges.len() > MOST_RANGES {
                return malformed("it has more than 340 ranges");
            }
            for side in [
                |range: &IdRange| range.stored,
                |range: &IdRange| range.shown,
            ] {
                let span =
                    |range: &IdRange| Some((side(range), side(range).checked_add(range.count)?));
                let spans: Option<Vec<_>> = ranges.iter().map(span).collect();
                let Some(mut spans) = spans else {
                    return malformed("a range goes beyond the last id");
                };
                spans.sort_unstable();
                if spans.iter().any(|(start, end)| start == end) {
                    return malformed("a range is empty");
                }
                if spans.windows(2).any(|pair| pair[0].1 > pair[1].0) {
                    return malformed("two ranges overlap");
                }
            }
        }
        Ok(IdMap { users, groups })
    }

    /// The ranges of users.
    pub fn users(&self) -> &[IdRange] {
        &self.users
    }

    /// The ranges of groups.
    pub fn groups(&self) -> &[IdRange] {
        &self.groups
    }
}

impl TryFrom<Ranges> for IdMap {
    type Error = InvalidOptions;

    fn try_from(ranges: Ranges) -> Result<Self, InvalidOptions> {
        IdMap::new(ranges.users, ranges.groups)
    }
}

impl From<IdMap> for Ranges {
    fn from(IdMap { users, groups }: IdMap) -> Self {
        Ranges { users, groups }
    }
}

impl FromStr for IdMap {
    type Err = InvalidOptions;

    fn from_str(text: &str) -> Result<Self, InvalidOptions> {
        let (mut users, mut groups) = (Vec::new(), Vec::new());
        for word in text.split_whitespace() {
            let (kind, numbers) = match word.split_at_checked(2) {
                Some((kind @ ("u:" | "g:" | "b:"), numbers)) => (kind, numbers),
                _ => ("b:", word),
            };
            let numbers: Vec<_> = numbers.split(':').map(str::parse).collect();
            let [Ok(stored), Ok(shown), Ok(count)] = numbers[..] else {
                let shown: String = word.chars().take(64).collect();
                let reason = "a range is STORED:SHOWN:COUNT, such as u:1000:0:1";
                return Err(InvalidOptions::Malformed(format!("id map {shown}"), reason));
            };
            let range = IdRange {
                stored,
                shown,
                count,
            };
            if kind != "g:" {
                users.push(range);
            }
            if kind != "u:" {
                groups.push(range);
            }
        }
        IdMap::new(users, groups)
    }
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let users = self.users.iter().map(|range| ("u", range));
        let all = users.chain(self.groups.iter().map(|range| ("g", range)));
        for (index, (kind, range)) in all.enumerate() {
            let IdRange {
                stored,
                shown,
                count,
            } = range;
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{kind}:{stored}:{shown}:{count}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_filesystem_are_refused() {
        for option in ["noload", "sync", "device=/dev/x", "bind"] {
            assert!(ViewOptions::new([option]).is_err(), "{option}");
        }
        assert!(ViewOptions::new(["exec", "noexec"]).is_err());
        let options = ViewOptions::new(["rw", "exec", "relatime"]).unwrap();
        assert_eq!(options, ViewOptions::default());
    }

    #[test]
    fn a_subpath_leads_nowhere_else() {
        let with = |path: &str| ViewOptions::default().with_subpath(path);
        for path in ["/etc", "..", "a/../../b", "a/..", "a\0b"] {
            assert!(with(path).is_err(), "{path:?}");
        }
        assert_eq!(with("a//b/./c/").unwrap(), with("a/b/c").unwrap());
    }

    #[test]
    fn maps_are_read_and_checked() {
        let map: IdMap = "u:1000:0:1 g:5:6:7".parse().unwrap();
        assert_eq!(map.to_string().parse(), Ok(map.clone()));
        assert_eq!((map.users().len(), map.groups()[0].shown), (1, 6));
        for text in [
            "",
            "1:2",
            "1:2:3:4",
            "1:2:0",
            "x:1:2:3",
            "0:4294967295:1",
            "0:0:2 1:5:1",
            "0:0:2 5:1:2",
            "-1:0:1",
        ] {
            assert!(text.parse::<IdMap>().is_err(), "{text:?}");
        }
        let longest: IdMap = "0:1:4294967294".parse().unwrap();
        assert_eq!(longest.users(), longest.groups());
    }

    #[test]
    fn what_travels_is_the_same_at_the_other_end() {
        let options = ViewOptions::new(["ro", "noexec", "rslave"]).unwrap();
        let options = options.with_subpath("a/b").unwrap();
        let options = options.with_id_map("u:1:2:3".parse().unwrap());
        let new = NewDirectory {
            mode: 0o750,
            user: 1,
            group: 2,
        };
        let options = options.with_new_directory(new).unwrap();
        for options in [options, ViewOptions::default()] {
            let text = serde_json::to_string(&options).unwrap();
            assert_eq!(serde_json::from_str::<ViewOptions>(&text).unwrap(), options);
        }
        for text in [
            r#"{"subpath":"../x"}"#,
            r#"{"options":["noload"]}"#,
            r#"{"new":1}"#,
            r#"{"id_map":{}}"#,
            r#"{"new_directory":{"mode":448,"user":0,"group":0}}"#,
            r#"{"subpath":"a","new_directory":{"mode":4096,"user":0,"group":0}}"#,
        ] {
            assert!(serde_json::from_str::<ViewOptions>(text).is_err(), "{text}");
        }
    }
}
