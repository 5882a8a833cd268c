//! What was mounted, and what there is to undo.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockmount::{BackendError, MountOptions};
use rustix::io::Errno;

use crate::device::DeviceNumber;
use crate::device::partitions::Added;
use crate::device::windows::WindowUse;
use crate::errno::errno_error;
use crate::kernel::Kernel;
use crate::mount::mounting::{self, MountId};
use crate::mount::places::PlaceUse;
use crate::mount::target::{FileId, PathAt, Target};
use crate::mount::{mountinfo, users};
use crate::undo::journal::{Note, strike};

/// What there is to undo, by target.
///
/// The lock is held for look-ups only, never across a system call.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<HashMap<PathBuf, Entry>>);

/// One mount. Dropping it, which is right only when it is unmounted, removes the directories that
/// were made for it and gives up the device.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) mount: MountId,
    /// What is on record about it; struck as soon as it is unmounted.
    pub(crate) note: Option<Note>,
    pub(crate) place: PlaceUse,
    #[expect(dead_code, reason = "held for what dropping it does")]
    pub(crate) claim: Claim,
    #[expect(dead_code, reason = "held for what dropping it does")]
    pub(crate) partition: Option<Arc<Added>>,
    /// Goes after the partition of it.
    #[expect(dead_code, reason = "held for what dropping it does")]
    pub(crate) window: Option<Arc<WindowUse>>,
}

/// What a mount keeps others from mounting otherwise.
#[derive(Debug)]
#[expect(dead_code, reason = "held for what dropping it does")]
pub(crate) enum Claim {
    /// A device, with the options it is mounted with.
    Device(DeviceClaim),
    /// The scratch of an overlay, if it has one.
    Scratch(Option<ScratchClaim>),
}

/// What is at a target now.
pub(crate) enum Now {
    /// Our mount, on top; the way to it.
    Ours(PathAt),
    /// Our mount, below something of others.
    Covered,
    /// Something of others instead.
    Replaced,
    /// Nothing of ours, and nothing of others.
    Gone,
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, HashMap<PathBuf, Entry>> {
        // A change is one insertion or removal: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, entry: Entry) {
        self.entries()
            .insert(entry.place.target().path().to_owned(), entry);
    }

    /// Whether there is a mount of ours at a target.
    pub(crate) fn has(&self, target: &Path) -> bool {
        self.entries().contains_key(target)
    }

    /// One attempt to unmount what is in the ledger for a target. Blocks.
    pub(crate) fn unmount(&self, target: &Target, kernel: Kernel) -> Result<(), BackendError> {
        let mount = self.entries().get(target.path()).map(|entry| entry.mount);
        let Some(mount) = mount else {
            return not_ours(target);
        };
        match now(target, mount, kernel)? {
            Now::Covered => return Err(foreign(target, "something over it")),
            Now::Replaced => return Err(foreign(target, "something else in its place")),
            Now::Gone => {}
            Now::Ours(way) => match mounting::unmount(&way) {
                Ok(()) => {}
                Err(Errno::BUSY) => return Err(busy(target.path())),
                Err(errno) => {
                    return Err(errno_error(
                        format!("cannot unmount {}", target.path().display()),
                        errno,
                    ));
                }
            },
        }
        // The directories are removed where the lock is not held.
        let done = self.entries().remove(target.path());
        if let Some(mut entry) = done {
            strike(entry.note.take());
        }
        Ok(())
    }

    /// The same error with the names of those who use the mount: they cost a walk through `/proc`.
    pub(crate) fn name_users(&self, target: &Path, error: BackendError) -> BackendError {
        let Some(mount) = self.entries().get(target).map(|entry| entry.mount) else {
            return error;
        };
        let users = users::of_mount(target, mount.number());
        match users.is_empty() {
            true => BackendError::busy(format!(
                "{} by somebody who cannot be seen from here",
                error.message()
            )),
            false => BackendError::busy(format!("{} by {}", error.message(), users.join(", "))),
        }
    }
}

fn busy(target: &Path) -> BackendError {
    BackendError::busy(format!("cannot unmount {}: it is in use", target.display()))
}

/// A target that we did not mount is unmounted, unless somebody else did.
fn not_ours(target: &Target) -> Result<(), BackendError> {
    let Some(place) = target.find()? else {
        return Ok(());
    };
    if place.is_mount_point()? {
        let message = format!(
            "cannot unmount {}: somebody else mounted it",
            target.path().display()
        );
        return Err(BackendError::conflict(message));
    }
    Ok(())
}

fn foreign(target: &Target, what: &str) -> BackendError {
    let path = target.path().display();
    BackendError::conflict(format!(
        "cannot unmount {path}: somebody else mounted {what}"
    ))
}

