//! All bound loop devices of this machine, for cleaning up.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::BackendError;
use blockmount_linux::is_absent;

use crate::device::{self, Binding, Device, failed};

/// A bound loop device of any process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundLoop {
    number: u32,
    binding: Binding,
    backing_file: PathBuf,
    read_only: bool,
}

impl BoundLoop {
    /// The number of the device: 7 for `/dev/loop7`.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The usual device node, which may be missing in a container's `/dev`.
    pub fn node(&self) -> PathBuf {
        device::usual_node(self.number)
    }

    /// What the kernel keeps with it (`lo_file_name`): the mark of the transport, or the start of a path.
    pub fn mark(&self) -> String {
        String::from_utf8_lossy(&self.binding.mark).into_owned()
    }

    /// The file beneath, where the kernel sees it now. Ends in ` (deleted)` if it has no name any more.
    pub fn backing_file(&self) -> &Path {
        &self.backing_file
    }

    /// Whether it refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Unbinds the device, unless it has been unbound or bound again since it was listed; waits up to `timeout` for others to close it. Blocks.
    ///
    /// # Errors
    ///
    /// `Busy`, naming the users that can be found; the device then stays bound until the last of them
    /// closes it. `Other` if it cannot be opened or asked.
    pub fn unbind(&self, timeout: Duration) -> Result<(), BackendError> {
        let found = device::find(self.number, &self.binding)
            .map_err(|error| failed("look for", self.number, error))?;
        let Some(open) = found else { return Ok(()) };
        device::unbind(open, &self.binding, Instant::now() + timeout).map_err(|(_, error)| error)
    }
}

/// Lists every loop device of this machine that is bound now, in the order of their numbers. Blocks, and
/// changes nothing.
///
/// # Errors
///
/// `Other` if a device cannot be opened or asked, for example for want of root.
pub fn bound_loops() -> Result<Vec<BoundLoop>, BackendError> {
    let numbers = device::bound_numbers().map_err(|error| {
        BackendError::other("cannot list the loop devices in /sys/block").with_source(error)
    })?;
    let mut bound = Vec::with_capacity(numbers.len());
    for number in numbers {
        bound.extend(look_at(number).map_err(|error| failed("ask about", number, error))?);
    }
    Ok(bound)
}

fn look_at(number: u32) -> std::io::Result<Option<BoundLoop>> {
    let device = match Device::open(number) {
        Err(error) if is_absent(&error) => return Ok(None),
        answer => answer?,
    };
    let Some(status) = device.status()? else {
        return Ok(None);
    };
    let mut path = match std::fs::read(device::backing_file(number)) {
        Err(error) if is_absent(&error) => return Ok(None),
        answer => answer?,
    };
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    Ok(Some(BoundLoop {
        number,
        binding: status.binding,
        backing_file: PathBuf::from(std::ffi::OsString::from_vec(path)),
        read_only: status.read_only,
    }))
}
