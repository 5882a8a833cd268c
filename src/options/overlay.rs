//! How layers are stacked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::InvalidOptions;
use super::builder::unquoted_label;

/// Each option of an overlay, and the values that it may have; none for a word that has no value, and `*` for a label.
const KNOWN: [(&str, &[&str]); 13] = [
    ("context", &["*"]),
    ("defcontext", &["*"]),
    ("fscontext", &["*"]),
    ("index", &["on", "off"]),
    ("metacopy", &["on", "off"]),
    ("nfs_export", &["on", "off"]),
    ("redirect_dir", &["on", "off", "follow", "nofollow"]),
    ("rootcontext", &["*"]),
    ("userxattr", &[]),
    ("uuid", &["auto", "on", "off", "null"]),
    ("verity", &["off", "on", "require"]),
    ("volatile", &[]),
    ("xino", &["on", "off", "auto"]),
];

/// Options that exclude each other: the kernel would refuse them, or silently do without one.
const EXCLUSIVE: [(&str, &str); 8] = [
    ("userxattr", "metacopy=on"),
    ("userxattr", "redirect_dir=on"),
    ("userxattr", "redirect_dir=follow"),
    ("verity=on", "metacopy=off"),
    ("verity=require", "metacopy=off"),
    ("verity=on", "userxattr"),
    ("verity=require", "userxattr"),
    ("nfs_export=on", "metacopy=on"),
];

/// How layers are stacked: the options of overlayfs, by their names in its documentation, but for its directories.
///
/// What is not said is as the guest's kernel has it. Options compare equal in any order.
///
/// ```
/// use blockmount::OverlayOptions;
///
/// let options = OverlayOptions::new(["volatile", "metacopy=on"])?;
/// assert!(options.needs_scratch());
/// assert!(OverlayOptions::new(["lowerdir=/etc"]).is_err());
/// assert!(OverlayOptions::new(["userxattr", "metacopy=on"]).is_err());
/// # Ok::<(), blockmount::InvalidOptions>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct OverlayOptions(Vec<String>);

impl OverlayOptions {
    /// `volatile` (nothing is written back, for what ends with the container; Linux 5.10), `metacopy=`, `redirect_dir=`,
    /// `index=`, `nfs_export=`, `uuid=` and `xino=` with their values, `userxattr` (5.11), `verity=on` or `require` (6.6), and
    /// the labels of SELinux: `context=`, `fscontext=`, `defcontext=`, `rootcontext=`.
    ///
    /// A kernel may do without `metacopy`, `index` and `xino`, and says so in its log, where the filesystem of the scratch
    /// cannot have them.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions`] for other options and values, and where two exclude each other.
    pub fn new<S: Into<String>>(
        options: impl IntoIterator<Item = S>,
    ) -> Result<Self, InvalidOptions> {
        let mut known: BTreeMap<String, String> = BTreeMap::new();
        for option in options {
            let option = validate(option.into())?;
            let name = option.split('=').next().unwrap_or(&option).to_owned();
            let first = known.entry(name).or_insert_with(|| option.clone());
            if *first != option {
                return Err(InvalidOptions::Contradiction(option, first.clone()));
            }
        }
        let options: Vec<String> = known.into_values().collect();
        let has = |wanted: &str| options.iter().any(|option| option == wanted);
        match EXCLUSIVE.iter().find(|(one, other)| has(one) && has(other)) {
            Some((one, other)) => Err(InvalidOptions::Contradiction(
                (*one).to_owned(),
                (*other).to_owned(),
            )),
            None => Ok(OverlayOptions(options)),
        }
    }

    /// The options, each `name` or `name=value`, sorted.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them is only for a tree that can be written to.
    pub fn needs_scratch(&self) -> bool {
        self.0.iter().any(|option| option == "volatile")
    }
}

/// An option in the form that the kernel takes.
fn validate(option: String) -> Result<String, InvalidOptions> {
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (&*option, None),
    };
    let Some((_, values)) = KNOWN.iter().find(|(known, _)| *known == name) else {
        let reason = "it is none of an overlay, or says which directories it has";
        return Err(InvalidOptions::Inapplicable(option, reason));
    };
    let malformed = |reason| Err(InvalidOptions::Malformed(option.clone(), reason));
    match (value, *values) {
        (None, []) => Ok(option),
        (Some(label), ["*"]) => {
            let bad = |c: char| c.is_control() || c == '"';
            let unquoted = unquoted_label(&option).unwrap_or_else(|| option.clone());
            let inner = unquoted.split_once('=').map_or("", |(_, label)| label);
            match label.is_empty() || inner.is_empty() || inner.contains(bad) {
                true => malformed("it is no label"),
                false => Ok(unquoted),
            }
        }
        (Some(value), values) if values.contains(&value) => Ok(option),
        _ => malformed("it does not have such a value"),
    }
}

impl TryFrom<Vec<String>> for OverlayOptions {
    type Error = InvalidOptions;

    fn try_from(options: Vec<String>) -> Result<Self, InvalidOptions> {
        OverlayOptions::new(options)
    }
}

impl From<OverlayOptions> for Vec<String> {
    fn from(OverlayOptions(options): OverlayOptions) -> Self {
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_known_and_agree() {
        for options in [
            &["lowerdir=/etc"][..],
            &["upperdir=x"],
            &["metacopy"],
            &["metacopy=maybe"],
            &["volatile=on"],
            &["context="],
            &["context=\"\""],
            &["context=a\nb"],
            &["index=on", "index=off"],
            &["verity=require", "metacopy=off"],
            &["nodev"],
            &[""],
        ] {
            let tried = OverlayOptions::new(options.iter().copied());
            assert!(tried.is_err(), "{options:?}");
        }
        let one = OverlayOptions::new(["xino=auto", "context=\"a:b,c\"", "volatile"]).unwrap();
        let other = ["volatile", "volatile", "context=a:b,c", "xino=auto"];
        assert_eq!(one, OverlayOptions::new(other).unwrap());
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(text, r#"["context=a:b,c","volatile","xino=auto"]"#);
        assert_eq!(serde_json::from_str::<OverlayOptions>(&text).unwrap(), one);
        assert!(serde_json::from_str::<OverlayOptions>(r#"["lowerdir=/"]"#).is_err());
    }
}
