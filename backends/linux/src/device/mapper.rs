//! Devices made of ranges of others (device-mapper).
//!
//! No daemon is involved: the kernel makes the node, `/dev/dm-N`, and what is made here bears a mark in name
//! and UUID by which a clean-up can tell it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use blockmount::BackendError;
use rustix::io::Errno;

use crate::device::number::DeviceNumber;
use crate::device::{free, node};
use crate::discover::sysfs::{names, text};
use crate::errno::{Backoff, blocking, errno_error, is_absent, retry_while_busy};

mod ioctl;
mod wire;

use ioctl::Command;
pub(crate) use wire::SECTOR;
pub use wire::{Mapped, Target};
use wire::{READ_ONLY, Reply, Request, SECURE, STATUS_TABLE};

/// What the names of our devices start with.
pub const NAME_MARK: &str = "blockmount-";
/// What the UUIDs of our devices start with.
pub const UUID_MARK: &str = "BLKMNT-";
/// What is before the mark of an engine in the UUIDs of its devices.
const BEFORE_MARK: char = '@';

/// A mapped device that an engine with a [mark](crate::LinuxGuestBuilder::device_mark) has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The device.
    pub device: Mapped,
    /// By what it is told from a later one with the same name.
    pub uuid: String,
    /// The mark of the engine.
    pub mark: String,
}

/// By what a device of ours is told from all others: the kernel lets each name and each UUID be there once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) name: String,
    pub(crate) uuid: String,
}

impl Names {
    /// With our marks. The suffix says what is made of which device; the mark of the engine is in the UUID alone, so that no two
    /// engines make the same of one device.
    pub(crate) fn new(suffix: &str, mark: Option<&str>) -> Self {
        let uuid = match mark {
            None => format!("{UUID_MARK}{suffix}"),
            Some(mark) => format!("{UUID_MARK}{suffix}{BEFORE_MARK}{mark}"),
        };
        let name = format!("{NAME_MARK}{suffix}");
        Names { name, uuid }
    }
}

/// Whether a device can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
}

/// The interface's version that is spoken; kernels speak all older ones of the same first number.
const MAJOR_VERSION: u32 = 4;
const CONTROL: &str = "/dev/mapper/control";
/// Space for an answer, in bytes, at first and at most: a table of a thousand ranges takes 80 KiB.
const REPLY: usize = 16 << 10;
const MAX_REPLY: usize = 16 << 20;

/// The kernel's device-mapper. All calls block, for milliseconds.
#[derive(Debug)]
pub struct DeviceMapper(File);

impl DeviceMapper {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this kernel has none, or one of another version of the interface.
    pub fn open() -> Result<Self, BackendError> {
        let opened = OpenOptions::new().read(true).write(true).open(CONTROL);
        let control = match opened {
            Ok(control) => control,
            Err(error) if is_absent(&error) => {
                let message = format!(
                    "this kernel has no device-mapper: there is no {CONTROL} (is dm_mod loaded?)"
                );
                return Err(BackendError::unsuitable(message).with_source(error));
            }
            Err(error) => return Err(errno_error(format!("cannot open {CONTROL}"), error)),
        };
        let this = DeviceMapper(control);
        let major = this
            .run(Command::Version, Request::new(""))
            .map_err(|errno| errno_error("cannot ask device-mapper for its version", errno))?
            .version();
        if major != MAJOR_VERSION {
            return Err(BackendError::unsuitable(format!(
                "device-mapper has version {major} of its interface and not {MAJOR_VERSION}"
            )));
        }
        Ok(this)
    }

    fn run(&self, command: Command, request: Request) -> Result<Reply, Errno> {
        let mut space = REPLY;
        loop {
            let mut buffer = request.clone().into_buffer(space);
            ioctl::run(&self.0, command, &mut buffer)?;
            let reply = Reply::new(buffer);
            if !reply.is_cut() {
                return Ok(reply);
            }
            space *= 4;
            if space > MAX_REPLY {
                return Err(Errno::NOBUFS);
            }
        }
    }

