//! What QEMU keeps about packed devices, so that the process after this one finds out which disk is mapped where.
//!
//! QEMU knows a packed device as one piece of memory. So it is passed two kinds of files, which it keeps open, each with the id
//! of the file: the one behind the device, as `bm-vpmem-1@`, and for each range the image that is mapped to it, as
//! `bm-vpmem-1@4096+8192`. A range is noted before anything is written to it, and taken back after it was cleared.

use std::collections::HashMap;
use std::fs::File;

use blockmount::placement::Occupant;
use blockmount::{BackendError, DeviceLocator, DiskId, ErrorKind};
use blockmount_source::id_of;
use blockmount_vpmem::{DeviceNumber, VpmemAddress};
use tracing::debug;

use super::backing::Private;
use super::{Contents, Kind, PREFIX, QemuVpmem};
use crate::open_file::nothing_done;
use crate::plug::{self, Backend, Found, Presence};
use crate::qmp::Kept;

/// As whose the file behind a packed device is passed.
fn device_owner(device: DeviceNumber) -> String {
    format!("{}@", QemuVpmem::name(device))
}

/// As whose the image is passed that is mapped to a range.
fn range_owner(at: &VpmemAddress) -> String {
    format!("{PREFIX}{at}")
}

impl QemuVpmem {
    /// Notes which disk is going to be in a range. A QEMU that can be passed no files is not told.
    pub(super) async fn note_range(
        &self,
        at: &VpmemAddress,
        image: &File,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        let tried = || format!("cannot note what is mapped to {at}");
        let shared = image.try_clone();
        let shared = shared.map_err(|error| BackendError::other(tried()).with_source(error))?;
        let owner = range_owner(at);
        match self.0.qmp.pass(shared.into(), &owner, Some(id)).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let failed = nothing_done(error.while_trying(tried()));
                self.forget_range(at).await.and(Err(failed))
            }
        }
    }

    /// Takes back what was noted of a range in which nothing is any more.
    pub(super) async fn forget_range(&self, at: &VpmemAddress) -> Result<(), BackendError> {
        match self.0.qmp.close_passed_for(&range_owner(at)).await {
            Err(error) if error.kind() != ErrorKind::Gone => {
                let tried = format!("cannot take back what was noted of {at}");
                Err(BackendError::uncertain(tried).with_source(error))
            }
            // Without a QEMU there is nothing to take back.
            _ => Ok(()),
        }
    }

    /// Notes which file is behind a device that is going to be plugged.
    pub(super) async fn note_device(
        &self,
        device: DeviceNumber,
        file: &File,
    ) -> Result<(), BackendError> {
        let tried = || format!("cannot note what is behind VPMEM device {device}");
        let failed = |error| BackendError::other(tried()).with_source(error);
        let id = id_of(&file.metadata().map_err(failed)?);
        let shared = file.try_clone().map_err(failed)?;
        let owner = device_owner(device);
        let passed = self.0.qmp.pass(shared.into(), &owner, Some(&id)).await;
        // A file that is noted without a device is made anew.
        passed
            .map(drop)
            .map_err(|error| nothing_done(error.while_trying(tried())))
    }

    /// Takes back what was noted of a device that is not there.
    pub(super) async fn forget_device(&self, device: DeviceNumber) {
        if let Err(error) = self.0.qmp.close_passed_for(&device_owner(device)).await {
            // What is noted without a device means nothing.
            debug!(%error, %device, "a file stays open in QEMU");
        }
    }

    /// The file behind a packed device of an earlier process; none if QEMU has no such device. What is left of one whose making
    /// was cut off is removed.
    ///
    /// # Errors
    ///
    /// `Conflict` if QEMU has it and its file cannot be reached.
    pub(super) async fn reach(
        &self,
        device: DeviceNumber,
    ) -> Result<Option<Private>, BackendError> {
        let found = plug::find(&self.0.qmp, Backend::Memory, PREFIX).await?;
        let Some(kept) = found.kept.get(&device_owner(device)) else {
            return Ok(None);
        };
        if is_whole(&found, device) {
            return self.reopen(device, kept).await.map(Some);
        }
        self.plug(device).detach().await?;
        self.forget_device(device).await;
        Ok(None)
    }

    /// Whether QEMU has such a device in which no disk can be mapped.
    pub(super) async fn has_other(&self, device: DeviceNumber) -> Result<bool, BackendError> {
        let found = plug::find(&self.0.qmp, Backend::Memory, PREFIX).await?;
        let name = Self::name(device);
        Ok(found.ours.contains_key(&name) && found.disk(&name).is_none())
    }

    async fn reopen(&self, device: DeviceNumber, kept: &Kept) -> Result<Private, BackendError> {
        let (qmp, kept) = (self.0.qmp.clone(), kept.clone());
        let reopen = move |_: &_| {
            qmp.reopen(&kept).map_err(|error| {
                BackendError::conflict(format!(
                    "the file of VPMEM device {device} cannot be reached again"
                ))
                .with_source(error)
            })
        };
        let what = format!("the file of VPMEM device {device}");
        let file = self.blocking(&what, 0, reopen).await;
        file.map(Private::found).map_err(nothing_done)
    }

    /// Whether disks can be mapped to a packed device, of whichever process it is.
    async fn is_reached(&self, device: DeviceNumber, kept: &Kept) -> bool {
        let Some(contents) = self.0.devices.get(usize::from(device.get())) else {
            return false;
        };
        let Ok(mut contents) = contents.try_lock() else {
            // This process works on it.
            return true;
        };
        if let Contents::Nothing = *contents {
            match self.reopen(device, kept).await {
                Ok(file) => {
                    *contents = Contents::Ranges {
                        file,
                        plugged: true,
                    };
                }
                Err(error) => {
                    debug!(%error, "a packed device of another process is left alone");
                    return false;
                }
            }
        }
        true
    }

    /// What QEMU has on the devices. A packed device on which nothing is counts as free, since disks can be mapped to it.
    pub(super) async fn occupants(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
        let found = plug::find(&self.0.qmp, Backend::Memory, PREFIX).await?;
        let whole = |device, id| {
            Occupant::new(
                VpmemAddress {
                    device,
                    range: None,
                },
                id,
            )
        };
        let mut occupants = Vec::new();
        for (name, there) in &found.ours {
            let Some(device) = number_of(name) else {
                continue;
            };
            let Some(kept) = found.kept.get(&device_owner(device)) else {
                let occupant = whole(device, found.disk(name));
                occupants.push(match there.device {
                    true => occupant,
                    false => occupant.half_done(),
                });
                continue;
            };
            let is_half = !is_whole(&found, device);
            let ranges = ranges_on(device, &found.kept);
            let is_free = ranges.is_empty() && !self.uses_whole_devices();
            match is_half || self.is_reached(device, kept).await {
                true if is_free => {}
                true if !ranges.is_empty() => occupants.extend(ranges),
                _ => occupants.push(whole(device, None)),
            }
        }
        for (device, bus) in found.others {
            let number = self.number_on(&device, &bus).await?;
            let number = number.and_then(|number| number.try_into().ok());
            occupants.extend(number.map(|number| whole(number, None)));
        }
        Ok(occupants)
    }

    /// Which number a device of another name takes, if any.
    async fn number_on(&self, device: &str, bus: &str) -> Result<Option<u64>, BackendError> {
        Ok(match &self.0.kind {
            Kind::VirtioPmem { ports } => {
                let on_it = |port: &String| bus.contains(&format!("/{port}/"));
                ports.iter().position(on_it).map(|number| number as u64)
            }
            Kind::Nvdimm => {
                let slot = plug::property(&self.0.qmp, device, "slot").await;
                let failed = "cannot list the VPMEM devices of the VM";
                let slot = slot.map_err(|error| error.while_trying(failed))?;
                slot.and_then(|slot| slot.as_u64())
            }
        })
    }
}

