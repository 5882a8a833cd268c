//! Proving that nobody uses a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::device::number::DeviceNumber;
use crate::errno::{blocking, errno_error, is_absent, retry_while_busy};
use crate::mount::users;

/// Proves that nobody uses a device: no filesystem, no device stacked on it, no exclusive user,
/// also in other mount namespaces and after a lazy unmount. Blocks.
///
/// As long as the answer is kept, the device is held exclusively and nobody can start to use it.
///
/// # Errors
///
/// `Busy`, naming who uses it; `NotFound` if it is not there.
pub fn prove_free(path: &Path) -> Result<File, BackendError> {
    claim(path, |_| Ok(()))?.ok_or_else(|| busy(path, &users::of_device_at(path)))
}

/// Holds a device exclusively if it is the one that is meant, or answers `None` if somebody uses it.
fn claim(
    path: &Path,
    is_it: impl FnOnce(DeviceNumber) -> Result<(), BackendError>,
) -> Result<Option<File>, BackendError> {
    let flags = OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(held) => {
            let number = DeviceNumber::of(&held)?;
            is_it(number)?;
            Ok((!users::has_holders(number)).then_some(held))
        }
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => Ok(None),
        Err(error) if is_absent(&error) => Err(BackendError::not_found(format!(
            "device {} is not there",
            path.display()
        ))
        .with_source(error)),
        Err(error) => Err(errno_error(
            format!("cannot hold device {}", path.display()),
            error,
        )),
    }
}

/// The error `Busy` of a device that somebody uses, with the users that can be found: mounts in
/// whatever mount namespace, devices stacked on it or on a partition, swap; or else the processes
/// that have it open, apart from a single handle of this process, which the caller may have; or else overlays that may
/// have it as a layer. Blocks.
pub fn in_use(path: &Path) -> BackendError {
    let mut users = users::named(path);
    if users.is_empty() {
        users = users::openers_of(path);
    }
    if users.is_empty() {
        users = users::guessed();
    }
    busy(path, &users)
}

/// The same error with the names of those who use a device. Blocks.
pub(crate) fn name_users(path: &Path, error: BackendError) -> BackendError {
    let message = format!("{}: {}", error.message(), in_use(path).message());
    BackendError::busy(message).with_source(error)
}

fn busy(path: &Path, users: &[String]) -> BackendError {
    let by = users::listed(users);
    BackendError::busy(format!("device {} is in use by {by}", path.display()))
}

/// Writes what is cached of a device to it. Blocks.
///
/// # Errors
///
/// The system's: an error means that data may be lost.
pub fn flush(device: &File) -> io::Result<()> {
    device.sync_all()
}

/// What every guest does before a device is taken out: proves it free, for which it tries as long as
/// `timeout` lasts, then flushes it.
///
/// # Errors
///
/// As for [`prove_free`] and [`flush`]; `Busy` as [`in_use`] tells it.
pub async fn release(path: &Path, timeout: Duration) -> Result<(), BackendError> {
    hold_free(path, timeout).await.map(drop)
}

/// The same as [`release`], and keeps holding the device exclusively: as long as the answer lives,
/// nobody can start to use it.
///
/// # Errors
///
/// As for [`release`].
pub async fn hold_free(path: &Path, timeout: Duration) -> Result<File, BackendError> {
    hold_if(path, timeout, |_, _| Ok(())).await
}

/// The same as [`release`], for a node of which it is not known whether it is that of a device.
///
/// # Errors
///
/// As for [`release`]; `Conflict` if it is another device, which is not touched.
pub async fn release_as(
    path: &Path,
    number: DeviceNumber,
    timeout: Duration,
) -> Result<(), BackendError> {
    let is_it = move |now, path: &Path| number.ensure_is(now, path);
    hold_if(path, timeout, is_it).await.map(drop)
}

async fn hold_if(
    path: &Path,
    timeout: Duration,
    is_it: impl Fn(DeviceNumber, &Path) -> Result<(), BackendError> + Clone + Send + 'static,
) -> Result<File, BackendError> {
    let path = path.to_owned();
    let attempt = {
        let path = path.clone();
        // Who uses it is searched for once, when the timeout is over.
        move || try_hold(&path, |now| is_it(now, &path))?.ok_or_else(|| busy(&path, &[]))
    };
    match retry_while_busy(timeout, attempt).await {
        Err(error) if error.kind() == ErrorKind::Busy => blocking(move || Err(in_use(&path))).await,
        done => done,
    }
}

/// Holds a device exclusively if it is the one that is meant, and flushes it, or answers `None` if somebody uses it. Blocks.
pub(crate) fn try_hold(
    path: &Path,
    is_it: impl FnOnce(DeviceNumber) -> Result<(), BackendError>,
) -> Result<Option<File>, BackendError> {
    let Some(held) = claim(path, is_it)? else {
        return Ok(None);
    };
    match flush(&held) {
        Ok(()) => Ok(Some(held)),
        // The kernel says this once, and the device is free all the same.
        Err(error) => {
            let message = format!(
                "device {} did not take all that was written",
                path.display()
            );
            Err(BackendError::lost_writes(message).with_source(error))
        }
    }
}