    /// Makes a read-only device of a range of another, which is given in bytes. All or nothing.
    ///
    /// # Errors
    ///
    /// `Invalid` for a bad name or range, `Conflict` if the name or the UUID is taken, `Busy` if somebody else
    /// has the device beneath to himself, `Uncertain` if a device was begun and cannot be taken back.
    pub fn create_linear(
        &self,
        name: &str,
        uuid: &str,
        backing: DeviceNumber,
        range: Range<u64>,
    ) -> Result<DeviceNumber, BackendError> {
        let table = Target::linear(backing, range)?;
        let names = Names {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
        };
        self.create_mapped(&names, &table, Access::ReadOnly)
    }

    /// Makes a device of a table. All or nothing.
    ///
    /// # Errors
    ///
    /// As for [`create_linear`](Self::create_linear); those of the kind of target as the kernel answers them.
    pub(crate) fn create_mapped(
        &self,
        names: &Names,
        table: &Target,
        access: Access,
    ) -> Result<DeviceNumber, BackendError> {
        let Names { name, uuid } = names;
        self.create(name, uuid)?;
        let made = self.load(name, table, access);
        made.and_then(|()| self.resume(name))
            .map_err(|error| match self.remove(name) {
                Ok(_) => error,
                Err(left) => {
                    let message = format!("{}, and {}", error.message(), left.message());
                    BackendError::uncertain(message).with_source(left)
                }
            })
    }

    fn create(&self, name: &str, uuid: &str) -> Result<(), BackendError> {
        let request = Request::new(checked(name)?).uuid(checked(uuid)?);
        match self.run(Command::Create, request) {
            Ok(_) => Ok(()),
            // The name does not become free by itself.
            Err(errno @ Errno::BUSY) => {
                let message = format!("cannot make mapped device {name}: there is one already");
                Err(BackendError::conflict(message).with_source(io::Error::from(errno)))
            }
            Err(errno) => Err(errno_error(
                format!("cannot make mapped device {name}"),
                errno,
            )),
        }
    }

    fn load(&self, name: &str, table: &Target, access: Access) -> Result<(), BackendError> {
        // The kernel wipes its copy of the table, whatever is in it.
        let flags = match access {
            Access::ReadOnly => READ_ONLY | SECURE,
            Access::ReadWrite => SECURE,
        };
        let request = Request::new(name).flags(flags).target(table);
        let done = self.run(Command::Load, request);
        let what = || format!("cannot make {name} a device of the kind {}", table.kind);
        done.map(drop).map_err(|errno| errno_error(what(), errno))
    }

    fn resume(&self, name: &str) -> Result<DeviceNumber, BackendError> {
        let done = self.run(Command::Resume, Request::new(name));
        let done = done.map_err(|errno| errno_error(format!("cannot start {name}"), errno))?;
        Ok(done.number())
    }

    /// Gives a device another table, while it is in use. After an error it has the one from before.
    ///
    /// # Errors
    ///
    /// Those of the kind of target as the kernel answers them.
    pub(crate) fn replace(
        &self,
        name: &str,
        table: &Target,
        access: Access,
    ) -> Result<(), BackendError> {
        self.load(name, table, access)?;
        self.resume(name).map(drop).inspect_err(|_| {
            // The new one waits beside the one in use.
            if let Err(errno) = self.run(Command::Clear, Request::new(name)) {
                tracing::warn!(name, %errno, "a table that is not used stays");
            }
        })
    }

    /// Removes a device. False if there is none of that name.
    ///
    /// # Errors
    ///
    /// `Busy` if it is in use; it stays as it was then.
    pub fn remove(&self, name: &str) -> Result<bool, BackendError> {
        match self.run(Command::Remove, Request::new(checked(name)?)) {
            Ok(_) => Ok(true),
            Err(Errno::NXIO) => Ok(false),
            Err(errno) => Err(errno_error(
                format!("cannot remove mapped device {name}"),
                errno,
            )),
        }
    }

