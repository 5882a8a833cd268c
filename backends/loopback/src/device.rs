//! One loop device, by its number: what it is bound to, and unbinding it.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use blockmount::{BackendError, DeviceLocator};
use blockmount_linux::device::{DeviceNumber, in_use};
use blockmount_linux::sysfs::numbered;
use blockmount_linux::{Backoff, is_absent, node};
use blockmount_source::Inode;
use rustix::io::Errno;

use crate::ioctl;

const LOOP_MAJOR: u32 = 7;

/// The most bytes of a mark: the kernel keeps 64 with the zero at the end (`LO_NAME_SIZE`).
pub(crate) const MARK_MAX: usize = 63;

/// What a loop device was bound to, and its mark: enough to tell it from a later device with the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) inode: Inode,
    /// `lo_file_name` up to its zero.
    pub(crate) mark: Vec<u8>,
}

/// What the kernel says of a bound device.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) binding: Binding,
    /// The number of the block device that it is bound to; 0 for a file.
    pub(crate) device_number: u64,
    pub(crate) read_only: bool,
    /// Nothing if the kernel was not asked yet.
    pub(crate) direct_io: Option<bool>,
    /// Whether the kernel unbinds it with its last user.
    pub(crate) unbinds_itself: bool,
}

/// An open loop device. A clone is the same handle, which is closed with the last of them.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) number: u32,
    file: Arc<File>,
    /// Whether it was found at its usual node.
    has_usual_node: bool,
}

impl Device {
    /// Opens a device by its number, for reading only: a kernel with `BLK_DEV_WRITE_MOUNTED` off refuses to mount
    /// a device that is open for writing.
    pub(crate) fn open(number: u32) -> io::Result<Self> {
        Self::open_with(number, device_number(number)?, false)
    }

    /// The same for a device that the kernel has just named.
    pub(crate) fn open_known(number: u32) -> io::Result<Self> {
        Self::open_with(number, known_number(number)?, false)
    }

    /// Opens a device for writing, which is needed to bind it read-write.
    pub(crate) fn open_for_writing(number: u32) -> io::Result<Self> {
        Self::open_with(number, device_number(number)?, true)
    }

