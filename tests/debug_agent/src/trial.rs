//! One mount with some options, by an engine in this process: whether there can be one, and that it leaves nothing.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use blockmount::{DeviceLocator, MountOptions, Mounter};
use blockmount_linux::{LinuxGuest, LinuxGuestBuilder};
use serde::{Deserialize, Serialize};

use crate::exercise::{ByName, State, node_of};

/// A mount to try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The SCSI address of the disk in this guest (`0:0:0:3`).
    pub disk: PathBuf,
    /// The bytes of it that are used, if not all.
    pub range: Option<(u64, u64)>,
    /// How it is mounted. Further devices are `exercise:0:0:0:4`.
    pub options: MountOptions,
    /// A directory in memory, for the target.
    pub directory: PathBuf,
    /// Where keys are, if one is needed.
    #[serde(default)]
    pub keys: Option<PathBuf>,
}

impl Trial {
    /// Why there can be no such mount; nothing if there was one.
    ///
    /// # Errors
    ///
    /// What was left, or why it could not be taken away.
    pub async fn run(self) -> io::Result<Option<String>> {
        let disk = node_of(&self.disk).await?;
        fs::create_dir_all(&self.directory)?;
        let before = State::of(&disk, &self.directory)?;
        let address = match self.range {
            Some((start, end)) => format!("{}@{start}-{end}", disk.display()),
            None => disk.display().to_string(),
        };
        let device = DeviceLocator::new("exercise", address).map_err(io::Error::other)?;
        let target = self.directory.join("made/target");
        let guest = self
            .keys
            .iter()
            .fold(builder(), LinuxGuestBuilder::key_directory);
        let guest = guest.build();
        let mounted = guest.mount(&device, &target, &self.options).await;
        let refused = mounted.err().map(|error| error.to_string());
        if refused.is_none() && fs::symlink_metadata(&target).is_err() {
            return Err(trouble("shows nothing", &self.options));
        }
        guest.unmount(&target).await.map_err(io::Error::other)?;
        let after = State::of(&disk, &self.directory)?;
        if after != before {
            let left = format!("left {after:?}, and not {before:?}");
            return Err(trouble(&left, &self.options));
        }
        fs::remove_dir_all(&self.directory)?;
        Ok(refused)
    }
}

fn builder() -> LinuxGuestBuilder {
    LinuxGuest::builder()
        .resolver("exercise", std::sync::Arc::new(ByName))
        .busy_timeout(Duration::from_secs(20))
}

fn trouble(what: &str, options: &MountOptions) -> io::Error {
    io::Error::other(format!("{options:?}: {what}"))
}
