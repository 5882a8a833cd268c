//! The [`Transport`] of loop devices.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use blockmount::slots::{Occupied, Reservation, SlotState, Slots};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, DiskOption, Transport, blocking};
use blockmount_linux::source;

use crate::bind::{self, Bound, Claim, LoopConfig};
use crate::builder::{LoopTransportBuilder, Settings};
use crate::device::{self, Binding, Device, MARK_MAX, Status};

/// The transport's name in a [`DeviceLocator`].
pub const SCHEME: &str = "loop";

/// Attaches disks as loop devices of this machine.
///
/// Devices use direct I/O on the file beneath where its filesystem can, so that nothing is cached twice.
/// [`DiskOptions::direct_io`](blockmount::DiskOptions::direct_io) requires it or turns it off; every other option
/// is refused.
///
/// A disk under several names is one disk: files are told apart by device and inode number. A file that
/// another loop device of this machine has, of any process, is refused unless both are read-only.
///
/// When the transport is dropped, or its process dies, the kernel unbinds each device as soon as it is neither
/// mounted nor open.
///
/// Clones share the devices. All blocking calls run on tokio's blocking threads.
#[derive(Debug, Clone)]
pub struct LoopTransport(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    slots: Slots,
    /// Held for look-ups and changes only, never across a system call.
    table: Mutex<HashMap<Disk, Record>>,
}

/// An attached disk.
#[derive(Debug)]
struct Record {
    slot: Occupied,
    number: u32,
    status: Status,
    /// Open while the disk is attached: closing it unbinds it. None during a detach, and after one that could not tell
    /// whether the device is unbound.
    device: Option<Device>,
}

impl LoopTransport {
    /// Starts from the defaults: 256 devices (as many as Hyper-V's SCSI has), no mark, direct I/O where possible,
    /// 5 seconds for a detach.
    pub fn builder() -> LoopTransportBuilder {
        LoopTransportBuilder::default()
    }

    pub(crate) fn new(slots: Slots, settings: Settings) -> Self {
        LoopTransport(Arc::new(Inner {
            settings,
            slots,
            table: Mutex::default(),
        }))
    }

    /// The devices of this transport, by slot.
    pub fn map(&self) -> Vec<LoopSlot> {
        let table = self.0.table();
        let mut map: Vec<_> = table
            .iter()
            .map(|(disk, record)| self.0.entry(disk, record))
            .collect();
        map.sort_unstable_by_key(|entry| entry.slot);
        map
    }

    /// What this transport bound the device of this number to.
    pub(crate) fn binding_of(&self, number: u32) -> Option<Binding> {
        let table = self.0.table();
        let record = table.values().find(|record| record.number == number)?;
        Some(record.status.binding.clone())
    }

    /// How many devices this transport can have at once.
    pub fn max_devices(&self) -> usize {
        self.0.slots.capacity()
    }
}

impl Default for LoopTransport {
    fn default() -> Self {
        Self::builder()
            .build()
            .expect("the defaults are within the limits")
    }
}

/// One device of a [`LoopTransport`], for display.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoopSlot {
    /// The slot, from 0.
    pub slot: u16,
    /// `Occupied`, or `Quarantined` if a detach could not tell whether the device is gone.
    pub state: SlotState,
    /// The number of the loop device: 7 for `/dev/loop7`.
    pub number: u32,
    /// The disk as it was asked for.
    pub source: PathBuf,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Whether the device goes around the page cache of the file beneath.
    pub direct_io: bool,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Transport for LoopTransport {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let disk = disk.clone();
        blocking(move || source::identify(&disk)).await
    }

    /// # Cancel safety
    ///
    /// A call that is dropped leaves nothing: the device's only handle is dropped with its result.
    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.0.ensure_not_attached(disk)?;
        let slot = self.0.slots.reserve().ok_or_else(|| self.0.full())?;
        let (inner, on_thread) = (Arc::clone(&self.0), (disk.clone(), id.clone()));
        let fresh = blocking(move || inner.bind(&on_thread.0, &on_thread.1, slot)).await?;
        // No await from here on, so that the caller learns of each device in the table.
        self.0.insert(disk, fresh)
    }

    /// # Cancel safety
    ///
    /// A call that is dropped goes on by itself; calling it again is safe and finds it done, or
    /// where it stopped.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let (inner, disk) = (Arc::clone(&self.0), disk.clone());
        blocking(move || inner.unbind(&disk)).await
    }
}

