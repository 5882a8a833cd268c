//! The actual state of the VM, whatever its callers have been told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use super::names::{MISSING, SCHEME, address, well_formed};
use crate::{
    BackendError, BindMount, BlockDevice, DeviceLocator, DiskId, MountOptions, Overlay, Presence,
};

/// How large each disk is at first, in bytes.
pub(super) const DISK: u64 = 64 << 20;

/// How many partitions each disk has.
const PARTITIONS: NonZeroU32 = NonZeroU32::new(4).expect("four is not zero");

/// Whether a call takes effect, and whether its caller learns of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// It happens, and the caller is told.
    Delivered,
    /// It happens, and the caller does not know.
    Untold,
    /// It does not happen, and the caller does not know.
    Lost,
}

/// The slots of the VM and the mount table of its guest.
pub(super) struct VmState {
    capacity: u32,
    /// Slots that were used and are free again, all below `fresh`.
    freed: BTreeSet<u32>,
    /// The lowest slot that was never used.
    fresh: u32,
    pub(super) slots: HashMap<u32, Slot>,
    by_disk: HashMap<DiskId, u32>,
    pub(super) mounts: BTreeMap<Arc<Path>, At>,
    /// Of disks that have grown, in bytes.
    pub(super) sizes: HashMap<DiskId, u64>,
    attachments: u64,
    pub(super) host_gone: bool,
    pub(super) guest_gone: bool,
}

/// A slot that is not free.
pub(super) struct Slot {
    pub(super) disk: DiskId,
    locator: DeviceLocator,
    /// Tells this attachment from later ones in the same slot.
    attachment: u64,
    /// Whether the disk is in it; an empty slot is kept until a detach has been confirmed.
    filled: bool,
    /// Whether the guest sees the device.
    plugged: bool,
    /// How often the device is mounted.
    mounts: u32,
    /// Whether the process that runs now has attached or adopted it.
    ours: bool,
}

/// What is at a path of the guest.
pub(super) struct At {
    pub(super) what: What,
    /// How large its filesystem is, in bytes.
    pub(super) size: u64,
    read_only: bool,
    /// How many layers of live overlays are in it.
    pins: u32,
}

/// A device that is in use.
pub(super) struct Use {
    pub(super) slot: u32,
    attachment: u64,
}

pub(super) enum What {
    Device {
        locator: DeviceLocator,
        /// The device, and the further ones of its filesystem.
        uses: Vec<Use>,
    },
    /// The mounts that its layers are in.
    Overlay(Overlay, Vec<Arc<Path>>),
    /// Of a mount.
    View(BindMount),
}

impl VmState {
    pub(super) fn new(capacity: u32) -> Self {
        VmState {
            capacity,
            freed: BTreeSet::new(),
            fresh: 0,
            slots: HashMap::new(),
            by_disk: HashMap::new(),
            mounts: BTreeMap::new(),
            sizes: HashMap::new(),
            attachments: 0,
            host_gone: false,
            guest_gone: false,
        }
    }

    pub(super) fn kill_guest(&mut self) {
        self.guest_gone = true;
        self.mounts.clear();
        for slot in self.slots.values_mut() {
            (slot.plugged, slot.mounts) = (false, 0);
        }
    }

    pub(super) fn kill(&mut self) {
        self.kill_guest();
        self.host_gone = true;
        self.slots.clear();
        self.by_disk.clear();
    }

    /// Where the disk is, or where it may be.
    pub(super) fn locator_of(&self, disk: &DiskId) -> Option<DeviceLocator> {
        self.by_disk
            .get(disk)
            .map(|slot| self.slots[slot].locator.clone())
    }

    pub(super) fn device_at(&self, target: &Path) -> Option<DeviceLocator> {
        match &self.mounts.get(target)?.what {
            What::Device { locator, .. } => Some(locator.clone()),
            What::Overlay(..) | What::View(_) => None,
        }
    }

    pub(super) fn overlay_at(&self, target: &Path) -> Option<Overlay> {
        match &self.mounts.get(target)?.what {
            What::Overlay(overlay, _) => Some(overlay.clone()),
            _ => None,
        }
    }

