//! Which loop device is bound next.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::{numbers, readable_numbers};
use crate::ioctl;

/// What this process knows of free devices.
#[derive(Debug, Default)]
struct Known {
    /// About to be bound by a call of this process.
    reserved: BTreeSet<u32>,
    /// Unbound when the kernel's table was last read, and not offered since. One that another process has bound meanwhile
    /// says so when it is configured.
    unbound: BTreeSet<u32>,
    /// How many calls read the table now, and what was offered meanwhile: they may take it for unbound.
    readers: usize,
    offered: BTreeSet<u32>,
}

// Held only to look up and to change it.
static KNOWN: Mutex<Known> = Mutex::new(Known {
    reserved: BTreeSet::new(),
    unbound: BTreeSet::new(),
    readers: 0,
    offered: BTreeSet::new(),
});

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held by the one call that asks the kernel for free devices. Whoever waits for this waits for what that call finds.
static ASKING: Mutex<()> = Mutex::new(());

impl Known {
    /// Whether a device was not reserved yet; it is from now on.
    fn reserve(&mut self, number: u32) -> bool {
        if self.readers > 0 {
            self.offered.insert(number);
        }
        self.reserved.insert(number)
    }

    /// Reserves the first of those that were unbound.
    fn next(&mut self, tried: &BTreeSet<u32>) -> Option<u32> {
        while let Some(number) = self.unbound.pop_first() {
            if !tried.contains(&number) && self.reserve(number) {
                return Some(number);
            }
        }
        None
    }

    fn has_read(&mut self, unbound: impl Iterator<Item = u32>) {
        let offered = &self.offered;
        self.unbound
            .extend(unbound.filter(|number| !offered.contains(number)));
        self.readers -= 1;
        if self.readers == 0 {
            self.offered.clear();
        }
    }
}

/// Reads the kernel's table for whoever asks next.
fn read_table() -> io::Result<()> {
    known().readers += 1;
    let read = unbound_numbers();
    let unbound = read.as_deref().unwrap_or_default();
    known().has_read(unbound.iter().copied());
    read.map(drop)
}

/// The devices that are not bound, and those that are and have no whole sector, which say so when they are configured.
fn unbound_numbers() -> io::Result<Vec<u32>> {
    let mut numbers = numbers()?;
    let bound: BTreeSet<u32> = readable_numbers()?.into_iter().collect();
    numbers.retain(|number| !bound.contains(number));
    Ok(numbers)
}

/// What asks the kernel for devices, opened when it is needed.
#[derive(Debug, Default)]
pub(crate) struct Control(OnceCell<File>);

impl Control {
    fn file(&self) -> io::Result<&File> {
        if let Some(open) = self.0.get() {
            return Ok(open);
        }
        let open = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        Ok(self.0.get_or_init(|| open))
    }
}

/// The node of the driver.
const CONTROL: &str = "/dev/loop-control";

/// Notes that this process has unbound a device, so that it is bound again before the table is read.
pub(crate) fn note_unbound(number: u32) {
    known().unbound.insert(number);
}

/// An unbound device that no other call of this process tries to bind, until it is dropped.
///
/// `LOOP_CTL_GET_FREE` would answer the same number to all calls at once; those that lose the race for it would make
/// new devices although others are free, and the kernel keeps every device that was ever made. So its answer is for the first
/// call alone, and the table, which may have thousands of devices, is read once for all others.
pub(crate) struct FreeDevice(u32);

impl FreeDevice {
    /// Reserves a device outside of `tried`; makes a new one only if none is free.
    pub(crate) fn reserve(control: &Control, tried: &BTreeSet<u32>) -> io::Result<Self> {
        loop {
            if let Some(number) = known().next(tried) {
                return Ok(FreeDevice(number));
            }
            let _asking = ASKING.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(number) = known().next(tried) {
                return Ok(FreeDevice(number));
            }
            let free = ioctl::get_free(control.file()?)?;
            if !tried.contains(&free) && known().reserve(free) {
                return Ok(FreeDevice(free));
            }
            read_table()?;
            if let Some(number) = known().next(tried) {
                return Ok(FreeDevice(number));
            }
            let new = ioctl::add(control.file()?)?;
            // Otherwise another call has found the new device first.
            if known().reserve(new) {
                return Ok(FreeDevice(new));
            }
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.0
    }
}

impl Drop for FreeDevice {
    fn drop(&mut self) {
        known().reserved.remove(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_is_offered_once_and_none_that_was_tried_or_taken() {
        let mut known = Known {
            readers: 1,
            ..Known::default()
        };
        known.has_read([5, 3, 4, 9].into_iter());
        assert!(known.reserve(3), "a new device of another call");
        assert_eq!(known.next(&BTreeSet::from([4])), Some(5));
        assert_eq!(known.next(&BTreeSet::new()), Some(9));
        assert_eq!(known.next(&BTreeSet::new()), None);
    }

    #[test]
    fn what_was_offered_while_the_table_was_read_is_not_offered_again() {
        let mut known = Known {
            readers: 1,
            ..Known::default()
        };
        known.has_read([1, 2].into_iter());
        known.readers = 2;
        assert_eq!(known.next(&BTreeSet::new()), Some(1));
        known.reserved.remove(&1);
        // Both may have seen 1 before it was bound.
        known.has_read([1, 2].into_iter());
        known.has_read([1, 2, 7].into_iter());
        assert_eq!(known.next(&BTreeSet::new()), Some(2));
        assert_eq!(known.next(&BTreeSet::new()), Some(7));
        assert_eq!(known.next(&BTreeSet::new()), None);
        assert!(known.offered.is_empty() || known.readers > 0);
    }
}
