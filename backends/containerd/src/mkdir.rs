//! `mkdir/`: directories that are made before a mount.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::words::OWN;

/// A directory that is made before a mount, where it is missing. Its parent must be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Where, in what an earlier mount has.
    pub place: Place,
    /// The permissions: 0700 unless others are asked for.
    pub mode: u32,
    /// User and group, if others than those of who makes it are asked for.
    pub owner: Option<(u32, u32)>,
}

/// Takes the options of `mkdir/` out of those of a mount.
pub(crate) fn take(
    options: &mut Vec<String>,
    root: &Path,
    mounts: usize,
) -> Result<Vec<Directory>, String> {
    let own = |option: &str| {
        let own = option.strip_prefix(OWN)?.strip_prefix("mkdir.")?;
        Some(own.to_owned())
    };
    let wanted: Vec<String> = options.iter().filter_map(|option| own(option)).collect();
    options.retain(|option| own(option).is_none());
    wanted
        .iter()
        .map(|option| directory(option, root, mounts))
        .collect()
}

fn directory(option: &str, root: &Path, mounts: usize) -> Result<Directory, String> {
    let wrong = |what: &str| {
        format!("{OWN}mkdir.{option}: {what}; it is path=DIRECTORY[:MODE[:USER:GROUP]]")
    };
    let value = option
        .strip_prefix("path=")
        .ok_or_else(|| wrong("an unknown option"))?;
    let parts: Vec<&str> = value.splitn(4, ':').collect();
    let id = |text: &str, what| text.parse::<u32>().map_err(|_| wrong(what));
    let (path, mode, owner) = match parts[..] {
        [path] => (path, None, None),
        [path, mode] => (path, Some(mode), None),
        [path, mode, user, group] => {
            let owner = (
                id(user, "no number of a user")?,
                id(group, "no number of a group")?,
            );
            (path, Some(mode), Some(owner))
        }
        _ => return Err(wrong("a user without a group")),
    };
    let mode = match mode {
        None => 0o700,
        Some(mode) => u32::from_str_radix(mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| wrong("no octal permissions up to 0777"))?,
    };
    let place =
        Place::of(path, root, mounts)?.ok_or_else(|| wrong("not in what an earlier mount has"))?;
    if place.subpath.as_os_str().is_empty() {
        return Err(wrong("a mount point, which is there"));
    }
    Ok(Directory { place, mode, owner })
}