    pub(super) fn attach(
        &mut self,
        disk: &DiskId,
        reach: Reach,
    ) -> Result<DeviceLocator, BackendError> {
        if let Some(locator) = self.locator_of(disk) {
            return Err(BackendError::conflict(format!(
                "disk {disk} has slot {locator} already"
            )));
        }
        let number = match self.freed.pop_first() {
            Some(number) => number,
            None if self.fresh < self.capacity => {
                self.fresh += 1;
                self.fresh - 1
            }
            None => {
                let message = format!("none of {} slots is free for disk {disk}", self.capacity);
                return Err(BackendError::full(message));
            }
        };
        let locator = DeviceLocator::new(SCHEME, number).expect("a number is an address");
        let filled = reach != Reach::Lost;
        self.attachments += 1;
        let slot = Slot {
            disk: disk.clone(),
            locator: locator.clone(),
            attachment: self.attachments,
            filled,
            plugged: filled && !self.guest_gone,
            mounts: 0,
            ours: true,
        };
        self.slots.insert(number, slot);
        self.by_disk.insert(disk.clone(), number);
        Ok(locator)
    }

    /// Takes the disk out, whatever the guest does with it. The slot is free once the caller knows.
    pub(super) fn detach(&mut self, disk: &DiskId, reach: Reach) {
        let Some(&number) = self.by_disk.get(disk) else {
            return;
        };
        if !self.slots[&number].ours {
            return;
        }
        if reach == Reach::Delivered {
            self.by_disk.remove(disk);
            self.slots.remove(&number);
            self.freed.insert(number);
        } else if let Some(slot) = self.slots.get_mut(&number) {
            let filled = slot.filled && reach == Reach::Lost;
            (slot.filled, slot.plugged) = (filled, slot.plugged && filled);
        }
    }

    /// Forgets what only the process knew: which slots it kept empty, and which disks are its own.
    pub(super) fn restart(&mut self) {
        self.slots.values_mut().for_each(|slot| slot.ours = false);
        let kept = self.slots.extract_if(|_, slot| !slot.filled);
        for (number, slot) in kept {
            self.by_disk.remove(&slot.disk);
            self.freed.insert(number);
        }
    }

    pub(super) fn attach_foreign(&mut self, disk: &DiskId) -> Result<DeviceLocator, BackendError> {
        let locator = self.attach(disk, Reach::Delivered)?;
        let number = self.by_disk[disk];
        self.slots.get_mut(&number).expect("it was filled").ours = false;
        Ok(locator)
    }

    pub(super) fn take_out(&mut self, disk: &DiskId) {
        if let Some(number) = self.by_disk.remove(disk) {
            self.slots.remove(&number);
            self.freed.insert(number);
        }
    }

    /// The slot that holds the disk, if that is where it is said to be.
    fn slot_with(&mut self, disk: &DiskId, at: Option<&DeviceLocator>) -> Option<&mut Slot> {
        let number = self.by_disk.get(disk)?;
        let slot = self.slots.get_mut(number)?;
        at.is_none_or(|at| *at == slot.locator).then_some(slot)
    }

    /// The process that runs now knows of the disk: a detach of it has an effect, whatever the adoption answers.
    pub(super) fn recognise(&mut self, disk: &DiskId, at: Option<&DeviceLocator>) {
        if let Some(slot) = self.slot_with(disk, at) {
            slot.ours = true;
        }
    }

    /// Keeps the slot of a disk of which an adoption could not tell whether it is there, until it is detached.
    pub(super) fn keep_slot(&mut self, disk: &DiskId, locator: &DeviceLocator) {
        let Ok(number) = address(locator) else { return };
        let taken = self.by_disk.contains_key(disk) || self.slots.contains_key(&number);
        if taken || number >= self.capacity {
            return;
        }
        self.freed.extend(self.fresh..number);
        self.fresh = self.fresh.max(number + 1);
        self.freed.remove(&number);
        self.attachments += 1;
        let slot = Slot {
            disk: disk.clone(),
            locator: locator.clone(),
            attachment: self.attachments,
            filled: false,
            plugged: false,
            mounts: 0,
            ours: true,
        };
        self.slots.insert(number, slot);
        self.by_disk.insert(disk.clone(), number);
    }

    pub(super) fn adopt(
        &mut self,
        disk: &DiskId,
        at: Option<&DeviceLocator>,
    ) -> Presence<DeviceLocator> {
        match self.slot_with(disk, at) {
            Some(slot) => Presence::Present(slot.locator.clone()),
            None => Presence::Absent,
        }
    }

    pub(super) fn adopt_mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Presence {
        let there = self.mounts.get(target).is_some_and(|at| match &at.what {
            What::Device { locator, uses } => {
                let all = all_devices(device, options);
                let there = uses.iter().map(|used| used.slot);
                locator == device
                    && at.read_only == options.is_read_only()
                    && there.eq(all.filter_map(|device| address(device).ok()))
            }
            What::Overlay(..) | What::View(_) => false,
        });
        present(there)
    }

