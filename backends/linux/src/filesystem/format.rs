//! Making sure that there is a filesystem on a device, without the loss of anything.
//!
//! | what is on the device | `Blank` | `Everything` |
//! |---|---|---|
//! | nothing, which is proven | is made | is made |
//! | the filesystem that is asked for | stays | is made anew |
//! | anything else, or what is not known | refused | is made |
//!
//! What is encrypted with a new key is noise, and counts as nothing; so does what decrypts to noise where the device below is
//! blank, since nobody has written there with any key. Anything else that decrypts to noise may be somebody's, with another key.
//!
//! A device is proven blank if its first and last megabyte and the places of copies of superblocks have only zeros, and
//! nothing that is known is found elsewhere. Reading all of it would take as long as writing it.
//!
//! While it is looked at, the device is held exclusively; then the tool holds it. In between, another target's call of
//! this guest waits, and a stranger who begins to use it has the tool refuse. If the tool fails on a device that was blank,
//! the proof's places are made zero again, so that the request can be repeated. An agent that is killed leaves the tool to
//! its end, and its successor finds the device in use, and then with its filesystem.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{BackendError, ErrorKind, Format, Overwrite};
use rustix::fs::OFlags;

use crate::device::crypt::Worth;
use crate::device::number::DeviceNumber;
use crate::device::{free, node};
use crate::errno::{Backoff, blocking, errno_error, retry_while_busy};
use crate::filesystem::mkfs;
use crate::filesystem::preflight::is_same_driver;
use crate::filesystem::probe::{Content, make_blank, probe};
use crate::mount::target::Target;
use crate::undo::ledger::Ledger;
use crate::undo::locks::Key;

/// How long making a filesystem may take, and the device may be in use before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) make: Duration,
    pub(crate) busy: Duration,
}

/// Makes the filesystem unless it is there.
///
/// # Errors
///
/// `Conflict` if there is something else on the device, or it is read-only; `Busy` if it is in use; otherwise in the words of
/// the tool.
pub(crate) async fn ensure(
    ledger: &Arc<Ledger>,
    target: &Target,
    node: &Path,
    format: &Format,
    worth: Worth,
    timeouts: Timeouts,
) -> Result<(), BackendError> {
    let wanted = Wanted {
        node: node.to_owned(),
        format: format.clone(),
        worth,
    };
    let look = {
        let (wanted, ledger, target) = (wanted.clone(), ledger.clone(), target.clone());
        move || {
            let list = ledger.list(&target);
            let number = DeviceNumber::at(&wanted.node)?;
            let _held = list.hold(Key::Device(number))?;
            match list.mounts_of(number).is_empty() {
                true => wanted.is_needed(),
                // What is mounted has its filesystem; whether it can be shared is decided by the mount.
                false => Ok(false),
            }
        }
    };
    if !retry_while_busy(timeouts.busy, look).await? {
        return Ok(());
    }
    let Err(error) = make_when_free(node, format, worth, timeouts).await else {
        tracing::info!(device = %blockmount::printable(node.display()), filesystem = %format.filesystem, "made a filesystem");
        return Ok(());
    };
    let message = format!(
        "cannot make {} on {}: {}",
        format.filesystem,
        node.display(),
        error.message()
    );
    let error = BackendError::new(error.kind(), message).with_source(error);
    // What the tool did not begin is as it was, and what is in use is not ours.
    let is_begun = !matches!(error.kind(), ErrorKind::Unsuitable | ErrorKind::Busy);
    if format.overwrite == Overwrite::Blank && is_begun {
        let blank = blocking(move || wanted.make_blank_again()).await;
        if let Err(left) = blank {
            let message = format!("{}, and {}", error.message(), left.message());
            return Err(BackendError::new(error.kind(), message).with_source(error));
        }
    }
    Err(error)
}

/// Runs the tool, again as long as the device may be busy: a process that is being started has a copy of the descriptor
/// that held it a moment ago.
async fn make_when_free(
    node: &Path,
    format: &Format,
    worth: Worth,
    timeouts: Timeouts,
) -> Result<(), BackendError> {
    // Not all of the noise can be read by a tool that looks for content.
    let looks = worth == Worth::Kept;
    let mut backoff = Backoff::until(Instant::now() + timeouts.busy);
    loop {
        match mkfs::make(node, format, looks, timeouts.make).await {
            Err(error) if error.kind() == ErrorKind::Busy => match backoff.pause() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => {
                    let node = node.to_owned();
                    return blocking(move || Err(free::name_users(&node, error))).await;
                }
            },
            made => return made,
        }
    }
}

#[derive(Debug, Clone)]
struct Wanted {
    node: PathBuf,
    format: Format,
    worth: Worth,
}

impl Wanted {
    /// Whether the filesystem is to be made. Blocks.
    fn is_needed(&self) -> Result<bool, BackendError> {
        // Nobody can begin to use it meanwhile.
        let mut held = free::prove_free(&self.node)?;
        let node = self.node.display();
        if self.worth == Worth::Noise || self.format.overwrite == Overwrite::Everything {
            return self.open_for_writing(OFlags::empty()).map(|_| true);
        }
        let found =
            probe(&mut held).map_err(|error| errno_error(format!("cannot read {node}"), error))?;
        let asked = &self.format.filesystem;
        match found.content {
            Content::Blank => self.open_for_writing(OFlags::empty()).map(|_| true),
            Content::Unknown if self.worth == Worth::NoiseIfUnknown => {
                self.open_for_writing(OFlags::empty()).map(|_| true)
            }
            Content::Filesystem(found) if is_same_driver(found.name, asked) => Ok(false),
            other => Err(BackendError::conflict(format!(
                "cannot make {asked} on {node}: it is not blank but holds {other}, which only a request to overwrite everything \
                 may destroy"
            ))),
        }
    }

    /// Opens the device for writing, which shows whether it can be written to.
    fn open_for_writing(&self, more: OFlags) -> Result<File, BackendError> {
        let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | more).bits() as i32;
        let opened = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&self.node);
        opened
            .map_err(|error| errno_error(format!("cannot write to {}", self.node.display()), error))
    }

    /// Undoes what a tool has written to a blank device, as far as the proof of blankness sees it. Blocks.
    fn make_blank_again(&self) -> Result<(), BackendError> {
        let device = self.open_for_writing(OFlags::EXCL)?;
        let made = node::size(&device).and_then(|size| make_blank(&device, size, 1));
        made.map_err(|error| {
            let node = self.node.display();
            errno_error(format!("what was begun on {node} cannot be removed"), error)
        })
    }
}
