//! Paths that are made up: `m0`, `m1` and so on below one directory.
//!
//! There are as many as mounts, so none of them is kept as text: which numbers are taken says which paths are.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

use super::{comparable, is_windows};
use crate::{BackendError, DeviceLocator};

/// The numbers in paths that are made up, the lowest free one first.
#[derive(Default)]
pub(super) struct MadeUp {
    root: PathBuf,
    /// The root in comparable form, which each path begins with.
    prefix: Vec<u8>,
    /// What is at each number that was ever taken.
    devices: Vec<Option<DeviceLocator>>,
    free: BinaryHeap<Reverse<u32>>,
}

impl MadeUp {
    pub(super) fn below(root: PathBuf) -> Self {
        let mut made_up = MadeUp {
            root,
            ..MadeUp::default()
        };
        // Without one no path can be made up, and the first caller is told why.
        made_up.prefix = comparable(&made_up.path(0)).map_or_else(
            |_| Vec::new(),
            |mut key| {
                key.truncate(key.len() - b"m0/".len());
                key
            },
        );
        made_up
    }

    /// The first that no path stands in the way of, which `is_free` says. It is taken with [`put`](Self::put).
    pub(super) fn next(
        &mut self,
        is_free: impl Fn(&[u8]) -> bool,
    ) -> Result<(u32, PathBuf), BackendError> {
        // Numbers whose path is taken by name are kept aside, so that the next one is another.
        let mut passed = Vec::new();
        let found = loop {
            let Some(number) = self.take() else {
                let full = "all paths that can be made up are taken; release some mounts";
                break Err(BackendError::full(full));
            };
            let path = self.path(number);
            match comparable(&path) {
                Ok(key) if is_free(&key) => break Ok((number, path)),
                Ok(_) => passed.push(number),
                Err(error) => {
                    passed.push(number);
                    break Err(error);
                }
            }
        };
        passed
            .into_iter()
            .for_each(|number| drop(self.give_back(number)));
        found
    }

    fn take(&mut self) -> Option<u32> {
        if let Some(Reverse(number)) = self.free.pop() {
            return Some(number);
        }
        let number = u32::try_from(self.devices.len()).ok()?;
        self.devices.push(None);
        Some(number)
    }

    pub(super) fn put(&mut self, number: u32, device: DeviceLocator) {
        self.devices[number as usize] = Some(device);
    }

    /// What was there, if anything.
    pub(super) fn give_back(&mut self, number: u32) -> Option<DeviceLocator> {
        let device = self.devices[number as usize].take();
        self.free.push(Reverse(number));
        if self.is_empty() {
            self.devices = Vec::new();
            self.free = BinaryHeap::new();
        }
        device
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.devices.len()
    }

    /// What is at a path, or below it.
    pub(super) fn at_or_below(&self, key: &[u8]) -> Option<&DeviceLocator> {
        if self.prefix.starts_with(key) {
            return self.devices.iter().flatten().next();
        }
        self.above(key)
            .filter(|(path, _)| *path == key)
            .map(|(_, device)| device)
    }

    /// What is at a path or above it, and where.
    pub(super) fn above<'k>(&self, key: &'k [u8]) -> Option<(&'k [u8], &DeviceLocator)> {
        let rest = key.strip_prefix(&*self.prefix)?;
        let name = rest.split(|byte| *byte == b'/').next()?;
        let number = DeviceLocator::number(std::str::from_utf8(name.strip_prefix(b"m")?).ok()?)?;
        let device = self.devices.get(usize::try_from(number).ok()?)?.as_ref()?;
        Some((&key[..self.prefix.len() + name.len() + 1], device))
    }

    fn path(&self, number: u32) -> PathBuf {
        match self.root.to_str() {
            Some(root) if is_windows(root) => PathBuf::from(format!("{root}\\m{number}")),
            _ => Path::join(&self.root, format!("m{number}")),
        }
    }
}
