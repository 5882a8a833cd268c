//! The disks under a mount.

use crate::attach::{Attach, Attachment};
use crate::lease::Which;
use crate::options::ExtraDevice;
use crate::release::{Releasing, both, nothing_to_release};
use crate::{Disk, DiskId, Error, MountOptions, MountRequest, Step};

use super::ensure_writable;
use super::further::Further;

/// The disks under a mount, as far as its manager keeps them attached: the one that is mounted, and the further ones of its
/// filesystem. The entry of the mount holds them, not its leases: whatever happens to those, the disks stay
/// attached until it is unmounted.
#[derive(Default)]
pub(crate) struct Attachments {
    pub(crate) mounted: Option<Attachment>,
    /// In the order of the options.
    pub(crate) devices: Further<Attachment>,
}

/// Which attachments they are.
#[derive(Default, PartialEq)]
pub(crate) struct WhichDisks {
    pub(crate) mounted: Option<Which<Attach>>,
    pub(crate) devices: Further<Which<Attach>>,
}

impl WhichDisks {
    pub(crate) fn ids(&self) -> impl Iterator<Item = &DiskId> {
        self.mounted.iter().chain(&*self.devices).map(Which::key)
    }
}

/// Which disks they are.
#[derive(Clone)]
pub(crate) struct DiskIds {
    pub(crate) mounted: Option<DiskId>,
    pub(crate) devices: Box<[DiskId]>,
}

impl Attachments {
    /// One disk, and the further ones, as their request has them.
    pub(crate) fn new(mounted: Attachment, devices: Vec<Attachment>) -> Self {
        Attachments {
            mounted: Some(mounted),
            devices: devices.into_iter().collect(),
        }
    }

    /// The options of a request with the places of its further disks; these have the order of the options from then on.
    pub(crate) fn place(&mut self, request: &MountRequest) -> Result<MountOptions, Error> {
        if self.devices.is_empty() {
            return Ok(request.options().clone());
        }
        let roles = request.devices().iter().map(|device| device.role);
        let places = roles.zip(&*self.devices);
        let places = places.map(|(role, there)| ExtraDevice::new(role, there.locator().clone()));
        let options = request.options().with_devices(places.collect());
        let options = options.map_err(|why| {
            let cause = crate::BackendError::invalid(why.to_string());
            Error::new(Step::Mount, cause)
        })?;
        let place = |there: &Attachment| {
            let mut places = options.devices().iter();
            places.position(|device| device.locator == *there.locator())
        };
        self.devices.sort_by_key(place);
        Ok(options)
    }

    pub(crate) fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.mounted
            .iter()
            .chain(&*self.devices)
            .map(Attachment::disk)
    }

    pub(crate) fn ids(&self) -> DiskIds {
        let id = |there: &Attachment| there.id().clone();
        DiskIds {
            mounted: self.mounted.as_ref().map(id),
            devices: self.devices.iter().map(id).collect(),
        }
    }

    pub(crate) fn which(&self) -> WhichDisks {
        WhichDisks {
            mounted: self.mounted.as_ref().map(Attachment::which),
            devices: self.devices.iter().map(Attachment::which).collect(),
        }
    }

    /// Whether all of them stay as they are while nobody uses them.
    pub(crate) fn may_linger(&self) -> bool {
        let mut all = self.mounted.iter().chain(&*self.devices);
        self.mounted.is_some()
            && all.all(|there| there.disk().is_read_only() && there.id().version().is_some())
    }

    /// Refuses a mount for writing of what the VM cannot write to.
    pub(crate) fn ensure_writable(&self, request: &MountRequest) -> Result<(), Error> {
        self.disks()
            .try_for_each(|disk| ensure_writable(disk, request))
    }

    /// One more share of each.
    pub(crate) fn again(&self) -> Self {
        Attachments {
            mounted: self.mounted.as_ref().map(Attachment::again),
            devices: self.devices.iter().map(Attachment::again).collect(),
        }
    }

    /// Leaves all of them attached, for the next process.
    pub(crate) fn abandon(self) {
        let all = self.mounted.into_iter().chain(self.devices);
        all.for_each(Attachment::abandon);
    }

    /// None of them lingers: the mount has done so, if it may.
    pub(crate) fn releasing(self) -> Releasing {
        let Some(mounted) = self.mounted else {
            return nothing_to_release();
        };
        let mounted = mounted.releasing_now();
        if self.devices.is_empty() {
            return mounted;
        }
        let devices = self.devices.into_iter().map(Attachment::releasing_now);
        let devices: Vec<_> = devices.collect();
        Releasing::waits(async move {
            let mut outcome = mounted.await;
            for device in devices {
                outcome = both(outcome, device.await);
            }
            outcome
        })
    }
}
