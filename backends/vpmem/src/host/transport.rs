//! Which disk is on which device, and the calls that put it there.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Transport};
use thiserror::Error;

use super::places::{Entered, Known, Outcome, Places};
use crate::{Attacher, DeviceNumber, Geometry, VpmemAddress};

/// The VPMEM devices of a VM, as a [`Transport`] for read-only disks.
///
/// It chooses the device, or the range of one, and remembers which disk is where. [`Attacher`] does the
/// rest. What does not fit is `Unsuitable` (a disk that is to be written to, an empty one, one larger
/// than a device), and with no place left it is `Full`: a [`Manager`](blockmount::Manager) with several
/// transports then passes the disk on to the next.
///
/// A place is used for one disk until it is certain that the disk is out: after an attachment that
/// was `Uncertain`, whose future was dropped, or in which the attacher panicked, and after any
/// detachment that failed, [`detach`](Transport::detach) of that disk is what frees the place.
///
/// # Devices that cannot be unplugged
///
/// Some hypervisors cannot take a device out (QEMU's nvdimm). The attacher then answers `detach` with
/// `Unsuitable`, and the disk counts as detached, but its device is *retained*: it keeps its number,
/// is never given to another disk, and is what the same disk gets when it is asked for again, without
/// a call of the attacher. The same is what has the same [`DiskId`] and size: a new file under an
/// old name is attached anew.
pub struct VpmemTransport<A> {
    attacher: A,
    geometry: Geometry,
    mode: Mode,
    /// Never locked across a call of the attacher.
    places: Mutex<Places>,
}

/// How the devices of a transport are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Each disk is a device of its own.
    WholeDevices,
    /// Disks are mapped to ranges of devices, up to [`MAX_MAPPINGS`](crate::MAX_MAPPINGS) on each. A range is as long
    /// as the disk, rounded up to whole pages. A device is filled before the next one is begun, and a
    /// device with nothing on it is free again.
    Packed,
}

/// A line of [`VpmemTransport::slot_map`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotEntry {
    /// The device, or the range of one.
    pub address: VpmemAddress,
    /// What it is used for.
    pub usage: SlotUse,
    /// The disk; none on a reserved device.
    pub disk: Option<Disk>,
}

/// What a device or range that is not free is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotUse {
    /// A disk is on it, or is about to be.
    Occupied,
    /// Whether the disk is on it is not known.
    Quarantined,
    /// A disk that was detached is still on it, because it cannot be unplugged.
    Retained,
    /// It is reserved: never to be handed out.
    Pinned,
}

impl fmt::Display for SlotUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SlotUse::Occupied => "occupied",
            SlotUse::Quarantined => "quarantined",
            SlotUse::Retained => "retained",
            SlotUse::Pinned => "pinned",
        })
    }
}

/// Why a transport cannot be made with these reserved devices.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidReserved {
    /// The VM has no such device.
    #[error("VPMEM device {0} cannot be reserved: the VM has {1} devices, from 0")]
    OutOfRange(DeviceNumber, u16),
    /// It is in the list twice.
    #[error("VPMEM device {0} is reserved twice")]
    Twice(DeviceNumber),
}

impl<A: Attacher> VpmemTransport<A> {
    /// All devices of `geometry` but the `reserved` ones, such as that of the disk which the VM
    /// boots from. A reserved device is never given to a disk, and never detached.
    ///
    /// # Errors
    ///
    /// [`InvalidReserved`] if one of the reserved devices does not exist or is there twice.
    pub fn new(
        attacher: A,
        geometry: Geometry,
        mode: Mode,
        reserved: &[DeviceNumber],
    ) -> Result<Self, InvalidReserved> {
        let places = Mutex::new(Places::new(mode, geometry, reserved)?);
        Ok(VpmemTransport {
            attacher,
            geometry,
            mode,
            places,
        })
    }

    /// How many devices the VM has, and how large they are.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How the devices are used.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// All devices and ranges that are not free, in order.
    pub fn slot_map(&self) -> Vec<SlotEntry> {
        self.places().slot_map()
    }

    /// How many devices are retained: their disks were detached and cannot be unplugged.
    pub fn retained(&self) -> usize {
        self.places().retained()
    }

    /// What is to be known of a disk before it can have a place. Changes nothing.
    async fn examine(&self, disk: &Disk, id: &DiskId) -> Result<Known, BackendError> {
        if !disk.is_read_only() {
            let message = format!("disk {disk} cannot be on VPMEM, which is read-only for the VM");
            return Err(BackendError::unsuitable(message));
        }
        let size = self.attacher.size(disk).await?;
        let most = self.geometry.device_size();
        if size == 0 || size > most {
            let message = format!(
                "disk {disk} of {size} bytes cannot be on VPMEM, whose devices hold 1 to {most} bytes"
            );
            return Err(BackendError::unsuitable(message));
        }
        let id = id.clone();
        Ok(Known { id, size })
    }

    /// The guard of a call that is about to be made.
    fn call<'a>(&'a self, disk: &'a Disk, address: VpmemAddress) -> Call<'a, A> {
        Call {
            transport: self,
            disk,
            address,
            outcome: Outcome::InDoubt,
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call of the attacher for one disk. It is made before the call and settled when it is dropped, so
/// that a future which is dropped and a panic leave the truth: the place is in doubt.
struct Call<'a, A: Attacher> {
    transport: &'a VpmemTransport<A>,
    disk: &'a Disk,
    address: VpmemAddress,
    outcome: Outcome,
}

impl<A: Attacher> Call<'_, A> {
    async fn set_up(mut self, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let attacher = &self.transport.attacher;
        let VpmemAddress { device, range } = self.address;
        let result = match range {
            None => attacher.attach(device, self.disk, id).await,
            Some(range) => attacher.map(device, range, self.disk, id).await,
        };
        self.outcome = match &result {
            Ok(()) => Outcome::Present,
            Err(error) if error.kind() == ErrorKind::Uncertain => Outcome::InDoubt,
            Err(_) => Outcome::Absent,
        };
        result.map(|()| self.address.into())
    }

    async fn tear_down(mut self) -> Result<(), BackendError> {
        let attacher = &self.transport.attacher;
        let VpmemAddress { device, range } = self.address;
        let result = match range {
            None => attacher.detach(device).await,
            Some(range) => attacher.unmap(device, range).await,
        };
        match result.as_ref().map_err(BackendError::kind) {
            Ok(()) | Err(ErrorKind::Gone) => self.outcome = Outcome::Absent,
            Err(ErrorKind::Unsuitable) if range.is_none() => {
                self.outcome = Outcome::Fixed;
                return Ok(());
            }
            Err(_) => {}
        }
        result
    }
}

impl<A: Attacher> Drop for Call<'_, A> {
    fn drop(&mut self) {
        self.transport.places().settle(self.disk, self.outcome);
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<A: Attacher> Transport for VpmemTransport<A> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.attacher.identify(disk).await
    }

    /// If this future is dropped, the disk keeps its place until it is detached.
    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let known = self.examine(disk, id).await?;
        let entered = self.places().enter(disk, known)?;
        match entered {
            Entered::Anew(address) => self.call(disk, address).set_up(id).await,
            Entered::Retained(address) => Ok(address.into()),
        }
    }

    /// If this future is dropped, the disk keeps its place, and can be detached again.
    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let left = self.places().leave(disk)?;
        match left {
            Some(address) => self.call(disk, address).tear_down().await,
            None => Ok(()),
        }
    }
}

impl<A> fmt::Debug for VpmemTransport<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VpmemTransport")
            .field("geometry", &self.geometry)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}
