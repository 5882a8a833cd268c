//! What is on a device before it is encrypted.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::path::Path;

use blockmount::BackendError;
use rustix::fs::{Advice, fadvise};

use crate::device::subrange::Subrange;
use crate::errno::errno_error;
use crate::filesystem::probe::{Content, probe};

/// Refuses a device with anything on it that is known. Noise is not.
pub(super) fn refuse_content(below: &Path, open: &mut File) -> Result<(), BackendError> {
    let device = below.display();
    let found = probe(open).map_err(|error| errno_error(format!("cannot read {device}"), error))?;
    match found.content {
        Content::Blank | Content::Unknown => Ok(()),
        other => Err(BackendError::conflict(format!(
            "cannot encrypt {device}: it holds {other}, which only a request to overwrite everything may destroy"
        ))),
    }
}

/// Whether a device is proven blank from a byte on, as it is now: what the kernel had read of it before somebody wrote to it through
/// another device does not count.
pub(super) fn is_blank(below: &Path, open: &mut File, from: u64) -> Result<bool, BackendError> {
    let trouble = |error| errno_error(format!("cannot read {}", below.display()), error);
    fadvise(&*open, 0, None, Advice::DontNeed).map_err(|errno| trouble(errno.into()))?;
    let end = open.seek(SeekFrom::End(0)).map_err(trouble)?;
    let found = probe(&mut Subrange::new(open, from..end)).map_err(trouble)?;
    Ok(found.content == Content::Blank)
}
