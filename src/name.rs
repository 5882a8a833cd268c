//! The names of holders.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The name of who holds an attachment, a mount or a stack, by which it is found again after a restart.
///
/// One name has one handle at a time. Cloning is cheap.
///
/// ```
/// use blockmount::HolderName;
///
/// let name = HolderName::new("web")?;
/// assert_eq!(name.as_str(), "web");
/// assert!(HolderName::new("").is_err());
/// # Ok::<(), blockmount::InvalidHolderName>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HolderName(Arc<str>);

/// Why a string is no [`HolderName`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a holder's name has 1 to 255 bytes and no control characters")]
pub struct InvalidHolderName(());

impl HolderName {
    /// The longest name, in bytes: as long as a file's name may be, for journals that keep a file for each.
    pub const MAX_LEN: usize = 255;

    /// A name.
    ///
    /// # Errors
    ///
    /// [`InvalidHolderName`] unless it has 1 to [`MAX_LEN`](Self::MAX_LEN) bytes and no control characters.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidHolderName> {
        let name = name.as_ref();
        let fits = (1..=Self::MAX_LEN).contains(&name.len());
        match fits && !name.contains(char::is_control) {
            true => Ok(HolderName(name.into())),
            false => Err(InvalidHolderName(())),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HolderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HolderName {
    type Err = InvalidHolderName;

    fn from_str(name: &str) -> Result<Self, InvalidHolderName> {
        HolderName::new(name)
    }
}

impl TryFrom<String> for HolderName {
    type Error = InvalidHolderName;

    fn try_from(name: String) -> Result<Self, InvalidHolderName> {
        HolderName::new(name)
    }
}

impl From<HolderName> for String {
    fn from(name: HolderName) -> String {
        name.0.as_ref().into()
    }
}
