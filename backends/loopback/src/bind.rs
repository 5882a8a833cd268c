//! Binding a source to a free loop device, all or nothing.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use blockmount::BackendError;
use blockmount_linux::source::Source;
use rustix::io::Errno;

use crate::device::{Binding, Device, Status, bound_numbers, failed, is, is_absent, node};
use crate::ioctl;

/// How often a free device may be taken by somebody else before we have it. Each lost race means that
/// another bound one, so there are about as many as devices bound at that moment on this machine.
const RACES: u32 = 256;

/// After this many lost races a device of our own is made: an unbound one that somebody keeps
/// claimed would be offered again and again.
const RACES_FOR_FREE: u32 = 64;

/// What a device is to be like.
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
    pub(crate) device: Device,
    pub(crate) status: Status,
}

/// Binds the source to a device that is free.
pub(crate) fn bind(source: &Source, wanted: &LoopConfig) -> Result<Bound, BackendError> {
    let control = open_control()?;
    for race in 0..RACES {
        let next = if race < RACES_FOR_FREE {
            ioctl::get_free(&control)
        } else {
            ioctl::add(&control)
        };
        let number = next.map_err(|error| refused("get a free loop device", error))?;
        match configure(number, source, wanted) {
            Ok(bound) => return Ok(bound),
            Err(error) if is(&error, Errno::BUSY) || is_absent(&error) => {
                std::thread::sleep(Duration::from_millis(u64::from(race > 8)));
            }
            Err(error) => return Err(refused(&format!("bind {}", node(number).display()), error)),
        }
    }
    Err(BackendError::busy(format!(
        "lost {RACES} races for a free loop device; try again"
    )))
}

fn open_control() -> Result<std::fs::File, BackendError> {
    let path = Path::new("/dev/loop-control");
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| match is_absent(&error) {
        true => BackendError::unsuitable(
            "there are no loop devices here: /dev/loop-control is missing; load the module loop",
        )
        .with_source(error),
        false => refused("open /dev/loop-control", error),
    })
}

fn configure(number: u32, source: &Source, wanted: &LoopConfig) -> io::Result<Bound> {
    let device = if wanted.read_only {
        Device::open(number)?
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
    // The handle for reading is opened while the other still holds the device.
    let device = if wanted.read_only {
        device
    } else {
        Device::open(number)?
    };
    let gone = || io::Error::other("it was unbound again while it was being bound");
    let status = device.status()?.ok_or_else(gone)?;
    Ok(Bound { device, status })
}

/// Sorts an error about loop devices by what the caller can do.
fn refused(tried: &str, error: io::Error) -> BackendError {
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

/// A device of this process, as others must respect it.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) number: u32,
    pub(crate) status: Status,
}

/// Refuses a device whose source another loop device has as well, unless both only read.
///
/// Two writers, or a writer beside a reader, go through different page caches and destroy a
/// filesystem. It is called after binding, so that of two who bind at once at least one sees the other.
/// `ours` are devices of this process, which need not be opened to know them.
pub(crate) fn refuse_conflict(
    bound: &Bound,
    source: &Source,
    ours: &[Claim],
) -> Result<(), BackendError> {
    let number = bound.device.number;
    let numbers = bound_numbers()
        .map_err(|error| failed("compare with other loop devices", number, error))?;
    for other in numbers.into_iter().filter(|other| *other != number) {
        let known = ours.iter().find(|claim| claim.number == other);
        let status = match known {
            Some(claim) => Some(claim.status.clone()),
            None => status_of(other).map_err(|error| failed("ask about", other, error))?,
        };
        if let Some(status) = status.filter(|status| conflicts(status, bound, source)) {
            let access = if status.read_only {
                "read-only"
            } else {
                "read-write"
            };
            return Err(BackendError::conflict(format!(
                "{} is already bound {access} to the same disk; detach it first",
                node(other).display()
            )));
        }
    }
    Ok(())
}

fn conflicts(other: &Status, bound: &Bound, source: &Source) -> bool {
    let same = match source.device_number {
        0 => other.binding.inode == source.inode,
        device => other.device_number == device,
    };
    same && !(other.read_only && bound.status.read_only)
}

fn status_of(number: u32) -> io::Result<Option<Status>> {
    match Device::open(number) {
        Ok(device) => device.status(),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The binding that a device should have.
impl Bound {
    pub(crate) fn binding(&self) -> &Binding {
        &self.status.binding
    }
}

/// Unbinds what was bound for nothing. What others keep open for a moment goes when they close it.
pub(crate) fn undo(bound: Bound, patience: Duration) {
    let binding = bound.binding().clone();
    if let Err((_, error)) =
        crate::device::unbind(bound.device, &binding, Instant::now() + patience)
    {
        tracing::warn!(%error, "a loop device that was bound for nothing goes when it is closed");
    }
}
