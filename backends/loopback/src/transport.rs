//! The [`Transport`] of loop devices.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::placement::{Allocation, Call, Outcome, Placement, SlotUse};
use blockmount::slots::{Occupied, Slots};
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, DiskOption, ErrorKind, Presence, Transport,
    after_queued, blocking, blocking_call, blocking_step,
};
use blockmount_source as source;

use crate::bind::{self, Bound, LoopConfig};
use crate::device::{self, Binding, Device, MARK_MAX, Status};
use crate::locator::{SCHEME, number_of};
use crate::look::Claim;
use crate::settings::Settings;
use crate::{adopt, free, grow};

/// Attaches disks as loop devices of this machine.
///
/// Devices use direct I/O on the file beneath where its filesystem can, so that nothing is cached twice.
/// [`DiskOptions::direct_io`](blockmount::DiskOptions::direct_io) requires it or turns it off; every other option
/// is refused.
///
/// A disk under several names is one disk: files are told apart by device and inode number. A file that
/// another loop device of this machine has, of any process, or a VM of QEMU, is refused unless both are read-only.
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
    placement: Placement<LoopAllocation>,
}

/// What a disk has: a slot, and a loop device once it is bound.
#[derive(Debug)]
struct LoopAllocation {
    slot: Occupied,
    attached: Option<Attached>,
}

/// The loop device of an attached disk.
#[derive(Debug)]
struct Attached {
    number: u32,
    status: Status,
    /// Open while the disk is attached, since closing it is what unbinds it. None while a detach works
    /// with it, or if one could not tell whether the device is gone.
    device: Option<Device>,
}

impl Allocation for LoopAllocation {
    type Address = String;

    fn address(&self) -> String {
        match &self.attached {
            Some(attached) => format!("loop:{}", attached.number),
            None => format!("slot {}, not bound yet", self.slot.slot().index),
        }
    }

    fn vacate(self) {
        self.slot.vacate();
    }
}

impl LoopTransport {
    pub(crate) fn new(slots: Slots, settings: Settings) -> Self {
        LoopTransport(Arc::new(Inner {
            settings,
            slots,
            placement: Placement::new("loop device", []),
        }))
    }

    /// The devices of this transport, by slot. Asks the kernel about each, without waiting for a device.
    pub fn map(&self) -> Vec<LoopSlot> {
        let lines = self.0.placement.map_disks(loop_slot);
        // The kernel is asked without the lock of the map.
        let ask = |(mut slot, device): (LoopSlot, Option<Device>)| {
            let status = device.and_then(|device| device.status().ok()?);
            slot.direct_io |= status.is_some_and(|status| status.direct_io == Some(true));
            slot
        };
        let mut map: Vec<_> = lines.into_iter().flatten().map(ask).collect();
        map.sort_unstable_by_key(|entry| entry.slot);
        map
    }

    /// The device of this number, as this transport has bound it, and its handle.
    pub(crate) fn find(&self, number: u32) -> Option<(Binding, Option<Device>)> {
        let found = self.0.placement.map_disks(|_, allocation, _| {
            let attached = allocation.attached.as_ref();
            let ours = attached.filter(|attached| attached.number == number)?;
            Some((ours.status.binding.clone(), ours.device.clone()))
        });
        found.into_iter().flatten().next()
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
    pub usage: SlotUse,
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
        let inner = Arc::clone(&self.0);
        let call = inner.placement.attach(disk, || inner.allocate())?;
        let mut call = call.ok_or_else(|| inner.full())?;
        // Dropping the device's only handle unbinds it.
        call.assume(Outcome::Absent);
        let (disk, id) = (disk.clone(), id.clone());
        let fresh = blocking_call(async move {
            let bind = inner.clone();
            let bound = blocking_step(move || bind.bind(&disk, &id, call)).await?;
            // One look at all devices is enough for whoever binds at the same time.
            after_queued().await;
            blocking_step(move || inner.check(bound)).await
        });
        let fresh = fresh.await?;
        // No await from here on: the caller learns of what is recorded as present.
        Ok(fresh.keep())
    }