    /// Removes the device of a UUID, whatever it is called. False if there is none.
    ///
    /// # Errors
    ///
    /// `Busy` if it is in use; it stays as it was then.
    pub fn remove_uuid(&self, uuid: &str) -> Result<bool, BackendError> {
        match self.run(Command::Remove, Request::new("").uuid(checked(uuid)?)) {
            Ok(_) => Ok(true),
            Err(Errno::NXIO) => Ok(false),
            Err(errno) => Err(errno_error(
                format!("cannot remove the mapped device with UUID {uuid}"),
                errno,
            )),
        }
    }

    /// The number of the device of a UUID. Nothing if there is none.
    pub(crate) fn find_uuid(&self, uuid: &str) -> Result<Option<DeviceNumber>, BackendError> {
        match self.run(Command::Status, Request::new("").uuid(checked(uuid)?)) {
            Ok(reply) => Ok(Some(reply.number())),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno_error(
                format!("cannot look for the mapped device with UUID {uuid}"),
                errno,
            )),
        }
    }

    /// What the targets of the device of a UUID say of themselves. Nothing if there is no such device.
    pub(crate) fn status(&self, uuid: &str) -> Result<Option<Vec<Target>>, BackendError> {
        match self.run(Command::Table, Request::new("").uuid(checked(uuid)?)) {
            Ok(reply) => Ok(Some(reply.targets())),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno_error(
                format!("cannot ask the mapped device with UUID {uuid} how it is"),
                errno,
            )),
        }
    }

    /// The version of a kind of target, if the kernel has it loaded.
    pub(crate) fn version_of(&self, kind: &str) -> Result<Option<[u32; 3]>, BackendError> {
        let reply = self.run(Command::Versions, Request::new(""));
        let reply =
            reply.map_err(|errno| errno_error("cannot list the kinds of targets", errno))?;
        let known = reply.versions().into_iter();
        let mut known = known.filter(|(name, _)| name == kind);
        Ok(known.next().map(|(_, version)| version))
    }

    /// All mapped devices, also those of others.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn list(&self) -> Result<Vec<Mapped>, BackendError> {
        let reply = self.run(Command::List, Request::new(""));
        let reply = reply.map_err(|errno| errno_error("cannot list the mapped devices", errno))?;
        Ok(reply.names())
    }

    /// The devices of engines with a mark, also those whose engine was killed before it gave them a table.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn marked(&self) -> Result<Vec<Marked>, BackendError> {
        let mut found = Vec::new();
        for device in self.list()? {
            if !device.name.starts_with(NAME_MARK) {
                continue;
            }
            let uuid = match self.run(Command::Status, Request::new(&device.name)) {
                Ok(reply) => reply.uuid(),
                // It is gone meanwhile.
                Err(Errno::NXIO) => continue,
                Err(errno) => {
                    let what = format!("cannot look at mapped device {}", device.name);
                    return Err(errno_error(what, errno));
                }
            };
            if let Some(mark) = mark_in(&uuid).map(str::to_owned) {
                found.push(Marked { device, uuid, mark });
            }
        }
        Ok(found)
    }

    /// The number of the device of a name. Nothing if there is none.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn find(&self, name: &str) -> Result<Option<DeviceNumber>, BackendError> {
        let all = self.list()?;
        Ok(all
            .into_iter()
            .find(|mapped| mapped.name == name)
            .map(|mapped| mapped.number))
    }

    /// What a device is made of. Nothing if there is none of that name.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn table(&self, name: &str) -> Result<Option<Vec<Target>>, BackendError> {
        let request = Request::new(checked(name)?).flags(STATUS_TABLE);
        match self.run(Command::Table, request) {
            Ok(reply) => Ok(Some(reply.targets())),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno_error(
                format!("cannot read the table of {name}"),
                errno,
            )),
        }
    }
}

/// The mark of the engine in a UUID of ours.
fn mark_in(uuid: &str) -> Option<&str> {
    let (_, mark) = uuid.strip_prefix(UUID_MARK)?.split_once(BEFORE_MARK)?;
    Some(mark)
}

