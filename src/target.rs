//! Paths in the guest: which are well formed, which are taken, which are made up.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::{Mutex, MutexGuard};

use crate::{BackendError, DeviceLocator, MountOptions};

/// The longest path that a Linux guest takes, in bytes (`PATH_MAX` less the final zero).
const MAX_LEN: usize = 4095;

/// What is live in one guest: which paths are taken, and how each device is mounted.
#[derive(Clone)]
pub(crate) struct Claims(Arc<Shared>);

struct Shared {
    root: PathBuf,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    /// Each taken path in comparable form, and what is there. What is below a path begins with it, so
    /// it comes next.
    paths: BTreeMap<Box<[u8]>, Taken>,
    mounts: HashMap<DeviceLocator, Vec<MountOptions>, RandomState>,
    /// For each further device of a filesystem, whether each mount that has it only reads it.
    devices: HashMap<DeviceLocator, Vec<bool>, RandomState>,
    numbers: Numbers,
}

/// The numbers in paths that are made up, the lowest free one first.
#[derive(Default)]
struct Numbers {
    /// The lowest that was never taken.
    next: u32,
    free: BinaryHeap<Reverse<u32>>,
}

impl Numbers {
    fn take(&mut self) -> Option<u32> {
        if let Some(Reverse(number)) = self.free.pop() {
            return Some(number);
        }
        let number = self.next;
        self.next = number.checked_add(1)?;
        Some(number)
    }

    fn give_back(&mut self, number: u32) {
        self.free.push(Reverse(number));
        if self.free.len() == self.next as usize {
            // None is taken.
            *self = Numbers::default();
        }
    }
}

/// What has taken a path.
enum Taken {
    Mount(DeviceLocator, MountOptions),
    Tree(Tree),
}

/// What is at a path that is no device.
#[derive(Clone, Copy)]
enum Tree {
    Overlay,
    View,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Taken::Mount(device, _) => write!(f, "device {device}"),
            Taken::Tree(Tree::Overlay) => f.write_str("an overlay"),
            Taken::Tree(Tree::View) => f.write_str("a view"),
        }
    }
}

/// A path that is taken, and with it the right to mount a device there. Dropping it frees both.
pub(crate) struct Claim {
    claims: Claims,
    target: Arc<Path>,
    /// The number in a path that was made up.
    number: Option<u32>,
}

impl Claims {
    /// Paths are made up below `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        let live = Mutex::default();
        Claims(Arc::new(Shared { root, live }))
    }

    /// Takes `target` (or a path that it makes up) for a mount of a device.
    pub(crate) fn mount(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
        target: Option<&Path>,
    ) -> Result<Claim, BackendError> {
        let mut live = self.live();
        live.ensure_compatible(device, options)?;
        let (target, key, number) = match target {
            Some(target) => (target.to_owned(), live.free(target, None)?, None),
            None => self.make_up(&mut live)?,
        };
        let mounts = live.mounts.entry(device.clone());
        mounts
            .or_insert_with(|| Vec::with_capacity(1))
            .push(options.clone());
        for extra in options.devices() {
            let users = live.devices.entry(extra.locator.clone()).or_default();
            users.push(options.is_read_only());
        }
        let taken = Taken::Mount(device.clone(), options.clone());
        Ok(self.claim(&mut live, target, key, taken, number))
    }

    /// Takes `target` for an overlay. It may lie below `scratch`, where its changes go.
    pub(crate) fn overlay(
        &self,
        target: &Path,
        scratch: Option<&Path>,
    ) -> Result<Claim, BackendError> {
        let scratch = scratch.map(comparable).transpose()?;
        let mut live = self.live();
        let key = live.free(target, scratch.as_deref())?;
        let taken = Taken::Tree(Tree::Overlay);
        Ok(self.claim(&mut live, target.to_owned(), key, taken, None))
    }

    /// Takes `target` for a view.
    pub(crate) fn view(&self, target: &Path) -> Result<Claim, BackendError> {
        let mut live = self.live();
        let key = live.free(target, None)?;
        let taken = Taken::Tree(Tree::View);
        Ok(self.claim(&mut live, target.to_owned(), key, taken, None))
    }

    fn claim(
        &self,
        live: &mut Live,
        target: PathBuf,
        key: Vec<u8>,
        taken: Taken,
        number: Option<u32>,
    ) -> Claim {
        live.paths.insert(key.into(), taken);
        Claim {
            claims: self.clone(),
            target: target.into(),
            number,
        }
    }

    /// The first made-up path that is not taken by name.
    fn make_up(&self, live: &mut Live) -> Result<(PathBuf, Vec<u8>, Option<u32>), BackendError> {
        // Numbers whose path is taken by name are kept aside, so that the next one is another.
        let mut passed = Vec::new();
        let found = loop {
            let Some(number) = live.numbers.take() else {
                let full = "all paths that can be made up are taken; release some mounts";
                break Err(BackendError::full(full));
            };
            let target = self.numbered(number);
            match live.free(&target, None) {
                Ok(key) => break Ok((target, key, Some(number))),
                Err(_) => passed.push(number),
            }
        };
        passed
            .into_iter()
            .for_each(|number| live.numbers.give_back(number));
        found
    }

    fn numbered(&self, index: u32) -> PathBuf {
        match self.0.root.to_str() {
            Some(root) if is_windows(root) => PathBuf::from(format!("{root}\\m{index}")),
            _ => self.0.root.join(format!("m{index}")),
        }
    }

    /// Held for a few look-ups, never across a call of other code.
    fn live(&self) -> MutexGuard<'_, Live> {
        self.0.live.lock()
    }
}