    /// # Cancel safety
    ///
    /// A call that is dropped goes on by itself; calling it again is safe and finds it done, or
    /// where it stopped.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let (inner, disk) = (Arc::clone(&self.0), disk.clone());
        blocking(move || inner.unbind(&disk)).await
    }

    /// The image is made longer, as a sparse file.
    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        let found = self.0.placement.map_disks(|other, allocation, _| {
            let attached = allocation.attached.as_ref().filter(|_| other == disk)?;
            Some((attached.number, attached.status.binding.clone()))
        });
        let Some((number, binding)) = found.into_iter().flatten().next() else {
            let message = format!("disk {disk} is not attached");
            return Err(BackendError::not_found(message));
        };
        let disk = disk.clone();
        blocking(move || grow::grow(&disk, number, &binding, bytes)).await
    }

    /// A device counts as bound for the disk if it is bound to the same file or block device, with the same access and
    /// mark, and unbinds itself. Without a locator it is only looked for if this transport has a
    /// [mark](crate::LoopTransportBuilder::mark) of its own: the usual one is that of all processes that have the disk.
    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let Ok(number) = locator.map(number_of).transpose() else {
            return Ok(Presence::Absent);
        };
        let (inner, disk, id) = (Arc::clone(&self.0), disk.clone(), id.clone());
        blocking(move || inner.adopt(&disk, &id, number)).await
    }
}

/// A device that is not yet recorded as attached. Dropped, it is unbound first, then its slot is given back.
struct Fresh {
    bound: Bound,
    call: Call<LoopAllocation>,
}

impl Fresh {
    fn keep(self) -> DeviceLocator {
        let Bound {
            device,
            status,
            pending,
            ..
        } = self.bound;
        let number = device.number;
        let device = Some(device);
        let attached = Attached {
            number,
            status,
            device,
        };
        self.call
            .update(|allocation| allocation.attached = Some(attached));
        drop(pending);
        self.call.end(Outcome::Present);
        let locator = DeviceLocator::new(SCHEME, number).expect("a number is an address");
        tracing::debug!(%locator, "bound a loop device");
        locator
    }
}

impl Inner {
    fn allocate(&self) -> Option<LoopAllocation> {
        let slot = self.slots.reserve()?.fill();
        Some(LoopAllocation {
            slot,
            attached: None,
        })
    }

    fn full(&self) -> BackendError {
        let count = self.slots.capacity();
        BackendError::full(format!(
            "all {count} loop devices of this transport are in use"
        ))
    }

    fn bind(
        &self,
        disk: &Disk,
        id: &DiskId,
        call: Call<LoopAllocation>,
    ) -> Result<(Fresh, source::Source), BackendError> {
        disk.options().require_only(&[DiskOption::DirectIo])?;
        let source = source::open(disk, id)?;
        source::size(disk, &source)?;
        bind::lock_image(disk, &source, || self.claims())?;
        let wanted = LoopConfig {
            read_only: disk.is_read_only(),
            direct_io: disk.options().is_direct_io() != Some(false),
            mark: self.mark(disk).to_owned(),
        };
        let bound = bind::bind(&source, &wanted)?;
        let refused = match disk.options().is_direct_io() {
            Some(true) => bound.ensure_direct_io(disk),
            _ => Ok(()),
        };
        self.unless(refused, Fresh { bound, call })
            .map(|fresh| (fresh, source))
    }

    /// Refuses what must not be bound twice.
    fn check(&self, (fresh, source): (Fresh, source::Source)) -> Result<Fresh, BackendError> {
        let refused = bind::refuse_conflict(&fresh.bound, &source, || self.claims());
        self.unless(refused, fresh)
    }

    /// Unbinds a device that is refused.
    fn unless(
        &self,
        refused: Result<(), BackendError>,
        fresh: Fresh,
    ) -> Result<Fresh, BackendError> {
        if let Err(refusal) = refused {
            let Fresh { bound, call } = fresh;
            bind::undo(bound, self.settings.busy_timeout);
            drop(call);
            return Err(refusal);
        }
        Ok(fresh)
    }