/// A name or UUID that the kernel keeps as it is: it cuts longer ones.
fn checked(name: &str) -> Result<&str, BackendError> {
    let is_plain = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if is_plain && !name.is_empty() && name.len() <= wire::LONGEST_NAME {
        return Ok(name);
    }
    let (start, length) = (name.chars().take(32).collect::<String>(), name.len());
    Err(BackendError::invalid(format!(
        "{start:?} ({length} bytes) is no name of a mapped device: it takes 1 to {} visible ASCII characters without a slash",
        wire::LONGEST_NAME,
    )))
}

/// How long another call may have the whole device, at least: each that releases a range holds it for a moment, and flushes
/// it, which takes its time where there are many, on a busy machine.
const OTHERS: Duration = Duration::from_secs(5);

/// Proves that nobody uses a range of a device, in bytes, for as long as `timeout` lasts: no device is
/// mapped to it, and nobody has the whole device, for which five seconds are the least. Other ranges may be in use.
///
/// # Errors
///
/// `Busy`, naming who uses it; `NotFound` if the device is not there.
pub async fn release_range(
    path: &Path,
    range: Range<u64>,
    timeout: Duration,
) -> Result<(), BackendError> {
    let number = {
        let path = path.to_owned();
        blocking(move || match node::open(&path)? {
            Some(open) => DeviceNumber::of(&open),
            None => {
                let message = format!("device {} is not there", path.display());
                Err(BackendError::not_found(message))
            }
        })
        .await?
    };
    let what = format!(
        "bytes {} to {} of device {}",
        range.start,
        range.end,
        path.display()
    );
    let whole = path.to_owned();
    let attempt = move || match users_of_range(number, &range)? {
        Some(users) if users.is_empty() => Ok(true),
        Some(users) => {
            let message = format!("{what} are in use by {}", users.join(", "));
            Err(BackendError::busy(message))
        }
        // Somebody may have it without a mapped device.
        None => free::try_hold(&whole, |_| Ok(())).map(|held| held.is_some()),
    };
    let mut others = Backoff::until(Instant::now() + timeout.max(OTHERS));
    while !retry_while_busy(timeout, attempt.clone()).await? {
        let Some(pause) = others.pause() else {
            let path = path.to_owned();
            return blocking(move || Err(free::in_use(&path))).await;
        };
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// The devices that are mapped to a range of a device. Nothing if no device is stacked on it at all.
fn users_of_range(
    backing: DeviceNumber,
    range: &Range<u64>,
) -> Result<Option<Vec<String>>, BackendError> {
    let holders = names(&backing.sysfs().join("holders"))?;
    if holders.is_empty() {
        return Ok(None);
    }
    let mut users = Vec::new();
    for holder in holders {
        let about = Path::new("/sys/class/block").join(&holder).join("dm");
        let Some(name) = text(&about, "name")? else {
            users.push(format!("device {holder}"));
            continue;
        };
        // One that is gone meanwhile uses nothing.
        let table = DeviceMapper::open()?.table(&name)?.unwrap_or_default();
        if table.iter().any(|target| target.touches(backing, range)) {
            users.push(format!("mapped device {name} ({holder})"));
        }
    }
    Ok(Some(users))
}

#[cfg(test)]
mod tests {
    use blockmount::ErrorKind;

    use super::*;

    #[test]
    fn the_mark_of_an_engine_is_in_the_uuid_and_read_from_it() {
        let plain = Names::new("crypt-7.1", None);
        let marked = Names::new("crypt-7.1", Some("run:a@b"));
        assert_eq!(plain.name, marked.name);
        assert_eq!(marked.uuid, "BLKMNT-crypt-7.1@run:a@b");
        assert_eq!(mark_in(&marked.uuid), Some("run:a@b"));
        for other in [&*plain.uuid, "CRYPT-x@run:a", "", "BLKMNT-"] {
            assert_eq!(mark_in(other), None, "{other}");
        }
    }

    #[test]
    fn g14_names_that_the_kernel_would_cut_are_refused() {
        let longest = "x".repeat(127);
        assert_eq!(checked(&longest).unwrap(), longest);
        let too_long = "x".repeat(128);
        for bad in ["", "a/b", "a b", "a\0", "ü", "..\n", &too_long] {
            assert_eq!(
                checked(bad).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{bad:?}"
            );
        }
    }
}
