//! Devices that hold many disks: how one comes into being, and what is written to its ranges.

use std::fs::File;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;

use blockmount::{BackendError, Disk, DiskId, ErrorKind};
use blockmount_vpmem::{ByteRange, DeviceNumber, VpmemAddress};
use tokio::sync::OwnedMutexGuard;

use super::backing::{self, Private};
use super::{Contents, QemuVpmem, used_otherwise};
use crate::open_file::{OpenFile, nothing_done};
use crate::plug::Presence;

impl QemuVpmem {
    pub(super) async fn map_range(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        if range.end() > self.0.geometry.device_size() {
            let message = format!("VPMEM device {device} has no range {range}");
            return Err(BackendError::invalid(message));
        }
        let (opened, wanted) = (disk.clone(), id.clone());
        let open = move |_: &AtomicBool| backing::open_for(&opened, &wanted, range);
        let opened = self.blocking(&disk.to_string(), 0, open).await;
        let (source, length) = opened.map_err(nothing_done)?;
        let file = self.packed(device).await?;
        let place = address(device, range);
        let lock = self.lock(place).await?;
        self.note_range(&place, &source, id).await?;
        let copied = disk.clone();
        let copy = move |given_up: &AtomicBool| {
            let _lock = lock;
            backing::write_range(&copied, (&source, length), &file, range, given_up)
        };
        let written = self.blocking(&disk.to_string(), range.size(), copy).await;
        match written.as_ref().map_err(BackendError::kind) {
            Ok(()) | Err(ErrorKind::Uncertain) => written,
            Err(_) => self.forget_range(&place).await.and(written),
        }
    }

    pub(super) async fn unmap_range(
        &self,
        device: DeviceNumber,
        range: ByteRange,
    ) -> Result<(), BackendError> {
        let Some(file) = self.mapped_file(device).await? else {
            return Ok(());
        };
        let what = format!("range {range} of VPMEM device {device}");
        let place = address(device, range);
        let lock = self.lock(place).await?;
        let clear = move |_: &AtomicBool| {
            let _lock = lock;
            backing::clear_range(&file, range)
        };
        self.blocking(&what, range.size(), clear).await?;
        self.forget_range(&place).await?;
        let mut ranges = self.0.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(&place);
        Ok(())
    }

    /// The file of a packed device to which a disk may be mapped; none if nothing can ever have been.
    async fn mapped_file(&self, device: DeviceNumber) -> Result<Option<File>, BackendError> {
        let Some(mut contents) = self.contents(device).await else {
            return Ok(None);
        };
        if let Contents::Nothing = *contents {
            let lost = |error: BackendError| match error.kind() {
                ErrorKind::Conflict => {
                    let tried = format!("cannot unmap a disk from VPMEM device {device}");
                    BackendError::uncertain(tried).with_source(error)
                }
                _ => error,
            };
            match self.reach(device).await.map_err(lost)? {
                Some(file) => {
                    *contents = Contents::Ranges {
                        file,
                        plugged: true,
                    };
                }
                None if self.has_other(device).await? => {
                    return Err(BackendError::uncertain(format!(
                        "cannot unmap a disk from VPMEM device {device}: QEMU does not show any more what its file is; \
                         it stays until QEMU ends"
                    )));
                }
                None => {}
            }
        }
        let Contents::Ranges { file, .. } = &*contents else {
            return Ok(None);
        };
        file.file().map(Some).map_err(|error| {
            BackendError::other(format!("cannot clear a range of VPMEM device {device}"))
                .with_source(error)
        })
    }

    /// The file of a packed device that QEMU has; made and plugged if it is not there.
    async fn packed(&self, device: DeviceNumber) -> Result<File, BackendError> {
        let mut contents = self
            .contents(device)
            .await
            .ok_or_else(|| self.no_such(device))?;
        if let Contents::Nothing = *contents
            && let Some(file) = self.reach(device).await.map_err(nothing_done)?
        {
            *contents = Contents::Ranges {
                file,
                plugged: true,
            };
        }
        let is_new = matches!(*contents, Contents::Nothing);
        if is_new {
            let (directory, size) = (self.0.directory.clone(), self.0.geometry.device_size());
            let what = format!("the file of VPMEM device {device}");
            let make = move |_: &AtomicBool| Private::make(&directory, size);
            let file = self.blocking(&what, 0, make).await.map_err(nothing_done)?;
            *contents = Contents::Ranges {
                file,
                plugged: false,
            };
        }
        let Contents::Ranges { file, plugged } = &mut *contents else {
            return Err(used_otherwise(device));
        };
        if self.0.qmp.is_closed() {
            let message = format!("cannot map to VPMEM device {device}: QEMU is gone");
            return Err(BackendError::gone(message));
        }
        if !*plugged && let Err(error) = self.plug_packed(device, file, is_new).await {
            if error.kind() != ErrorKind::Uncertain {
                *contents = Contents::Nothing;
                self.forget_device(device).await;
            }
            return Err(error);
        }
        *plugged = true;
        file.file().map_err(|error| {
            BackendError::other(format!("cannot write to VPMEM device {device}")).with_source(error)
        })
    }

    /// Plugs a packed device, unless an attempt that was in doubt has done so.
    async fn plug_packed(
        &self,
        device: DeviceNumber,
        file: &mut Private,
        is_new: bool,
    ) -> Result<(), BackendError> {
        let plug = self.plug(device);
        let tried = || format!("cannot look for VPMEM device {device}");
        let there = plug.presence().await;
        let there = there.map_err(|error| match error.while_trying(tried()) {
            error if is_new => nothing_done(error),
            error => error,
        })?;
        if is_new && there != Presence::default() {
            let message = format!("VPMEM device {device} is there already, and is not ours");
            return Err(BackendError::conflict(message));
        }
        if there.backend && !there.device {
            plug.detach().await?;
        }
        if !there.device {
            let shared = file.file().map_err(|error| {
                BackendError::other(format!("cannot share the file of VPMEM device {device}"))
                    .with_source(error)
            })?;
            self.note_device(device, &shared).await?;
            let shared = OpenFile::new(shared, file.path())?;
            let size = self.0.geometry.device_size();
            self.plug_in(device, &shared, None, size).await?;
        }
        file.forget_name();
        Ok(())
    }

    /// Locks a range, to which an earlier copy may still be written.
    async fn lock(&self, address: VpmemAddress) -> Result<OwnedMutexGuard<()>, BackendError> {
        let gate = {
            let mut ranges = self.0.ranges.lock().unwrap_or_else(PoisonError::into_inner);
            ranges.entry(address).or_default().clone()
        };
        let timeout = self.0.qmp.deadlines().call;
        tokio::time::timeout(timeout, gate.lock_owned())
            .await
            .map_err(|_| {
                BackendError::busy(format!(
                    "range {address} of a VPMEM device is still being written to after {timeout:?}"
                ))
            })
    }
}

fn address(device: DeviceNumber, range: ByteRange) -> VpmemAddress {
    VpmemAddress {
        device,
        range: Some(range),
    }
}