impl Live {
    /// Refuses options that a device, or a further one, cannot have beside what it is mounted with.
    fn ensure_compatible(
        &self,
        device: &DeviceLocator,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let mounts = |device| self.mounts.get(device).map_or(&[][..], Vec::as_slice);
        let others = mounts(device);
        if !others.iter().all(|other| other.is_compatible_with(options)) {
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
            let mounted: Vec<bool> = mounts(extra)
                .iter()
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

    /// The comparable form of a path at which something can be mounted now.
    fn free(&self, target: &Path, inside: Option<&[u8]>) -> Result<Vec<u8>, BackendError> {
        let key = comparable(target)?;
        let from_here = (Bound::Included(&*key), Bound::Unbounded);
        let next = self.paths.range::<[u8], _>(from_here).next();
        if let Some((_, what)) = next.filter(|(taken, _)| taken.starts_with(&key)) {
            let taken = format!("{what} is mounted there or below");
            return Err(BackendError::conflict(taken));
        }
        let slashes = key
            .iter()
            .enumerate()
            .rev()
            .skip(1)
            .filter(|(_, byte)| **byte == b'/');
        let mut above = slashes.map(|(index, _)| &key[..=index]);
        match above.find_map(|path| Some((path, self.paths.get(path)?))) {
            Some((path, what)) if Some(path) != inside => {
                let path = String::from_utf8_lossy(path);
                let taken = format!("{what} is mounted above, at {path}");
                Err(BackendError::conflict(taken))
            }
            _ => Ok(key),
        }
    }
}

impl Claim {
    pub(crate) fn target(&self) -> &Arc<Path> {
        &self.target
    }

    /// Keeps the path taken for good: what is there may stay.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let key = comparable(&self.target).expect("it was comparable when it was taken");
        let mut live = self.claims.live();
        let taken = live.paths.remove(&*key);
        if let Some(number) = self.number {
            live.numbers.give_back(number);
        }
        if let Some(Taken::Mount(device, options)) = &taken
            && let Some(mounts) = live.mounts.get_mut(device)
        {
            if let Some(ours) = mounts.iter().position(|other| other == options) {
                mounts.swap_remove(ours);
            }
            if mounts.is_empty() {
                live.mounts.remove(device);
            }
            for extra in options.devices() {
                live.give_up(&extra.locator, options.is_read_only());
            }
        }
    }
}

/// The form in which two spellings of one path are equal, and whatever is below it begins with it
/// (`/a/b/`); or why it is no path in a guest.
fn comparable(target: &Path) -> Result<Vec<u8>, BackendError> {
    let invalid = |why: &str| {
        let shown: String = target.to_string_lossy().chars().take(128).collect();
        Err(BackendError::invalid(format!(
            "{shown:?} cannot be a target: {why}"
        )))
    };
    let bytes = target.as_os_str().as_encoded_bytes();
    if bytes.len() > MAX_LEN {
        return invalid("it is longer than 4,095 bytes");
    }
    if bytes.contains(&0) {
        return invalid("it has a zero byte");
    }
    let unified = match target.to_str() {
        // Case and the kind of slash make no difference to Windows.
        Some(text) if is_windows(text) => text.replace('\\', "/").to_lowercase().into_bytes(),
        _ if bytes.first() == Some(&b'/') => bytes.to_owned(),
        _ => return invalid("it is not absolute"),
    };
    let mut plain = Vec::with_capacity(unified.len() + 2);
    for name in unified.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return invalid("it has a '..' in it"),
            name => {
                plain.push(b'/');
                plain.extend_from_slice(name);
            }
        }
    }
    if plain.is_empty() {
        return invalid("it is the root directory");
    }
    plain.push(b'/');
    Ok(plain)
}

/// `c:\...`: a path in a Windows guest, on whatever host we run.
fn is_windows(path: &str) -> bool {
    let bytes = path.as_bytes();
    bytes.len() > 3 && bytes[0].is_ascii_alphabetic() && &bytes[1..3] == b":\\"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn claims() -> (Claims, DeviceLocator, MountOptions) {
        let device = DeviceLocator::new("scsi", "0/0").unwrap();
        (
            Claims::new("c:\\mounts\\scsi".into()),
            device,
            MountOptions::read_only(),
        )
    }

    #[test]
    fn windows_guests_know_no_case_and_two_slashes() {
        let (claims, device, options) = claims();
        let live = claims
            .mount(&device, &options, Some(Path::new("C:\\Mounts\\x")))
            .unwrap();
        assert_eq!(
            &**live.target(),
            Path::new("C:\\Mounts\\x"),
            "the guest gets the path as it was requested"
        );
        for target in ["c:\\mounts\\X", "c:\\mounts/x\\below", "c:\\MOUNTS"] {
            let taken = claims.mount(&device, &options, Some(Path::new(target)));
            assert_eq!(
                taken.err().map(|error| error.kind()),
                Some(ErrorKind::Conflict),
                "{target}"
            );
        }
        let made_up = claims.mount(&device, &options, None).unwrap();
        assert_eq!(&**made_up.target(), Path::new("c:\\mounts\\scsi\\m0"));
    }

    #[test]
    fn a_dropped_claim_frees_its_path_its_number_and_its_device() {
        let (claims, device, options) = claims();
        for _ in 0..3 {
            let claim = claims
                .mount(&device, &MountOptions::default(), None)
                .unwrap();
            assert!(
                claims.mount(&device, &options, None).is_err(),
                "a writer has it alone"
            );
            assert_eq!(&**claim.target(), Path::new("c:\\mounts\\scsi\\m0"));
        }
        assert!(claims.live().paths.is_empty() && claims.live().mounts.is_empty());
    }
}
