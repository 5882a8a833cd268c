//! One loop device, by its number: what it is bound to, and unbinding it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::BackendError;
use blockmount_linux::device::{DeviceNumber, in_use};
use blockmount_linux::source::Inode;
use rustix::io::Errno;

use crate::ioctl;

/// The most bytes of a mark: the kernel keeps 64 with the zero at the end (`LO_NAME_SIZE`).
pub(crate) const MARK_MAX: usize = 63;

/// What a loop device was bound to, and by whom: enough to tell a device from a later one with the
/// same number.
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
    pub(crate) direct_io: bool,
}

/// An open loop device.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) number: u32,
    file: File,
}

impl Device {
    /// Opens a device by its number, and proves that the node is that device.
    ///
    /// Opened for reading only: a kernel that guards mounted devices would refuse to mount a device
    /// which somebody has open for writing.
    pub(crate) fn open(number: u32) -> io::Result<Self> {
        Self::open_with(number, false)
    }

    /// The same, for writing, which binding a device read-write needs.
    pub(crate) fn open_for_writing(number: u32) -> io::Result<Self> {
        Self::open_with(number, true)
    }

    fn open_with(number: u32, write: bool) -> io::Result<Self> {
        let expected = device_number(number)?;
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .open(node(number))?;
        let metadata = file.metadata()?;
        let found = DeviceNumber::from_rdev(metadata.rdev());
        if !metadata.file_type().is_block_device() || found != expected {
            let text = format!("{} is not loop device {number}", node(number).display());
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(Device { number, file })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What it is bound to, if it is.
    pub(crate) fn status(&self) -> io::Result<Option<Status>> {
        let info = match ioctl::get_status(&self.file) {
            Err(error) if is(&error, Errno::NXIO) => return Ok(None),
            answer => answer?,
        };
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
            direct_io: info.lo_flags & ioctl::DIRECT_IO != 0,
        }))
    }

    /// Whether it is bound as it was when we knew it.
    fn is_bound_as(&self, binding: &Binding) -> io::Result<bool> {
        Ok(self
            .status()?
            .is_some_and(|status| status.binding == *binding))
    }

    /// Unbinds the device if nobody else has it open, and says whether it will be gone once this
    /// handle is closed.
    ///
    /// The kernel decides it in one step: as the only opener we get an unbinding that nobody can
    /// open any more; with others, the device stays bound until the last of them closes it.
    fn clear(&self) -> io::Result<bool> {
        match ioctl::clear(&self.file) {
            Err(error) if is(&error, Errno::NXIO) => return Ok(true),
            answer => answer?,
        }
        Ok(self.status()?.is_none())
    }
}

/// Unbinds a device, unless it is no longer bound as we knew it, and proves that it is gone.
///
/// Waits until `deadline` for others to close it (there is no event for that), as whoever looks at new
/// devices opens each for a moment.
///
/// # Errors
///
/// `Busy` with the users that can be named; the handle comes back, if it is still ours to hold.
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
            // Unbound by force, or bound anew by somebody else: in neither case ours.
            Ok(false) => return Ok(()),
            Err(error) => return Err((Some(device), failed("ask about", number, error))),
        }
        match device.clear() {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => return Err((Some(device), failed("unbind", number, error))),
        }
        if !backoff.wait() {
            return Err((Some(device), in_use(&node(number))));
        }
    }
    drop(device);
    prove_unbound(number, binding, &mut backoff).map_err(|error| (None, error))
}

/// Proves that a device is no longer bound as we knew it.
///
/// Closing the last handle unbinds at once, except in kernels that leave it to a worker (5.14 and
/// thereabouts), which are given until the deadline.
fn prove_unbound(
    number: u32,
    binding: &Binding,
    backoff: &mut Backoff,
) -> Result<(), BackendError> {
    loop {
        match find(number, binding) {
            Ok(None) => return Ok(()),
            Ok(Some(_)) if backoff.wait() => {}
            Ok(Some(_)) => return Err(in_use(&node(number))),
            Err(error) => return Err(failed("ask about", number, error)),
        }
    }
}

/// The device, opened, if it is bound as we knew it.
pub(crate) fn find(number: u32, binding: &Binding) -> io::Result<Option<Device>> {
    if !backing_file(number).exists() {
        return Ok(None);
    }
    match Device::open(number) {
        Ok(device) => Ok(device.is_bound_as(binding)?.then_some(device)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn failed(verb: &str, number: u32, error: io::Error) -> BackendError {
    BackendError::other(format!("cannot {verb} {}", node(number).display())).with_source(error)
}

/// Short waits that grow from 1 to 50 ms, until a deadline.
struct Backoff {
    next: Duration,
    deadline: Instant,
}

impl Backoff {
    fn until(deadline: Instant) -> Self {
        Backoff {
            next: Duration::from_millis(1),
            deadline,
        }
    }

    /// Waits; false if the deadline has passed.
    fn wait(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(self.next.min(left));
        self.next = (self.next * 2).min(Duration::from_millis(50));
        true
    }
}

/// The device node.
pub(crate) fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// The device in sysfs.
fn sysfs(number: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}"))
}

/// The attribute that is there exactly while the device is bound.
pub(crate) fn backing_file(number: u32) -> PathBuf {
    sysfs(number).join("loop/backing_file")
}

/// Its number, from sysfs.
fn device_number(number: u32) -> io::Result<DeviceNumber> {
    let text = std::fs::read_to_string(sysfs(number).join("dev"))?;
    text.parse().map_err(io::Error::other)
}

/// The numbers of all loop devices that are bound now, in order.
pub(crate) fn bound_numbers() -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in Path::new("/sys/block").read_dir()? {
        let name = entry?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("loop")?.parse().ok());
        numbers.extend(number.filter(|number| backing_file(*number).exists()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

pub(crate) fn is(error: &io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}

/// No such device: never made, removed, or on its way out.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    [Errno::NOENT, Errno::NXIO, Errno::NODEV]
        .into_iter()
        .any(|errno| is(error, errno))
        || error.kind() == io::ErrorKind::NotFound
}
