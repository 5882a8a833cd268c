//! Which paths of a guest are taken, and how each device is mounted.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Bound;
use std::path::Path;

use foldhash::fast::RandomState;

use super::comparable;
use super::made_up::MadeUp;
use crate::{BackendError, DeviceLocator, MountOptions};

pub(super) struct Live {
    /// Each path that is taken by name, in comparable form, and what is there. What is below a path begins with it, so
    /// it comes next.
    pub(super) paths: BTreeMap<Box<[u8]>, Taken>,
    pub(super) made_up: MadeUp,
    /// A mount of each device, which has no other as a rule.
    pub(super) mounts: HashMap<DeviceLocator, MountedAs, RandomState>,
    /// The further mounts of devices.
    pub(super) more_mounts: HashMap<DeviceLocator, Vec<MountedAs>, RandomState>,
    /// For each further device of a filesystem, whether each mount that has it only reads it.
    devices: HashMap<DeviceLocator, Vec<bool>, RandomState>,
}

/// One mount of a device.
#[derive(PartialEq)]
pub(super) struct MountedAs {
    pub(super) options: MountOptions,
    /// The number in its path, if that was made up.
    pub(super) number: Option<u32>,
}

/// What has taken a path by name.
pub(super) enum Taken {
    Mount(DeviceLocator, MountOptions),
    Tree(Tree),
}

/// What is at a path that is no device.
#[derive(Clone, Copy)]
pub(super) enum Tree {
    Overlay,
    View,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Taken::Mount(device, _) => f.write_str(&device_there(device)),
            Taken::Tree(Tree::Overlay) => f.write_str("an overlay"),
            Taken::Tree(Tree::View) => f.write_str("a view"),
        }
    }
}

fn device_there(device: &DeviceLocator) -> String {
    format!("device {device}")
}

impl Live {
    pub(super) fn new(made_up: MadeUp) -> Self {
        Live {
            paths: BTreeMap::new(),
            made_up,
            mounts: HashMap::default(),
            more_mounts: HashMap::default(),
            devices: HashMap::default(),
        }
    }

    pub(super) fn add(&mut self, device: &DeviceLocator, mounted: MountedAs) {
        let options = &mounted.options;
        for extra in options.devices() {
            let users = self.devices.entry(extra.locator.clone()).or_default();
            users.push(options.is_read_only());
        }
        match self.mounts.entry(device.clone()) {
            Entry::Vacant(first) => {
                first.insert(mounted);
            }
            Entry::Occupied(_) => {
                let more = self.more_mounts.entry(device.clone()).or_default();
                more.push(mounted);
            }
        }
    }

    /// Takes out the mount that `is_it`.
    pub(super) fn remove(&mut self, device: &DeviceLocator, is_it: impl Fn(&MountedAs) -> bool) {
        let further = self.more_mounts.get_mut(device);
        let removed = match further {
            None => self.mounts.remove(device),
            Some(more) => {
                let removed = match more.iter().position(is_it) {
                    Some(index) => Some(more.swap_remove(index)),
                    None => more
                        .pop()
                        .and_then(|another| self.mounts.insert(device.clone(), another)),
                };
                if more.is_empty() {
                    self.more_mounts.remove(device);
                }
                removed
            }
        };
        if let Some(MountedAs { options, .. }) = removed {
            for extra in options.devices() {
                self.give_up(&extra.locator, options.is_read_only());
            }
        }
    }

    fn mounts_of(&self, device: &DeviceLocator) -> impl Iterator<Item = &MountOptions> {
        let one = self.mounts.get(device);
        let more = one.and_then(|_| self.more_mounts.get(device));
        let all = one.into_iter().chain(more.into_iter().flatten());
        all.map(|mounted| &mounted.options)
    }

    /// Refuses options that a device, or a further one, cannot have beside what it is mounted with.
    pub(super) fn ensure_compatible(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let mut others = self.mounts_of(device);
        if !others.all(|other| other.is_compatible_with(options)) {
            return Err(BackendError::conflict(
                "the device is mounted with options that exclude these; a writer has it alone, and \
                 readers must agree on the filesystem's options",
            ));
        }
        let reads = options.is_read_only();
        let is_shared = |users: &[bool]| users.is_empty() || (reads && users.iter().all(|ro| *ro));
        let of_others = |device| self.devices.get(device).map_or(&[][..], Vec::as_slice);
        if !is_shared(of_others(device)) {
            return Err(BackendError::conflict(
                "the device belongs to a filesystem of several devices that is mounted; only readers can share it",
            ));
        }
        for extra in options.devices() {
            let extra = &extra.locator;
            if extra == device {
                return Err(BackendError::invalid(
                    "the device is mounted, and a further device of the same filesystem",
                ));
            }
            let mounted: Vec<bool> = self
                .mounts_of(extra)
                .map(MountOptions::is_read_only)
                .collect();
            if !is_shared(of_others(extra)) || !is_shared(&mounted) {
                return Err(BackendError::conflict(format!(
                    "its further device {extra} is in use by another mount; only readers can share it"
                )));
            }
        }
        Ok(())
    }

    /// One mount less that has a further device.
    fn give_up(&mut self, device: &DeviceLocator, reads: bool) {
        let Some(users) = self.devices.get_mut(device) else {
            return;
        };
        if let Some(ours) = users.iter().position(|other| *other == reads) {
            users.swap_remove(ours);
        }
        if users.is_empty() {
            self.devices.remove(device);
        }
    }

    /// The comparable form of a path at which something can be mounted now; it may lie below `inside`.
    pub(super) fn free(
        &self,
        target: &Path,
        inside: Option<&[u8]>,
    ) -> Result<Box<[u8]>, BackendError> {
        let key = comparable(target)?;
        let made_up = self.made_up.at_or_below(&key).map(device_there);
        let by_name = || at_or_below(&self.paths, &key).map(ToString::to_string);
        if let Some(what) = made_up.or_else(by_name) {
            let taken = format!("{what} is mounted there or below");
            return Err(BackendError::conflict(taken));
        }
        let by_name = above(&self.paths, &key).map(|(path, what)| (path, what.to_string()));
        let made_up = self.made_up.above(&key);
        let made_up = made_up.map(|(path, device)| (path, device_there(device)));
        let nearest = by_name
            .into_iter()
            .chain(made_up)
            .max_by_key(|(path, _)| path.len());
        match nearest {
            Some((path, what)) if Some(path) != inside => {
                let path = String::from_utf8_lossy(path);
                let taken = format!("{what} is mounted above, at {path}");
                Err(BackendError::conflict(taken))
            }
            _ => Ok(key.into()),
        }
    }
}

/// What is taken by name at a path or below it.
pub(super) fn at_or_below<'p>(
    paths: &'p BTreeMap<Box<[u8]>, Taken>,
    key: &[u8],
) -> Option<&'p Taken> {
    let from_here = (Bound::Included(key), Bound::Unbounded);
    let (path, what) = paths.range::<[u8], _>(from_here).next()?;
    path.starts_with(key).then_some(what)
}

/// The nearest that is taken by name above a path, and where.
pub(super) fn above<'k, 'p>(
    paths: &'p BTreeMap<Box<[u8]>, Taken>,
    key: &'k [u8],
) -> Option<(&'k [u8], &'p Taken)> {
    if paths.is_empty() {
        return None;
    }
    let slashes = key.iter().enumerate().rev().skip(1);
    let slashes = slashes.filter(|(_, byte)| **byte == b'/');
    let mut above = slashes.map(|(index, _)| &key[..=index]);
    above.find_map(|path| Some((path, paths.get(path)?)))
}