/// A device that is not in the table yet. Fields drop in order: the device is unbound before its slot is free.
struct Fresh {
    bound: Bound,
    slot: Reservation,
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, HashMap<Disk, Record>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self) -> BackendError {
        let count = self.slots.capacity();
        BackendError::full(format!(
            "all {count} loop devices of this transport are in use"
        ))
    }

    /// The managers attach a disk once; a second attach means that the path names another file now.
    fn ensure_not_attached(&self, disk: &Disk) -> Result<(), BackendError> {
        match self.table().get(disk) {
            None => Ok(()),
            Some(record) => Err(BackendError::conflict(format!(
                "{} is attached as loop:{}; if the file was replaced, release the one before it first",
                disk.source().display(),
                record.number
            ))),
        }
    }

    fn bind(&self, disk: &Disk, id: &DiskId, slot: Reservation) -> Result<Fresh, BackendError> {
        disk.options().require_only(&[DiskOption::DirectIo])?;
        let source = source::open(disk, id)?;
        source::size(disk, &source)?;
        let mark = match &self.settings.mark {
            Some(mark) => mark.as_bytes(),
            None => disk.source().as_os_str().as_bytes(),
        };
        let wanted = LoopConfig {
            read_only: disk.is_read_only(),
            direct_io: disk.options().is_direct_io() != Some(false),
            mark: mark[..mark.len().min(MARK_MAX)].to_owned(),
        };
        let bound = bind::bind(&source, &wanted)?;
        let refused = match disk.options().is_direct_io() {
            Some(true) if !bound.status.direct_io => Err(BackendError::unsuitable(format!(
                "the filesystem of {} cannot do direct I/O",
                disk.source().display()
            ))),
            _ => bind::refuse_conflict(&bound, &source, &self.claims()),
        };
        if let Err(refusal) = refused {
            bind::undo(bound, self.settings.busy_timeout);
            return Err(refusal);
        }
        Ok(Fresh { bound, slot })
    }

    fn claims(&self) -> Vec<Claim> {
        let table = self.table();
        let claim = |record: &Record| Claim {
            number: record.number,
            status: record.status.clone(),
        };
        table
            .values()
            .filter(|record| record.device.is_some())
            .map(claim)
            .collect()
    }

    fn insert(&self, disk: &Disk, fresh: Fresh) -> Result<DeviceLocator, BackendError> {
        let number = fresh.bound.device.number;
        let locator = DeviceLocator::new(SCHEME, number).expect("a number is an address");
        match self.table().entry(disk.clone()) {
            Entry::Vacant(entry) => {
                let Fresh {
                    bound: Bound { device, status },
                    slot,
                } = fresh;
                entry.insert(Record {
                    slot: slot.fill(),
                    number,
                    status,
                    device: Some(device),
                });
            }
            Entry::Occupied(_) => {
                let path = disk.source().display();
                return Err(BackendError::conflict(format!(
                    "{path} was attached twice at once"
                )));
            }
        }
        tracing::debug!(%disk, %locator, "bound a loop device");
        Ok(locator)
    }

    fn unbind(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some((number, binding, handle)) = self.take_handle(disk) else {
            return Ok(());
        };
        let outcome = self.unbind_device(number, &binding, handle);
        let mut table = self.table();
        let Entry::Occupied(mut entry) = table.entry(disk.clone()) else {
            return Ok(());
        };
        match outcome {
            Ok(()) => {
                entry.remove().slot.vacate();
                tracing::debug!(%disk, number, "unbound a loop device");
                Ok(())
            }
            Err((device, error)) => {
                let record = entry.get_mut();
                if device.is_none() {
                    record.slot.quarantine();
                }
                record.device = device;
                Err(error)
            }
        }
    }

    /// Takes the handle out of the table; the record stays.
    fn take_handle(&self, disk: &Disk) -> Option<(u32, Binding, Option<Device>)> {
        let mut table = self.table();
        let record = table.get_mut(disk)?;
        Some((
            record.number,
            record.status.binding.clone(),
            record.device.take(),
        ))
    }

    fn unbind_device(
        &self,
        number: u32,
        binding: &Binding,
        handle: Option<Device>,
    ) -> Result<(), (Option<Device>, BackendError)> {
        let handle = match handle {
            Some(device) => Some(device),
            // An earlier detach has closed it, so the number may belong to another process now.
            None => device::find(number, binding)
                .map_err(|error| (None, device::failed("look for", number, error)))?,
        };
        let Some(device) = handle else { return Ok(()) };
        device::unbind(device, binding, Instant::now() + self.settings.busy_timeout)
    }

    fn entry(&self, disk: &Disk, record: &Record) -> LoopSlot {
        let slot = record.slot.slot();
        LoopSlot {
            slot: slot.index,
            state: self.slots.state(slot).unwrap_or(SlotState::Occupied),
            number: record.number,
            source: disk.source().to_owned(),
            read_only: record.status.read_only,
            direct_io: record.status.direct_io,
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmount::testing::AttachIdentified as _;
    use blockmount::{ErrorKind, Resolver};

    use super::*;

    /// As after a detach that closed the device and could not tell whether it was unbound, while the number
    /// went to another process.
    #[tokio::test]
    async fn root_a_number_that_others_have_by_now_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let disk_of = |name: &str| {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(4096).unwrap();
            Disk::virtual_disk(path)
        };
        let (ours, theirs) = (LoopTransport::default(), LoopTransport::default());
        let (our_disk, their_disk) = (disk_of("ours"), disk_of("theirs"));
        ours.attach_identified(&our_disk).await.unwrap();
        theirs.attach_identified(&their_disk).await.unwrap();
        let number = theirs.map()[0].number;
        for handle in [None, Some(Device::open(number).unwrap())] {
            if let Some(record) = ours.0.table().get_mut(&our_disk) {
                record.device = handle;
                record.number = number;
                record.slot.quarantine();
            }
            assert_eq!(ours.map()[0].state, SlotState::Quarantined);
            let locator = DeviceLocator::new(SCHEME, number).unwrap();
            assert_eq!(
                ours.resolve(&locator).await.unwrap_err().kind(),
                ErrorKind::NotFound
            );
            assert!(theirs.resolve(&locator).await.is_ok());
            ours.detach(&our_disk).await.unwrap();
            assert_eq!((ours.map(), ours.0.slots.len()), (vec![], 0));
            let status = Device::open(number)
                .unwrap()
                .status()
                .unwrap()
                .expect("theirs was unbound");
            assert_eq!(
                status.binding.mark,
                their_disk.source().as_os_str().as_bytes()
            );
            ours.attach_identified(&our_disk).await.unwrap();
        }
        ours.detach(&our_disk).await.unwrap();
        theirs.detach(&their_disk).await.unwrap();
    }
}
