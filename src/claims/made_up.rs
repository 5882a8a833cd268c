//! Paths that are made up: `m0`, `m1` and so on below one directory.
//!
//! There are as many as mounts, so none of them is kept as text: which numbers are taken says which paths are.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::{MAX_LEN, comparable, is_windows};
use crate::{BackendError, DeviceLocator};

/// For how many paths memory is kept when the last mount is gone.
const FEW: usize = 64;

/// The numbers in paths that are made up, the lowest free one first.
#[derive(Default)]
pub(super) struct MadeUp {
    /// What each path begins with, up to its number.
    stem: OsString,
    /// The root in comparable form, which each path begins with. Empty if no path can be made up below it.
    prefix: Vec<u8>,
    /// What is at each number that was ever taken.
    devices: Vec<Option<DeviceLocator>>,
    free: BinaryHeap<Reverse<u32>>,
}

impl MadeUp {
    pub(super) fn below(root: PathBuf) -> Self {
        let stem = match root.to_str() {
            Some(root) if is_windows(root) => format!("{root}\\m").into(),
            _ => Path::join(&root, "m").into_os_string(),
        };
        let mut made_up = MadeUp {
            stem,
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

    /// The first that no path stands in the way of, which `is_free` says; without it none does. It is taken with
    /// [`put`](Self::put).
    pub(super) fn next(
        &mut self,
        is_free: Option<impl Fn(&[u8]) -> bool>,
    ) -> Result<(u32, PathBuf), BackendError> {
        // Numbers whose path is taken by name are kept aside, so that the next one is another.
        let mut passed = Vec::new();
        let found = loop {
            let Some(number) = self.take() else {
                let full = "all paths that can be made up are taken; release some mounts";
                break Err(BackendError::full(full));
            };
            let path = self.path(number);
            match self.is_usable(&path, is_free.as_ref()) {
                Ok(true) => break Ok((number, path)),
                Ok(false) => passed.push(number),
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

    fn is_usable(
        &self,
        path: &Path,
        is_free: Option<&impl Fn(&[u8]) -> bool>,
    ) -> Result<bool, BackendError> {
        let is_well_formed = !self.prefix.is_empty() && path.as_os_str().len() <= MAX_LEN;
        match is_free {
            None if is_well_formed => Ok(true),
            None => comparable(path).map(|_| true),
            Some(is_free) => comparable(path).map(|key| is_free(&key)),
        }
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
            // Begins anew, and keeps the memory of a few.
            self.devices.clear();
            self.devices.shrink_to(FEW);
            self.free.clear();
            self.free.shrink_to(FEW);
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
        // Room for the longest number: nothing is copied on the way.
        let mut path = OsString::with_capacity(self.stem.len() + 10);
        path.push(&self.stem);
        write!(path, "{number}").expect("text can be added to any");
        path.into()
    }
}
