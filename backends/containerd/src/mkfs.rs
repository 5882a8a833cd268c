//! `mkfs/`: a file with a filesystem, made where it is missing.

use serde::{Deserialize, Serialize};

use crate::words::{OWN, bytes, is_uuid};

/// A file that is made where it is missing, with a filesystem. One that is there is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewImage {
    /// The size of the file, in bytes.
    pub bytes: u64,
    /// The filesystem: `ext2`, `ext3`, `ext4` (unless another is asked for) or `xfs`.
    pub filesystem: String,
    /// The UUID of the filesystem, if one is asked for.
    pub uuid: Option<String>,
}

/// Takes the options of `mkfs/` out of those of a mount.
pub(crate) fn take(options: &mut Vec<String>) -> Result<NewImage, String> {
    let (mut size, mut filesystem, mut uuid) = (None, "ext4".to_owned(), None);
    let own = |option: &str| {
        let own = option.strip_prefix(OWN)?.strip_prefix("mkfs.")?;
        Some(own.to_owned())
    };
    for option in options.iter().filter_map(|option| own(option)) {
        match option.split_once('=') {
            Some(("size", value)) => {
                size = Some(bytes(value).filter(|bytes| *bytes > 0).ok_or_else(|| {
                    format!("{OWN}mkfs.size={value:?} is no size, such as 100MiB")
                })?);
            }
            Some(("fs", value)) if ["ext2", "ext3", "ext4", "xfs"].contains(&value) => {
                filesystem = value.to_owned();
            }
            Some(("fs", value)) => {
                return Err(format!(
                    "{OWN}mkfs.fs={value:?} cannot be made; it may be ext2, ext3, ext4 or xfs"
                ));
            }
            Some(("uuid", value)) if is_uuid(value) => uuid = Some(value.to_owned()),
            Some(("uuid", value)) => return Err(format!("{OWN}mkfs.uuid={value:?} is no UUID")),
            _ => {
                return Err(format!(
                    "{OWN}mkfs.{option} is unknown; there are size, fs and uuid"
                ));
            }
        }
    }
    options.retain(|option| own(option).is_none());
    Ok(NewImage {
        bytes: size.ok_or_else(|| format!("mkfs/ needs {OWN}mkfs.size=BYTES"))?,
        filesystem,
        uuid,
    })
}