    fn mark<'a>(&'a self, disk: &'a Disk) -> &'a [u8] {
        let mark = match &self.settings.mark {
            Some(mark) => mark.as_bytes(),
            None => disk.source().as_os_str().as_bytes(),
        };
        &mark[..mark.len().min(MARK_MAX)]
    }

    fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        number: Option<u32>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        if number.is_none() && self.settings.mark.is_none() {
            return Ok(Presence::Absent);
        }
        let wanted = adopt::Wanted {
            id,
            read_only: disk.is_read_only(),
            mark: self.mark(disk),
        };
        let claims = self.claims();
        let is_free = |number| claims.iter().all(|claim| claim.number != number);
        let found = adopt::find(&wanted, number, is_free).map_err(|error| {
            BackendError::other(format!("cannot look for the loop device of disk {disk}"))
                .with_source(error)
        })?;
        let Some((device, status)) = found else {
            return Ok(Presence::Absent);
        };
        let call = self.placement.attach(disk, || self.allocate())?;
        let call = call.ok_or_else(|| self.full())?;
        let bound = Bound::new(device, status);
        Ok(Presence::Present(Fresh { bound, call }.keep()))
    }

    fn claims(&self) -> Vec<Claim> {
        let claims = self.placement.map_disks(|_, allocation, _| {
            let attached = allocation.attached.as_ref()?;
            attached.device.as_ref()?;
            Some(Claim {
                number: attached.number,
                status: attached.status.clone(),
            })
        });
        claims.into_iter().flatten().collect()
    }

    fn unbind(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(call) = self.begin_detach(disk)? else {
            return Ok(());
        };
        // The handle is taken to work with; the record stays.
        let attached = call.update(|allocation| {
            let attached = allocation.attached.as_mut()?;
            let binding = attached.status.binding.clone();
            Some((attached.number, binding, attached.device.take()))
        });
        let number = attached.as_ref().map(|(number, ..)| *number);
        let unbound = match attached {
            Some((number, binding, handle)) => self.unbind_device(number, &binding, handle),
            None => Ok(()),
        };
        let Err((device, error)) = unbound else {
            number.into_iter().for_each(free::note_unbound);
            call.end(Outcome::Absent);
            tracing::debug!(%disk, "unbound a loop device");
            return Ok(());
        };
        let outcome = match device {
            Some(_) => Outcome::Present,
            None => Outcome::InDoubt,
        };
        call.update(|allocation| {
            if let Some(attached) = &mut allocation.attached {
                attached.device = device;
            }
        });
        call.end(outcome);
        Err(error)
    }

    /// Waits for an earlier detach of the disk whose future was dropped: it goes on by itself.
    fn begin_detach(&self, disk: &Disk) -> Result<Option<Call<LoopAllocation>>, BackendError> {
        let deadline = Instant::now() + self.settings.busy_timeout;
        loop {
            match self.placement.detach(disk) {
                Err(busy) if busy.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(2));
                }
                begun => return begun,
            }
        }
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
}

/// A device for display, and its handle if the kernel was not asked yet whether it goes around the page cache.
fn loop_slot(
    disk: &Disk,
    allocation: &LoopAllocation,
    usage: SlotUse,
) -> Option<(LoopSlot, Option<Device>)> {
    let attached = allocation.attached.as_ref()?;
    let direct_io = attached.status.direct_io;
    let slot = LoopSlot {
        slot: allocation.slot.slot().index,
        usage,
        number: attached.number,
        source: disk.source().to_owned(),
        read_only: attached.status.read_only,
        direct_io: direct_io.unwrap_or_default(),
    };
    let unknown = attached.device.clone().filter(|_| direct_io.is_none());
    Some((slot, unknown))
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
            let call = ours.0.placement.detach(&our_disk).unwrap().unwrap();
            call.update(|allocation| {
                let attached = allocation.attached.as_mut().unwrap();
                attached.device = handle;
                attached.number = number;
            });
            call.end(Outcome::InDoubt);
            assert_eq!(ours.map()[0].usage, SlotUse::Quarantined);
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
