//! Binding a source to a free loop device, all or nothing.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use blockmount::{BackendError, Disk};
use blockmount_linux::is_absent;
use blockmount_source::Source;
use blockmount_source::image_lock::{self, Access};
use rustix::io::Errno;

use crate::device::{Binding, Device, Status, failed, is, unbind, usual_node};
use crate::free::{Control, FreeDevice};
use crate::ioctl;
use crate::look::{Claim, Look, Pending, look};

/// How many devices a call tries that other processes bind or claim before it can.
const ATTEMPTS: usize = 256;

/// How a device is to be bound.
#[derive(Debug, Clone)]
pub(crate) struct LoopConfig {
    pub(crate) read_only: bool,
    pub(crate) direct_io: bool,
    /// `lo_file_name`, at most [`MARK_MAX`](crate::device::MARK_MAX) bytes.
    pub(crate) mark: Vec<u8>,
}

/// A device that this process has bound. Closing it unbinds it (`LO_FLAGS_AUTOCLEAR`).
#[derive(Debug)]
pub(crate) struct Bound {
    // The first that is dropped.
    pub(crate) pending: Pending,
    pub(crate) device: Device,
    pub(crate) status: Status,
    since: Instant,
}

impl Bound {
    pub(crate) fn new(device: Device, status: Status) -> Self {
        let pending = Pending::new(device.number, &status);
        Bound {
            device,
            status,
            pending,
            since: Instant::now(),
        }
    }
}

impl Bound {
    /// Refuses a device that goes through the page cache of the file beneath.
    pub(crate) fn ensure_direct_io(&self, disk: &Disk) -> Result<(), BackendError> {
        let number = self.device.number;
        let status = self
            .device
            .status()
            .map_err(|error| failed("ask about", number, error))?;
        match status.and_then(|status| status.direct_io) {
            Some(true) => Ok(()),
            _ => Err(BackendError::unsuitable(format!(
                "the filesystem of {} cannot do direct I/O",
                disk.source().display()
            ))),
        }
    }
}

/// Binds the source to a free device.
pub(crate) fn bind(source: &Source, wanted: &LoopConfig) -> Result<Bound, BackendError> {
    let control = Control::default();
    let mut tried = BTreeSet::new();
    while tried.len() < ATTEMPTS {
        let free = FreeDevice::reserve(&control, &tried).map_err(no_free_device)?;
        let number = free.number();
        match configure(number, source, wanted) {
            Ok(bound) => return Ok(bound),
            // Another process has bound, claimed or removed it meanwhile.
            Err(error) if is(&error, Errno::BUSY) || is_absent(&error) => tried.insert(number),
            Err(error) => {
                let path = usual_node(number);
                return Err(loop_error(&format!("bind {}", path.display()), error));
            }
        };
    }
    Err(BackendError::busy(format!(
        "{ATTEMPTS} free loop devices were bound or claimed by other processes first; try again"
    )))
}

fn no_free_device(error: io::Error) -> BackendError {
    match is_absent(&error) {
        true => BackendError::unsuitable(
            "there are no loop devices here: /dev/loop-control is missing; load the module (modprobe loop), or in a \
             container make the node (mknod /dev/loop-control c 10 237)",
        )
        .with_source(error),
        false => loop_error("get a free loop device", error),
    }
}

fn configure(number: u32, source: &Source, wanted: &LoopConfig) -> io::Result<Bound> {
    let device = if wanted.read_only {
        Device::open_known(number)?
    } else {
        Device::open_for_writing(number)?
    };
    let mut config = ioctl::loop_config {
        fd: source.file.as_raw_fd().cast_unsigned(),
        // Partition tables count in sectors, so an image must not have others here than elsewhere.
        // A block device keeps its own.
        block_size: if source.device_number == 0 { 512 } else { 0 },
        info: ioctl::empty_info(),
        __reserved: [0; 8],
    };
    let when = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
    config.info.lo_flags = ioctl::AUTOCLEAR
        | ioctl::PARTSCAN
        | when(wanted.read_only, ioctl::READ_ONLY)
        | when(wanted.direct_io, ioctl::DIRECT_IO);
    config.info.lo_file_name[..wanted.mark.len()].copy_from_slice(&wanted.mark);
    ioctl::configure(device.file(), &mut config)?;
    if wanted.read_only {
        // The kernel answers what it was told. Whether the device is bound so still is asked before it is used.
        let binding = Binding {
            inode: source.inode,
            mark: wanted.mark.clone(),
        };
        let status = Status {
            binding,
            device_number: source.device_number,
            read_only: true,
            direct_io: None,
            unbinds_itself: true,
        };
        return Ok(Bound::new(device, status));
    }
    // The handle for reading is opened while the other still holds the device.
    let device = Device::open(number)?;
    let gone = || io::Error::other("it was unbound again while it was being bound");
    let status = device.status()?.ok_or_else(gone)?;
    Ok(Bound::new(device, status))
}