    fn open_with(number: u32, device: DeviceNumber, write: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        let (file, has_usual_node) = node::open(&name(number), device, &options)?;
        let file = Arc::new(file);
        Ok(Device {
            number,
            file,
            has_usual_node,
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The same handle, for whoever reads the device.
    pub(crate) fn shared_file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// A node that leads to it, or did when it was opened.
    pub(crate) fn node(&self) -> io::Result<PathBuf> {
        match self.has_usual_node {
            true => Ok(usual_node(self.number)),
            false => node(self.number),
        }
    }

    /// What it is bound to, if it is.
    pub(crate) fn status(&self) -> io::Result<Option<Status>> {
        let info = match ioctl::get_status(self.file()) {
            Err(error) if is(&error, Errno::NXIO) => return Ok(None),
            answer => answer?,
        };
        if info.lo_number != self.number {
            // The module was loaded again with another number of partitions.
            MINORS.store(UNKNOWN, Relaxed);
            let other = format!("it is loop{} by now, try again", info.lo_number);
            return Err(io::Error::other(other));
        }
        let mark = info
            .lo_file_name
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        Ok(Some(Status {
            binding: Binding {
                inode: Inode {
                    device: info.lo_device,
                    inode: info.lo_inode,
                },
                mark: mark.to_owned(),
            },
            device_number: info.lo_rdevice,
            read_only: info.lo_flags & ioctl::READ_ONLY != 0,
            direct_io: Some(info.lo_flags & ioctl::DIRECT_IO != 0),
            unbinds_itself: info.lo_flags & ioctl::AUTOCLEAR != 0,
        }))
    }

    /// Whether it still has this binding.
    pub(crate) fn is_bound_as(&self, binding: &Binding) -> io::Result<bool> {
        Ok(self
            .status()?
            .is_some_and(|status| status.binding == *binding))
    }

    /// Unbinds the device if no one else has it open, and says whether it will be unbound once this handle is closed.
    ///
    /// The kernel decides this in one step: for the only opener it starts the unbinding, and refuses to open the
    /// device from then on; with other openers the device stays bound until the last of them closes it.
    fn clear(&self) -> io::Result<bool> {
        match ioctl::clear(self.file()) {
            Err(error) if is(&error, Errno::NXIO) => return Ok(true),
            answer => answer?,
        }
        Ok(self.status()?.is_none())
    }
}

/// Unbinds a device, unless it no longer has this binding, and proves that it is unbound.
///
/// Waits until `deadline` for others to close it: udev, for example, opens each new device for a moment.
///
/// # Errors
///
/// `Busy` with the users that can be named. The handle comes back, if it is still open.
pub(crate) fn unbind(
    device: Device,
    binding: &Binding,
    deadline: Instant,
) -> Result<(), (Option<Device>, BackendError)> {
    let number = device.number;
    let mut backoff = Backoff::until(deadline);
    loop {
        match device.is_bound_as(binding) {
            Ok(true) => {}
            // Unbound by force, or bound again by another process: not ours in either case.
            Ok(false) => return Ok(()),
            Err(error) => return Err((Some(device), failed("ask about", number, error))),
        }
        if !device.has_usual_node {
            // Before it is unbound: afterwards the number may be another process's, with a node of its own.
            node::remove(&name(number));
        }
        match device.clear() {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => return Err((Some(device), failed("unbind", number, error))),
        }
        match backoff.pause() {
            Some(pause) => std::thread::sleep(pause),
            None => return Err((Some(device), busy(number))),
        }
    }
    drop(device);
    prove_unbound(number, binding, &mut backoff).map_err(|error| (None, error))
}

/// Proves that a device no longer has this binding.
///
/// Closing the last handle unbinds at once, except in kernels around 5.14, which leave it to a worker.
fn prove_unbound(
    number: u32,
    binding: &Binding,
    backoff: &mut Backoff,
) -> Result<(), BackendError> {
    loop {
        match find(number, binding) {
            Ok(None) => return Ok(()),
            Ok(Some(_)) => match backoff.pause() {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(busy(number)),
            },
            Err(error) => return Err(failed("ask about", number, error)),
        }
    }
}

/// Opens the device if it still has this binding.
pub(crate) fn find(number: u32, binding: &Binding) -> io::Result<Option<Device>> {
    if !backing_file(number).exists() {
        return Ok(None);
    }
    match Device::open_known(number) {
        Ok(device) => Ok(device.is_bound_as(binding)?.then_some(device)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn failed(verb: &str, number: u32, error: io::Error) -> BackendError {
    BackendError::other(format!("cannot {verb} {}", usual_node(number).display()))
        .with_source(error)
}

/// The error `Busy`, with the users that can be found.
fn busy(number: u32) -> BackendError {
    in_use(&node(number).unwrap_or_else(|_| usual_node(number)))
}

/// The kernel's name for a device.
fn name(number: u32) -> String {
    format!("loop{number}")
}

/// The node in `/dev`, which may be missing in a container.
pub(crate) fn usual_node(number: u32) -> PathBuf {
    Path::new("/dev").join(name(number))
}

/// A node that is there: the one in `/dev`, or one of our own, which stays until the device is unbound.
pub(crate) fn node(number: u32) -> io::Result<PathBuf> {
    node::ensure(&name(number), device_number(number)?)
}

/// The attribute that is there exactly while the device is bound.
pub(crate) fn backing_file(number: u32) -> PathBuf {
    sysfs(number).join("loop/backing_file")
}

/// The device in sysfs.
fn sysfs(number: u32) -> PathBuf {
    Path::new("/sys/block").join(name(number))
}

/// How many numbers the kernel gives to each device and its partitions, which is the same for all of them. Reading it from
/// sysfs each time would be five system calls for each time that a device is opened.
static MINORS: AtomicU32 = AtomicU32::new(UNKNOWN);

const UNKNOWN: u32 = 0;

/// The number of a device that is there. (Source: Linux, drivers/block/loop.c, `loop_add`: the numbers of one device follow
/// those of the one before)
pub(crate) fn device_number(number: u32) -> io::Result<DeviceNumber> {
    let found = known_number(number)?;
    // Opening the node of a device that is not there would make it.
    sysfs(number).metadata()?;
    Ok(found)
}

/// The same for a device that the kernel has just named.
fn known_number(number: u32) -> io::Result<DeviceNumber> {
    let minors = MINORS.load(Relaxed);
    if let Some(minor) = number.checked_mul(minors).filter(|_| minors != UNKNOWN) {
        return Ok(DeviceNumber {
            major: LOOP_MAJOR,
            minor,
        });
    }
    let text = std::fs::read_to_string(sysfs(number).join("dev"))?;
    let found: DeviceNumber = text.parse().map_err(io::Error::other)?;
    if let Some(minors) = found.minor.checked_div(number)
        && found.major == LOOP_MAJOR
        && minors.checked_mul(number) == Some(found.minor)
    {
        MINORS.store(minors, Relaxed);
    }
    Ok(found)
}

/// The numbers of all loop devices of this machine, in order.
pub(crate) fn numbers() -> io::Result<Vec<u32>> {
    let found = numbered(Path::new("/sys/block"), "loop").map_err(io::Error::other)?;
    let mut found: Vec<_> = found.into_iter().map(|(_, number)| number).collect();
    found.sort_unstable();
    Ok(found)
}

/// The numbers of all loop devices that are bound now, in order.
pub(crate) fn bound_numbers() -> io::Result<Vec<u32>> {
    let mut found = numbers()?;
    found.retain(|number| backing_file(*number).exists());
    Ok(found)
}

/// The numbers of all loop devices that can be read or written: those that are bound, but for one without a whole sector. To
/// ask sysfs of each device of the table, which may have thousands, would take a system call for each. (Source: Linux,
/// block/genhd.c, `show_partition`)
pub(crate) fn readable_numbers() -> io::Result<Vec<u32>> {
    match std::fs::read_to_string("/proc/partitions") {
        Ok(table) => Ok(loops_in(&table)),
        Err(error) if is_absent(&error) => bound_numbers(),
        Err(error) => Err(error),
    }
}

/// The loop devices in the kernel's table of devices with sectors, without their partitions.
fn loops_in(table: &str) -> Vec<u32> {
    let names = table
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().last());
    let numbers = names.filter_map(|name| DeviceLocator::number(name.strip_prefix("loop")?));
    numbers
        .filter_map(|number| number.try_into().ok())
        .collect()
}

pub(crate) fn is(error: &io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_has_devices_and_their_partitions() {
        let table = "major minor  #blocks  name\n\n   7        4       4096 loop4\n 259        1       \
                     1024 loop4p1\n   8        0    1048576 sda\n   7       12          0 loop12\n";
        assert_eq!(loops_in(table), [4, 12]);
        assert!(loops_in("").is_empty());
    }
}
