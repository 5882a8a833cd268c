//! The contract of an attacher: whole devices here, ranges by what is beside.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, Disk, DiskId, ErrorKind};
use blockmount_vpmem::{Attacher, ByteRange, DeviceNumber, VpmemAddress};
use tracing::warn;

use super::backing::{self, Image};
use super::{Contents, QemuVpmem, used_otherwise};
use crate::open_file::nothing_done;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Attacher for QemuVpmem {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let looked_at = disk.clone();
        let identify = move |_: &AtomicBool| backing::identify(&looked_at);
        let identified = self.blocking(&disk.to_string(), 0, identify).await;
        identified.map_err(nothing_done)
    }

    async fn size(&self, disk: &Disk) -> Result<u64, BackendError> {
        let looked_at = disk.clone();
        let size = move |_: &AtomicBool| backing::size(&looked_at);
        let found = self.blocking(&disk.to_string(), 0, size).await;
        found.map_err(nothing_done)
    }

    async fn attach(
        &self,
        device: DeviceNumber,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        let mut contents = self
            .contents(device)
            .await
            .ok_or_else(|| self.no_such(device))?;
        self.0.whole_devices.store(true, Ordering::Relaxed);
        if !matches!(*contents, Contents::Nothing) {
            return Err(used_otherwise(device));
        }
        let (prepared, opened, directory) = (disk.clone(), id.clone(), self.0.directory.clone());
        let prepare =
            move |given_up: &AtomicBool| Image::prepare(&prepared, &opened, &directory, given_up);
        let longest = self.0.geometry.device_size();
        let image = self.blocking(&disk.to_string(), longest, prepare).await;
        let image = image.map_err(nothing_done)?;
        let (file, size) = (image.file()?, image.size());
        let copied = image.copied();
        // From here on it stays open, until it is certain that QEMU has it no more.
        *contents = Contents::Disk(image);
        let attached = self.plug_in(device, &file, Some(id), size).await;
        match &attached {
            Ok(()) => {
                contents.opened();
                self.keep_open(device, copied).await;
            }
            Err(error) if error.kind() == ErrorKind::Uncertain => {}
            Err(_) => *contents = Contents::Nothing,
        }
        attached
    }

    async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError> {
        let Some(mut contents) = self.contents(device).await else {
            // Nothing was ever there.
            return Ok(());
        };
        if let Contents::Ranges { .. } = *contents {
            return Err(used_otherwise(device));
        }
        let detached = self.plug(device).detach().await;
        match detached.as_ref().map_err(BackendError::kind) {
            Ok(()) | Err(ErrorKind::Gone) => {
                if let Contents::Disk(image) = std::mem::take(&mut *contents) {
                    let what = format!("the file of VPMEM device {device}");
                    let discard = move |_: &AtomicBool| image.discard();
                    // The device is out all the same.
                    if let Err(error) = self.blocking(&what, 0, discard).await {
                        warn!(%error, "space is in use until QEMU ends");
                    }
                }
            }
            // It stays for good.
            Err(ErrorKind::Unsuitable) => contents.opened(),
            Err(_) => {}
        }
        detached
    }

    async fn map(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        self.map_range(device, range, disk, id).await
    }

    async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError> {
        self.unmap_range(device, range).await
    }

    async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
        self.occupants().await
    }
}

impl QemuVpmem {
    /// Has QEMU keep an image open of which it has a copy: so no other file becomes this disk, also after this process.
    async fn keep_open(&self, device: DeviceNumber, image: Option<io::Result<File>>) {
        let kept = match image {
            None => return,
            Some(Ok(image)) => {
                self.0
                    .qmp
                    .pass(image.into(), &Self::name(device), None)
                    .await
            }
            Some(Err(error)) => return warn!(%error, "an image is not kept open"),
        };
        if let Err(error) = kept {
            warn!(%error, "an image is not kept open");
        }
    }
}
