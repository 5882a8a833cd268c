//! What is to be done for a list of mounts.

use std::path::{Path, PathBuf};

use blockmount::{Disk, Expose, Format, InvalidOptions, MountOptions, MountOptionsBuilder};
use serde::{Deserialize, Serialize};

use crate::mkdir::Directory;
use crate::mkfs::NewImage;
use crate::mount::Mount;
use crate::place::Place;

/// What is to be done for a list, in this order, and what is left for others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What is done in the guest.
    pub steps: Vec<Step>,
    /// What is left for the caller to mount, after the steps. Templates of the first of them are filled in.
    pub system: Vec<Mount>,
}

/// One mount of a list, done in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The mount with its transforms done: templates filled in, their options taken out, the type without them.
    pub mount: Mount,
    /// Where in the guest it is mounted: `ROOT/NUMBER`.
    pub mount_point: PathBuf,
    /// The directories to make before it, in this order.
    pub directories: Vec<Directory>,
    /// What is done.
    pub action: Action,
}

/// What is done for one mount of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// A disk is attached, and mounted or shown.
    Image(Image),
    /// What an earlier mount has is seen at another place too.
    Bind(Bind),
    /// What earlier mounts have is stacked.
    Overlay(Overlay),
}

/// An image that is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The file or block device of the host.
    pub path: PathBuf,
    /// Further files or block devices that the filesystem refers to, in their order (`device=`).
    pub devices: Vec<PathBuf>,
    /// How the file is made where it is missing (`mkfs/`).
    pub create: Option<NewImage>,
    /// The file with the root digest of dm-verity (`X-containerd.dmverity=`).
    pub verity: Option<PathBuf>,
    /// The filesystem; `None` shows the block device itself at the mount point.
    pub filesystem: Option<String>,
    /// Whether it is only read.
    pub read_only: bool,
    /// Options of the filesystem and of the mount.
    pub options: Vec<String>,
}

/// What an earlier mount has, at another place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// What is shown.
    pub source: Place,
    /// Whether mounts below it are shown too (`rbind`).
    pub recursive: bool,
    /// Whether it is only read.
    pub read_only: bool,
    /// Further options.
    pub options: Vec<String>,
}

/// What earlier mounts have, stacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The layers, the topmost first.
    pub lower: Vec<Place>,
    /// Where changes go; without it nothing can be changed.
    pub scratch: Option<Scratch>,
    /// Further options.
    pub options: Vec<String>,
}

/// Where the changes of an overlay go: two directories of one mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// What was changed (`upperdir`).
    pub upper: Place,
    /// Where the kernel prepares changes (`workdir`).
    pub work: Place,
}

impl Plan {
    /// Whether an image of it can be written to.
    #[cfg(feature = "service")]
    pub(crate) fn is_writable(&self) -> bool {
        let mut actions = self.steps.iter().map(|step| &step.action);
        actions.any(|action| matches!(action, Action::Image(image) if !image.read_only))
    }
}

impl Action {
    /// The image, if it is only attached, and no filesystem of it is mounted.
    pub(crate) fn as_loop(&self) -> Option<&Image> {
        match self {
            Action::Image(image) if image.filesystem.is_none() => Some(image),
            _ => None,
        }
    }
}

impl Image {
    /// The disk to attach, as an image file.
    pub fn disk(&self) -> Disk {
        self.disk_of(&self.path)
    }

    /// The further disks to attach.
    pub fn further_disks(&self) -> impl Iterator<Item = Disk> {
        self.devices.iter().map(|device| self.disk_of(device))
    }

    fn disk_of(&self, path: &Path) -> Disk {
        let disk = Disk::virtual_disk(path);
        match self.read_only {
            true => disk.read_only(),
            false => disk,
        }
    }

    /// The options to mount it with, without those of verity and of further disks.
    ///
    /// A filesystem of `mkfs/` is made in the guest, where the disk is proven blank; one that is there is kept.
    ///
    /// # Errors
    ///
    /// If the options contradict each other.
    pub fn options(&self) -> Result<MountOptionsBuilder, InvalidOptions> {
        let mut builder = MountOptions::builder().options(self.options.iter().cloned());
        builder = match &self.filesystem {
            Some(filesystem) => builder.filesystem(filesystem),
            None => builder.expose(Expose::BlockDevice),
        };
        if self.read_only {
            builder = builder.read_only();
        }
        if let Some(new) = &self.create {
            let mut format = Format::new(&new.filesystem);
            if let Some(uuid) = &new.uuid {
                format = format.uuid(uuid);
            }
            builder = builder.format(format);
        }
        builder.clone().build()?;
        Ok(builder)
    }
}
