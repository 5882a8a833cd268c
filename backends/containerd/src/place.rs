//! A place in what an earlier mount of the list has.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A directory, file or device in what an earlier mount has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The number of the mount, from 0.
    pub step: usize,
    /// Where in it: names alone, no `..`; empty for its root.
    pub subpath: PathBuf,
}

impl Place {
    /// The place of a path below the mount points of a plan, which are `ROOT/0`, `ROOT/1` and so on, as far as there are any.
    ///
    /// `Ok(None)` if it is elsewhere, and thus on the host.
    pub(crate) fn of(path: &str, root: &Path, mounts: usize) -> Result<Option<Place>, String> {
        let Ok(below) = Path::new(path).strip_prefix(root) else {
            return Ok(None);
        };
        let mut names = below.components();
        let number = match names.next() {
            Some(Component::Normal(name)) => name.to_str().and_then(|name| name.parse().ok()),
            _ => None,
        };
        let Some(step) = number.filter(|step| *step < mounts) else {
            return Err(format!("{path:?} is below no mount that comes before"));
        };
        let subpath = names.as_path();
        let is_name = |component| matches!(component, Component::Normal(_));
        if !subpath.components().all(is_name) {
            return Err(format!("{path:?} leads out of mount {step}"));
        }
        Ok(Some(Place {
            step,
            subpath: subpath.components().collect(),
        }))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subpath.as_os_str().is_empty() {
            true => write!(formatter, "mount {}", self.step),
            false => write!(formatter, "{:?} in mount {}", self.subpath, self.step),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_below_mounts_that_come_before() {
        let of = |path| Place::of(path, Path::new("/run/x"), 2);
        let place = of("/run/x/1//upper/./a").unwrap().unwrap();
        assert_eq!(place.to_string(), "\"upper/a\" in mount 1");
        assert_eq!(of("/run/x/0").unwrap().unwrap().to_string(), "mount 0");
        assert_eq!(of("/run/xy/0"), Ok(None));
        assert_eq!(of("run/x/0"), Ok(None));
        for wrong in [
            "/run/x",
            "/run/x/2",
            "/run/x/01x",
            "/run/x/../x/0",
            "/run/x/0/../1",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