    pub(super) fn adopt_overlay(&self, overlay: &Overlay) -> Presence {
        let there = self
            .mounts
            .get(&*overlay.target)
            .is_some_and(|at| match &at.what {
                What::Overlay(_, pinned) => {
                    let layers = overlay.layers.iter().chain(&overlay.scratch);
                    layers
                        .map(|layer| self.mount_around(layer).ok())
                        .eq(pinned.iter().cloned().map(Some))
                }
                What::Device { .. } | What::View(_) => false,
            });
        present(there)
    }

    pub(super) fn adopt_view(&self, bind: &BindMount) -> Presence {
        let there = self.mounts.get(&*bind.target);
        present(there.is_some_and(|at| matches!(&at.what, What::View(made) if made == bind)))
    }

    pub(super) fn unplug(&mut self, device: &DeviceLocator) -> Result<(), BackendError> {
        let number = address(device)?;
        let Some(slot) = self.slots.get_mut(&number) else {
            return Ok(());
        };
        if slot.mounts > 0 {
            return Err(BackendError::busy(format!("device {device} is mounted")));
        }
        slot.plugged = false;
        Ok(())
    }

    pub(super) fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let number = address(device)?;
        match self.slots.get(&number) {
            Some(slot) if slot.plugged => Ok(BlockDevice::new(format!("/dev/fake{number}"))),
            _ => Err(BackendError::not_found(format!(
                "the guest has no device {device}"
            ))),
        }
    }

    pub(super) fn mount(
        &mut self,
        device: &DeviceLocator,
        target: &Arc<Path>,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        for device in all_devices(device, options) {
            self.resolve(device)?;
        }
        if let Some(partition) = options.partition()
            && partition > PARTITIONS
        {
            let message = format!("device {device} has no partition {partition}");
            return Err(BackendError::not_found(message));
        }
        self.check_free(target)?;
        let mut uses = Vec::with_capacity(1);
        for device in all_devices(device, options) {
            let number = address(device)?;
            let slot = self.slots.get_mut(&number);
            let slot = slot.expect("a resolved device has a slot");
            slot.mounts += 1;
            uses.push(Use {
                slot: number,
                attachment: slot.attachment,
            });
        }
        let disk = &self.slots[&uses[0].slot].disk;
        let size = self.sizes.get(disk).copied().unwrap_or(DISK);
        let what = What::Device {
            locator: device.clone(),
            uses,
        };
        let at = At {
            what,
            size,
            read_only: options.is_read_only(),
            pins: 0,
        };
        self.mounts.insert(target.clone(), at);
        Ok(())
    }

    pub(super) fn unmount(&mut self, target: &Path) -> Result<(), BackendError> {
        let Some(at) = self.mounts.get(target) else {
            return Ok(());
        };
        let What::Device { .. } = at.what else {
            let message = format!("{} is not the mount of a device", target.display());
            return Err(BackendError::conflict(message));
        };
        self.check_unused(target, at)?;
        let Some(What::Device { uses, .. }) = self.mounts.remove(target).map(|at| at.what) else {
            return Ok(());
        };
        for Use { slot, attachment } in uses {
            // After a detach under a live mount, another disk may sit in the slot.
            let slot = self.slots.get_mut(&slot);
            if let Some(slot) = slot.filter(|slot| slot.attachment == attachment) {
                slot.mounts -= 1;
            }
        }
        Ok(())
    }

    pub(super) fn combine(
        &mut self,
        overlay: &Overlay,
        target: &Arc<Path>,
    ) -> Result<(), BackendError> {
        if overlay.layers.is_empty() {
            let message = format!("an overlay at {} needs a layer", target.display());
            return Err(BackendError::invalid(message));
        }
        self.check_free(target)?;
        let mut pinned = Vec::with_capacity(overlay.layers.len() + 1);
        for layer in overlay.layers.iter().chain(&overlay.scratch) {
            pinned.push(self.mount_around(layer)?);
        }
        if let (Some(scratch), Some(around)) = (&overlay.scratch, pinned.last())
            && self.mounts[around].read_only
        {
            let message = format!("scratch {} is read-only", scratch.display());
            return Err(BackendError::invalid(message));
        }
        for path in &pinned {
            self.mounts
                .get_mut(path)
                .expect("the mount was just found")
                .pins += 1;
        }
        let read_only = overlay.scratch.is_none();
        self.mounts.insert(
            target.clone(),
            At {
                what: What::Overlay(overlay.clone(), pinned),
                size: 0,
                read_only,
                pins: 0,
            },
        );
        Ok(())
    }

    pub(super) fn separate(&mut self, target: &Path) -> Result<(), BackendError> {
        let Some(at) = self.mounts.get(target) else {
            return Ok(());
        };
        let What::Overlay(..) = &at.what else {
            let message = format!("{} is no overlay", target.display());
            return Err(BackendError::conflict(message));
        };
        self.check_unused(target, at)?;
        if let Some(At {
            what: What::Overlay(_, pinned),
            ..
        }) = self.mounts.remove(target)
        {
            for path in pinned {
                if let Some(layer) = self.mounts.get_mut(&path) {
                    layer.pins -= 1;
                }
            }
        }
        Ok(())
    }

    pub(super) fn bind(
        &mut self,
        bind: &BindMount,
        target: &Arc<Path>,
    ) -> Result<(), BackendError> {
        self.check_free(target)?;
        let source = bind.source.display();
        let Some(at) = self.mounts.get_mut(&*bind.source) else {
            let message = format!("nothing is mounted at {source}");
            return Err(BackendError::not_found(message));
        };
        if bind.options.subpath().starts_with(MISSING) {
            let message = format!("{source} has no directory {MISSING}");
            return Err(BackendError::not_found(message));
        }
        at.pins += 1;
        let view = At {
            what: What::View(bind.clone()),
            size: 0,
            read_only: at.read_only || bind.options.is_read_only(),
            pins: 0,
        };
        self.mounts.insert(target.clone(), view);
        Ok(())
    }

    pub(super) fn unbind(&mut self, target: &Path) -> Result<(), BackendError> {
        let Some(at) = self.mounts.get(target) else {
            return Ok(());
        };
        let What::View(bind) = &at.what else {
            let message = format!("{} is no view", target.display());
            return Err(BackendError::conflict(message));
        };
        let source = bind.source.clone();
        self.check_unused(target, at)?;
        self.mounts.remove(target);
        if let Some(source) = self.mounts.get_mut(&*source) {
            source.pins -= 1;
        }
        Ok(())
    }

    /// What the VM still holds, one line for each thing.
    pub(super) fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self.slots.values().map(Slot::to_string).collect();
        left.extend(self.mounts.iter().map(|(target, at)| match &at.what {
            What::Device { locator, .. } => format!("{} mounts {locator}", target.display()),
            What::Overlay(_, layers) => {
                format!("{} overlays {} layers", target.display(), layers.len())
            }
            What::View(bind) => {
                format!("{} shows {}", target.display(), bind.source.display())
            }
        }));
        left.sort();
        left
    }

    fn check_free(&self, target: &Path) -> Result<(), BackendError> {
        well_formed(target)?;
        if self.mounts.contains_key(target) {
            let message = format!("something is mounted at {} already", target.display());
            return Err(BackendError::conflict(message));
        }
        Ok(())
    }

    fn check_unused(&self, target: &Path, at: &At) -> Result<(), BackendError> {
        if at.pins > 0 {
            let message = format!(
                "{} has a view, or a layer of a live overlay",
                target.display()
            );
            return Err(BackendError::busy(message));
        }
        // Paths are ordered by component, so what is below a path follows it.
        let after = (Bound::Excluded(target), Bound::Unbounded);
        match self.mounts.range::<Path, _>(after).next() {
            Some((below, _)) if below.starts_with(target) => {
                let message = format!("{} is mounted below {}", below.display(), target.display());
                Err(BackendError::busy(message))
            }
            _ => Ok(()),
        }
    }

    /// The mount that a directory is in.
    fn mount_around(&self, directory: &Path) -> Result<Arc<Path>, BackendError> {
        directory
            .ancestors()
            .find_map(|path| self.mounts.get_key_value(path))
            .map(|(path, _)| path.clone())
            .ok_or_else(|| {
                let message = format!("nothing is mounted at {}", directory.display());
                BackendError::not_found(message)
            })
    }
}

/// A device, and the further ones of its filesystem.
fn all_devices<'a>(
    device: &'a DeviceLocator,
    options: &'a MountOptions,
) -> impl Iterator<Item = &'a DeviceLocator> {
    let further = options.devices().iter().map(|device| &device.locator);
    std::iter::once(device).chain(further)
}

fn present(there: bool) -> Presence {
    match there {
        true => Presence::Present(()),
        false => Presence::Absent,
    }
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verb = if self.filled { "holds" } else { "is kept for" };
        write!(f, "{} {verb} {}", self.locator, self.disk)
    }
}
