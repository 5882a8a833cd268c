//! Layers in images of other formats: QEMU reads them for a virtual machine, and its storage daemon shows them to this one.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use blockmount::{Disk, ErrorKind};
use blockmount_qemu::{ImageFormat, ShownImages};

use super::Machine;
use crate::args::Layer;
use crate::failure::{Context, Failure};
use crate::guest::Guest;
use crate::stacking::layer_disk;

/// Images that are shown as raw files, and where each is seen.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) images: ShownImages,
    files: BTreeMap<PathBuf, PathBuf>,
}

impl Machine {
    /// The disks of layers, as the guest of this run is given them.
    pub(crate) async fn disks(
        &self,
        layers: &[Layer],
        allows_backing: bool,
    ) -> Result<Vec<Disk>, Failure> {
        match self.guest {
            Guest::Local(_) => self.local_disks(layers, allows_backing).await,
            Guest::Qemu(_) => Ok(layers.iter().map(layer_disk).collect()),
        }
    }

    /// The disks of layers, as this machine can attach them. To be asked for the same layers each time.
    pub(crate) async fn local_disks(
        &self,
        layers: &[Layer],
        allows_backing: bool,
    ) -> Result<Vec<Disk>, Failure> {
        let mut others: Vec<PathBuf> = layers
            .iter()
            .filter(|layer| !is_raw(layer))
            .map(|layer| layer.image.clone())
            .collect();
        others.sort_unstable();
        others.dedup();
        if others.is_empty() {
            return Ok(layers.iter().map(layer_disk).collect());
        }
        let shown = self
            .shown
            .get_or_try_init(|| self.show(others, allows_backing))
            .await?;
        let disk = |layer: &Layer| match shown.files.get(&layer.image) {
            Some(file) => Disk::virtual_disk(file).read_only(),
            None => layer_disk(layer),
        };
        Ok(layers.iter().map(disk).collect())
    }

    async fn show(&self, images: Vec<PathBuf>, allows_backing: bool) -> Result<Shown, Failure> {
        let directory = self.run.make_work_dir()?.join("shown");
        fs::create_dir(&directory).context(|| format!("cannot make {}", directory.display()))?;
        let disks: Vec<Disk> = images
            .iter()
            .map(|image| layer_disk(&Layer::of(image)))
            .collect();
        let shown = ShownImages::start(&disks, &directory, allows_backing).await;
        let shown = shown.map_err(|error| {
            let advice = match error.kind() {
                ErrorKind::Unsuitable => {
                    "install what is missing, or convert it to a raw image: qemu-img convert -O raw IMAGE RAW"
                }
                _ => {
                    "give an image that is what its name says; a qcow2 image that names other files needs --allow-backing"
                }
            };
            Failure::from(error).advise(advice)
        })?;
        let files = images
            .into_iter()
            .zip(shown.paths().iter().cloned())
            .collect();
        Ok(Shown {
            images: shown,
            files,
        })
    }

    /// Waits until what is in the guest is lost, and says why; on this machine that is the end of who shows its images, if any
    /// are shown. Cancel safe.
    pub(crate) async fn failed(&self) -> String {
        match (&self.guest, self.shown.get()) {
            (Guest::Local(_), Some(shown)) => shown.images.ended().await,
            _ => self.guest.failed().await,
        }
    }

    /// Ends who shows images, and proves that none is shown any more. What was read since an earlier end has failed, which is
    /// an error too, though nothing stays.
    pub(super) async fn end_shown(&mut self) -> Result<Option<Failure>, Failure> {
        let Some(Shown { images, .. }) = self.shown.take() else {
            return Ok(None);
        };
        let ended = match images.has_ended() {
            true => Some(images.ended().await),
            false => None,
        };
        images.end().await?;
        let unread =
            |why| Failure::new("not all of the images could be read until the end").because(why);
        Ok(ended.map(unread))
    }
}

/// Whether an image is the disk itself.
pub(crate) fn is_raw(layer: &Layer) -> bool {
    ImageFormat::of(&layer.image) == ImageFormat::Raw
}