/// Looks for a mount at a target.
pub(crate) fn now(target: &Target, mount: MountId, kernel: Kernel) -> Result<Now, BackendError> {
    let place = target.find()?;
    let is_mount_point = match &place {
        Some(place) => place.is_mount_point()?,
        None => false,
    };
    if let Some(place) = place.filter(|_| is_mount_point)
        && MountId::of(place.directory(), kernel)? == mount
    {
        return Ok(Now::Ours(place.into_path_at()));
    }
    let table =
        mountinfo::read().map_err(|error| errno_error("cannot read the table of mounts", error))?;
    let is_covered = mountinfo::at(&table, target.path())
        .iter()
        .any(|line| mount.is(line));
    Ok(match (is_covered, is_mount_point) {
        (true, _) => Now::Covered,
        (false, true) => Now::Replaced,
        (false, false) => Now::Gone,
    })
}

/// Which devices we have mounted how: the kernel gives all mounts of a device one superblock.
#[derive(Debug, Default)]
pub(crate) struct Devices(Mutex<HashMap<DeviceNumber, Arc<Mounted>>>);

/// The mounts of one device. The lock is held while one more is made, because how it is made
/// depends on them; it keeps up nobody but the same device.
type Mounted = Mutex<Vec<MountOptions>>;

/// One mount of a device; dropping it is the end of it.
#[derive(Debug)]
pub(crate) struct DeviceClaim {
    devices: Arc<Devices>,
    device: DeviceNumber,
    options: MountOptions,
}

impl Devices {
    /// Claims a device for one more mount and makes it; `make` is told whether it is the only one.
    pub(crate) fn claim<T>(
        self: &Arc<Self>,
        device: DeviceNumber,
        options: &MountOptions,
        make: impl FnOnce(bool) -> Result<T, BackendError>,
    ) -> Result<(T, DeviceClaim), BackendError> {
        let mounted = self.map().entry(device).or_default().clone();
        let made = {
            let mut mounted = mounted.lock().unwrap_or_else(PoisonError::into_inner);
            let made = match mounted
                .iter()
                .all(|other| other.is_compatible_with(options))
            {
                true => make(mounted.is_empty()),
                false => Err(BackendError::conflict(format!(
                    "block device {}:{} is mounted already with options that exclude these",
                    device.major, device.minor,
                ))),
            };
            if made.is_ok() {
                mounted.push(options.clone());
            }
            made
        };
        drop(mounted);
        match made {
            Ok(made) => Ok((
                made,
                DeviceClaim {
                    devices: self.clone(),
                    device,
                    options: options.clone(),
                },
            )),
            Err(error) => {
                self.forget_unused();
                Err(error)
            }
        }
    }

    /// Claims a device for a mount that an earlier process has made.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        device: DeviceNumber,
        options: &MountOptions,
    ) -> DeviceClaim {
        let mounted = self.map().entry(device).or_default().clone();
        let mut mounted = mounted.lock().unwrap_or_else(PoisonError::into_inner);
        mounted.push(options.clone());
        DeviceClaim {
            devices: self.clone(),
            device,
            options: options.clone(),
        }
    }

    fn map(&self) -> MutexGuard<'_, HashMap<DeviceNumber, Arc<Mounted>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who works on a device has a handle of its own, taken under this lock.
    fn forget_unused(&self) {
        self.map().retain(|_, mounted| {
            let is_idle = Arc::strong_count(mounted) == 1;
            !is_idle || mounted.try_lock().is_ok_and(|mounted| !mounted.is_empty())
        });
    }
}

impl Drop for DeviceClaim {
    fn drop(&mut self) {
        let mounted = self.devices.map().get(&self.device).cloned();
        if let Some(mounted) = mounted {
            let mut mounted = mounted.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = mounted.iter().position(|options| *options == self.options) {
                mounted.swap_remove(at);
            }
        }
        self.devices.forget_unused();
    }
}

/// Which scratch directories are in use: two overlays that write to one destroy each other's.
#[derive(Debug, Default)]
pub(crate) struct Scratches(Mutex<Vec<FileId>>);

/// The use of a scratch directory.
#[derive(Debug)]
pub(crate) struct ScratchClaim {
    scratches: Arc<Scratches>,
    directory: FileId,
}

impl Scratches {
    /// Claims a scratch directory; nothing if another overlay has it.
    pub(crate) fn claim(self: &Arc<Self>, directory: FileId) -> Option<ScratchClaim> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if used.contains(&directory) {
            return None;
        }
        used.push(directory);
        Some(ScratchClaim {
            scratches: self.clone(),
            directory,
        })
    }
}

impl ScratchClaim {
    pub(crate) fn directory(&self) -> FileId {
        self.directory
    }
}

impl Drop for ScratchClaim {
    fn drop(&mut self) {
        let mut used = self
            .scratches
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        used.retain(|directory| *directory != self.directory);
    }
}