fn number_of(name: &str) -> Option<DeviceNumber> {
    DeviceLocator::number(name.strip_prefix(PREFIX)?)?
        .try_into()
        .ok()
}

/// Whether a device is there with its memory.
fn is_whole(found: &Found, device: DeviceNumber) -> bool {
    let both = Presence {
        backend: true,
        device: true,
    };
    found.ours.get(&QemuVpmem::name(device)) == Some(&both)
}

/// The disks that are mapped to a device. Of two in one place, the later is there.
fn ranges_on(device: DeviceNumber, kept: &HashMap<String, Kept>) -> Vec<Occupant<VpmemAddress>> {
    let ranges = kept.iter().filter_map(|(owner, kept)| {
        let at: VpmemAddress = owner.strip_prefix(PREFIX)?.parse().ok()?;
        let range = at.range.filter(|_| at.device == device)?;
        Some((kept, at, range))
    });
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|(kept, ..)| std::cmp::Reverse(kept.order));
    let mut taken = Vec::new();
    ranges.retain(|(.., range)| {
        let is_apart = |other: &blockmount_vpmem::ByteRange| {
            other.end() <= range.offset() || range.end() <= other.offset()
        };
        let is_free = taken.iter().all(is_apart);
        taken.extend(is_free.then_some(*range));
        is_free
    });
    let occupant = |(kept, at, _): (&Kept, _, _)| Occupant::new(at, Some(kept.id.clone()));
    ranges.into_iter().map(occupant).collect()
}
