//! Parts of devices as devices of their own: each window is mapped once, for all who mount it.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};

use crate::device::mapper::{DeviceMapper, NAME_MARK, SECTOR, UUID_MARK};
use crate::device::{self, DeviceNumber};
use crate::discover::sysfs;
use crate::errno::errno_error;

/// How often and after which pauses a device that is busy for a moment is tried again, where nobody can be
/// told that it is.
const RETRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(5);

/// The windows that are mapped.
///
/// The lock is held for look-ups only, never across a system call.
#[derive(Debug, Default)]
pub(crate) struct Windows(Mutex<HashMap<Window, Arc<Mapping>>>);

/// A part of a device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Window {
    backing: DeviceNumber,
    /// Tells the device from a later one with the same number, where the kernel counts its disks.
    sequence: Option<u64>,
    start: u64,
    end: u64,
}

impl Window {
    /// Long enough to tell all windows apart, and short enough for the kernel: at most 85 bytes.
    fn suffix(&self) -> String {
        let DeviceNumber { major, minor } = self.backing;
        format!(
            "window-{major}.{minor}-{}-{}",
            self.start,
            self.end - self.start
        )
    }

    fn name(&self) -> String {
        format!("{NAME_MARK}{}", self.suffix())
    }

    /// The window whose device has this name, if it is one of ours.
    fn named(name: &str) -> Option<Self> {
        let suffix = name.strip_prefix(NAME_MARK)?.strip_prefix("window-")?;
        let mut numbers = suffix.split(['.', '-']).map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        let (major, minor, start, size) = (next()?, next()?, next()?, next()?);
        let backing = DeviceNumber {
            major: major.try_into().ok()?,
            minor: minor.try_into().ok()?,
        };
        let window = Window {
            backing,
            sequence: backing.sequence().ok()?,
            start,
            end: start.checked_add(size)?,
        };
        (window.name() == name).then_some(window)
    }
}

/// The device of one window. The lock is held while it is made or removed: others wait only for their own.
type Mapping = Mutex<State>;

#[derive(Debug, Default)]
struct State {
    users: usize,
    mapped: Option<DeviceNumber>,
    /// For which target it should have been removed, when it was in use.
    owed_by: Option<PathBuf>,
}

/// The use of a window; its device goes with the last one.
#[derive(Debug)]
pub(crate) struct WindowUse {
    windows: Arc<Windows>,
    window: Window,
    target: PathBuf,
    node: PathBuf,
}

impl Windows {
    /// Maps a part of a device, in bytes, for a mount at a target; or takes the device that there is for
    /// it. Blocks.
    pub(crate) fn map(
        self: &Arc<Self>,
        path: &Path,
        range: Range<u64>,
        target: &Path,
    ) -> Result<WindowUse, BackendError> {
        let open = device::open(path)?.ok_or_else(|| {
            BackendError::not_found(format!("device {} has vanished", path.display()))
        })?;
        let window = judge(path, &open, range)?;
        let mapping = self.lock().entry(window.clone()).or_default().clone();
        let mapped = {
            let mut state = lock(&mapping);
            let mapped = state.enter(&window);
            state.users += usize::from(mapped.is_ok());
            mapped
        };
        drop(mapping);
        let number = mapped.inspect_err(|_| self.forget_unused())?;
        // From here on a failure undoes what was done.
        let mut used = WindowUse {
            windows: self.clone(),
            window,
            target: target.to_owned(),
            node: PathBuf::new(),
        };
        used.node = device::node(number).ok_or_else(|| {
            BackendError::not_found(format!("mapped block device {number} has no node"))
        })?;
        Ok(used)
    }

    /// Takes over the window that a mount of an earlier process is on, if it is on one. Blocks.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        mounted: DeviceNumber,
        target: &Path,
    ) -> Result<Option<WindowUse>, BackendError> {
        let name = sysfs::text(&mounted.sysfs().join("dm"), "name")?;
        let Some(window) = name.and_then(|name| Window::named(&name)) else {
            return Ok(None);
        };
        let mapping = self.lock().entry(window.clone()).or_default().clone();
        {
            let mut state = lock(&mapping);
            state.mapped = Some(mounted);
            state.users += 1;
        }
        Ok(Some(WindowUse {
            windows: self.clone(),
            window,
            target: target.to_owned(),
            node: device::node(mounted).unwrap_or_default(),
        }))
    }

    /// Removes the windows of an earlier process that no mount is on. Blocks.
    pub(crate) fn sweep(&self) -> Result<(), BackendError> {
        let mapper = match DeviceMapper::open() {
            Err(error) if error.kind() == ErrorKind::Unsuitable => return Ok(()),
            mapper => mapper?,
        };
        // One that was begun and never got its table is in this list, and not in sysfs.
        for mapped in mapper.list()? {
            let name = &*mapped.name;
            let Some(window) = Window::named(name) else {
                continue;
            };
            if !self.lock().contains_key(&window) {
                tracing::info!(name, "removing a window of an earlier process");
                mapper.remove(name)?;
            }
        }
        Ok(())
    }

    /// Removes what should have gone with the mount at a target and was in use. Blocks.
    pub(crate) fn settle(&self, target: &Path) -> Result<(), BackendError> {
        for (window, mapping) in self.owed(target) {
            lock(&mapping).remove(&window)?;
        }
        self.forget_unused();
        Ok(())
    }

    /// Whether there is something to settle for a target.
    pub(crate) fn owes(&self, target: &Path) -> bool {
        !self.owed(target).is_empty()
    }

    /// The same error with the names of those who use a device that is owed, which are searched for once.
    pub(crate) fn name_users(&self, target: &Path, error: BackendError) -> BackendError {
        let mapped = |(_, mapping): &(Window, Arc<Mapping>)| lock(mapping).mapped;
        let owed = self.owed(target).iter().find_map(mapped);
        match owed.and_then(device::node) {
            Some(node) => {
                let users = device::in_use(&node);
                let message = format!("{}: {}", error.message(), users.message());
                BackendError::busy(message).with_source(error)
            }
            None => error,
        }
    }

    fn owed(&self, target: &Path) -> Vec<(Window, Arc<Mapping>)> {
        let all: Vec<_> = self
            .lock()
            .iter()
            .map(|(window, mapping)| (window.clone(), mapping.clone()))
            .collect();
        let is_owed = |mapping: &Mapping| lock(mapping).owed_by.as_deref() == Some(target);
        all.into_iter()
            .filter(|(_, mapping)| is_owed(mapping))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Window, Arc<Mapping>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who works on a window has a handle of its own, taken under this lock.
    fn forget_unused(&self) {
        self.lock().retain(|_, mapping| {
            let is_idle = Arc::strong_count(mapping) == 1;
            !is_idle || lock(mapping).mapped.is_some()
        });
    }
}

