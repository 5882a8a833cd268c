//! Making a filesystem before it is mounted.

use serde::{Deserialize, Serialize};

use super::InvalidOptions;
use super::builder::well_formed_filesystem;

/// The longest label of any filesystem that is made, in bytes: that of ext4.
const LONGEST_LABEL: usize = 16;

/// Making a filesystem where there is none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Format {
    /// The filesystem to make.
    pub filesystem: String,
    /// What may be overwritten.
    #[serde(default, skip_serializing_if = "Overwrite::is_blank")]
    pub overwrite: Overwrite,
    /// The label of a filesystem that is made; one that is there already keeps its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The UUID of a filesystem that is made, in lower case with hyphens; a random one if none. One that is there
    /// already keeps its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

impl Format {
    /// Makes `filesystem` on a device that is blank.
    pub fn new(filesystem: impl Into<String>) -> Self {
        Format {
            filesystem: filesystem.into(),
            overwrite: Overwrite::Blank,
            label: None,
            uuid: None,
        }
    }

    /// The same, whatever is on the device.
    #[must_use]
    pub fn overwriting_everything(mut self) -> Self {
        self.overwrite = Overwrite::Everything;
        self
    }

    /// The same with a label, of at most 16 bytes; xfs takes 12.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// The same with a UUID, such as `0f3c0e0a-1d1c-4e1b-9d54-0a1b2c3d4e5f`.
    #[must_use]
    pub fn uuid(mut self, uuid: impl Into<String>) -> Self {
        self.uuid = Some(uuid.into().to_ascii_lowercase());
        self
    }

    /// All of it is given to a program as arguments.
    pub(super) fn validate(&self) -> Result<(), InvalidOptions> {
        well_formed_filesystem(&self.filesystem)?;
        let malformed = |value: &str, why| Err(InvalidOptions::Malformed(value.to_owned(), why));
        match &self.label {
            Some(label) if !is_label(label) => {
                let why = "a label has 1 to 16 bytes, and no control characters or slashes";
                return malformed(label, why);
            }
            _ => {}
        }
        match &self.uuid {
            Some(uuid) if !is_uuid(uuid) => malformed(
                uuid,
                "a UUID has 32 lower-case hexadecimal digits in five groups, with hyphens between",
            ),
            _ => Ok(()),
        }
    }
}

fn is_label(label: &str) -> bool {
    let fits = |c: char| !c.is_control() && c != '/';
    !label.is_empty() && label.len() <= LONGEST_LABEL && label.chars().all(fits)
}

fn is_uuid(uuid: &str) -> bool {
    let groups: Vec<&str> = uuid.split('-').collect();
    let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|group| group.chars().all(is_digit))
}

/// What a format may overwrite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Overwrite {
    /// Nothing: only a device that is proven blank is formatted; one that has the filesystem already
    /// is mounted as it is.
    #[default]
    Blank,
    /// Anything.
    Everything,
}

impl Overwrite {
    pub(super) fn is_blank(&self) -> bool {
        *self == Overwrite::Blank
    }
}