/// Classifies an error about loop devices.
fn loop_error(tried: &str, error: io::Error) -> BackendError {
    let classified = match Errno::from_io_error(&error) {
        Some(Errno::ACCESS | Errno::PERM) => BackendError::other(format!(
            "cannot {tried}: loop devices need root (CAP_SYS_ADMIN); run as root, for example with sudo"
        )),
        Some(Errno::NOTTY | Errno::INVAL) => BackendError::unsuitable(format!(
            "cannot {tried}: this kernel does not bind loop devices in one step; it needs Linux 5.8"
        )),
        _ => BackendError::other(format!("cannot {tried}")),
    };
    classified.with_source(error)
}

/// Locks an image file as QEMU does, so that no VM uses it beside a loop device unless both only read. `ours` need not be
/// opened.
///
/// The kernel keeps the open file as long as the device is bound, and the locks with it, also when this process ends. Device
/// numbers are claimed in place of locks.
pub(crate) fn lock_image(
    disk: &Disk,
    source: &Source,
    ours: impl FnOnce() -> Vec<Claim>,
) -> Result<(), BackendError> {
    let access = match disk.is_read_only() {
        true => Access::Read,
        false => Access::Write,
    };
    let lock = |timeout| image_lock::lock(&source.file, access, timeout);
    if source.is_device() || lock(Duration::ZERO) {
        return Ok(());
    }
    // Loop devices that lock nothing would be refused as well, and are named alike.
    let look = look(Instant::now(), ours).map_err(|error| {
        BackendError::other("cannot compare with other loop devices").with_source(error)
    })?;
    refuse_bound(&look, None, disk.is_read_only(), source)?;
    if lock(image_lock::MOMENT) {
        return Ok(());
    }
    let holders = image_lock::holders(&source.file, disk.source());
    Err(image_lock::in_use(disk.source(), &holders))
}

/// Refuses a device whose source another loop device has as well, unless both only read.
///
/// Two writers, or a writer beside a reader, use different page caches and destroy a filesystem. This runs after
/// binding, so that of two callers that bind at once at least one finds the other. `ours` need not be opened.
pub(crate) fn refuse_conflict(
    bound: &Bound,
    source: &Source,
    ours: impl FnOnce() -> Vec<Claim>,
) -> Result<(), BackendError> {
    let number = bound.device.number;
    let look = look(bound.since, ours)
        .map_err(|error| failed("compare with other loop devices", number, error))?;
    refuse_bound(&look, Some(number), bound.status.read_only, source)
}

/// Refuses a source that a device other than `own` has, unless both only read.
fn refuse_bound(
    look: &Look,
    own: Option<u32>,
    read_only: bool,
    source: &Source,
) -> Result<(), BackendError> {
    for (other, status) in &look.bound {
        if own != Some(*other) && conflicts(status, read_only, source) {
            let access = if status.read_only {
                "read-only"
            } else {
                "read-write"
            };
            return Err(BackendError::conflict(format!(
                "{} is already bound {access} to the same disk; detach it first",
                usual_node(*other).display()
            )));
        }
    }
    Ok(())
}

fn conflicts(other: &Status, read_only: bool, source: &Source) -> bool {
    let same = match source.device_number {
        0 => other.binding.inode == source.inode,
        device => other.device_number == device,
    };
    same && !(other.read_only && read_only)
}

/// Unbinds a device after all. One that others keep open longer is unbound when they close it.
pub(crate) fn undo(bound: Bound, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    let Bound {
        device,
        status,
        pending,
        ..
    } = bound;
    drop(pending);
    if let Err((_, error)) = unbind(device, &status.binding, deadline) {
        tracing::warn!(%error, "a loop device stays bound until its other users close it");
    }
}