fn lock(mapping: &Mapping) -> MutexGuard<'_, State> {
    // Every change follows the call that it is about: a panic leaves what is true.
    mapping.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The device of the window, for one more user.
    fn enter(&mut self, window: &Window) -> Result<DeviceNumber, BackendError> {
        if self.users > 0
            && let Some(mapped) = self.mapped
        {
            return Ok(mapped);
        }
        // One that could not be removed may be in the hands of others.
        self.remove(window)?;
        let uuid = format!("{UUID_MARK}{}", window.suffix());
        let mapper = DeviceMapper::open()?;
        let made = mapper.create_window(
            &window.name(),
            &uuid,
            window.backing,
            window.start..window.end,
        )?;
        self.mapped = Some(made);
        Ok(made)
    }

    fn remove(&mut self, window: &Window) -> Result<(), BackendError> {
        if self.users == 0 && self.mapped.is_some() {
            DeviceMapper::open()?.remove(&window.name())?;
            self.mapped = None;
        }
        self.owed_by = None;
        Ok(())
    }

    fn leave(&mut self, window: &Window, target: &Path) {
        self.users -= 1;
        if self.users > 0 {
            return;
        }
        for _ in 0..RETRIES {
            match self.remove(window) {
                Ok(()) => return,
                // Such as by a daemon that looks at each device.
                Err(error) if error.kind() == ErrorKind::Busy => std::thread::sleep(PAUSE),
                Err(error) => {
                    tracing::warn!(%error, "cannot remove the device of a window");
                    break;
                }
            }
        }
        self.owed_by = Some(target.to_owned());
    }
}

impl WindowUse {
    /// The node of its device.
    pub(crate) fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for WindowUse {
    fn drop(&mut self) {
        let mapping = self.windows.lock().get(&self.window).cloned();
        if let Some(mapping) = mapping {
            lock(&mapping).leave(&self.window, &self.target);
        }
        self.windows.forget_unused();
    }
}

/// Whether a device has such a part: the range may come from anybody.
fn judge(path: &Path, open: &File, range: Range<u64>) -> Result<Window, BackendError> {
    let node = path.display();
    let trouble = |error| errno_error(format!("cannot ask {node} for its size"), error);
    let size = device::size(open).map_err(trouble)?;
    let block = u64::from(device::logical_block_size(open).map_err(trouble)?).max(SECTOR);
    let Range { start, end } = range;
    let refused = |why: String| {
        let message = format!("bytes {start} to {end} are no part of device {node}: {why}");
        Err(BackendError::invalid(message))
    };
    if start >= end {
        return refused("there are none".to_owned());
    }
    if end > size {
        return refused(format!("it has {size} bytes"));
    }
    if !start.is_multiple_of(block) || !end.is_multiple_of(block) {
        return refused(format!("they are not whole blocks of {block} bytes"));
    }
    let backing = DeviceNumber::of(open)?;
    Ok(Window {
        backing,
        sequence: backing.sequence()?,
        start,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_the_window_and_nothing_else_is_one() {
        let window = Window::named("blockmount-window-259.1-4096-8192").unwrap();
        assert_eq!((window.backing.major, window.backing.minor), (259, 1));
        assert_eq!((window.start, window.end), (4096, 12_288));
        for name in [
            "",
            "blockmount-window-",
            "blockmount-window-1.2-3",
            "blockmount-window-1.2-3-4-5",
            "blockmount-window-1.2-03-4",
            "blockmount-window-1-2-3-4",
            "blockmount-window-1.2-18446744073709551615-1",
            "other-window-1.2-3-4",
        ] {
            assert_eq!(Window::named(name), None, "{name}");
        }
    }

    #[test]
    fn g14_the_longest_name_of_a_window_fits() {
        let backing = DeviceNumber {
            major: u32::MAX,
            minor: u32::MAX,
        };
        let window = Window {
            backing,
            sequence: None,
            start: 0,
            end: u64::MAX,
        };
        assert!(window.name().len() + 20 <= 127, "{}", window.name());
    }
}
