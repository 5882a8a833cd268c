//! A disk by its directory in sysfs, and the proof that an open node is that disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockmount::{BackendError, ErrorKind, blocking};

use crate::device::free;
use crate::device::node::{self, field, node_named_in};
use crate::device::number::DeviceNumber;
use crate::discover::sysfs::{attribute, bytes, command, names};
use crate::discover::uevent::{self, NotReady, Probe};
use crate::sys;

/// The unit of the attribute `size`, whatever the blocks of the device are, in bytes.
const SECTOR: u64 = 512;
/// How often the kernel is had to ask a disk without bytes for its size: one may really have none.
const ASKED_AGAIN: usize = 5;

/// A disk as sysfs had it at one moment.
///
/// Numbers and names are given to the next disk as soon as one is gone: two of these are equal only if
/// they are of the same disk, where the kernel counts its disks (Linux 5.15).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    directory: PathBuf,
    name: Name,
    size: u64,
}

/// What the kernel calls a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    node: PathBuf,
    number: DeviceNumber,
    /// Of its disks, how many came before.
    sequence: Option<u64>,
}

impl Name {
    fn of(directory: &Path) -> Probe<Self> {
        let uevent = bytes(directory, "uevent")?.unwrap_or_default();
        let text = |key: &[u8]| std::str::from_utf8(field(&uevent, key)?).ok();
        let part = |key| text(key)?.parse().ok();
        let number = || {
            let (major, minor) = (part(b"MAJOR=")?, part(b"MINOR=")?);
            Some(DeviceNumber { major, minor })
        };
        Ok(Name {
            node: node_named_in(&uevent).ok_or_else(|| missing("name", directory))?,
            number: number().ok_or_else(|| missing("number", directory))?,
            sequence: text(b"DISKSEQ=").and_then(|text| text.parse().ok()),
        })
    }
}

fn missing(what: &str, directory: &Path) -> NotReady {
    NotReady::not_found(format!(
        "there is no {what} of a block device in {}",
        directory.display()
    ))
}

impl Disk {
    /// The disk that a device is, by the `block` directory of the device. Blocks.
    ///
    /// # Errors
    ///
    /// `Conflict` if the device is several disks; the system's.
    pub fn below(device: &Path) -> Probe<Disk> {
        let block = device.join("block");
        match names(&block)?.as_slice() {
            [] => Err(NotReady::not_found(format!(
                "there is no block device in {}",
                block.display()
            ))),
            [name] => Disk::at(&block.join(name)),
            several => Err(NotReady::Failed(BackendError::conflict(format!(
                "there are several block devices in {}: {}",
                block.display(),
                several.join(", ")
            )))),
        }
    }

    /// Has the kernel ask the disk of a SCSI device for its size again while it has no bytes. Each hot-plug on a target has all of
    /// its disks refuse their next command, and in a burst of them a new disk refuses the question for its size as often as the
    /// kernel repeats it. Blocks.
    ///
    /// # Errors
    ///
    /// As for [`below`](Self::below), unless the disk is missing; the system's, of asking.
    pub fn ensure_measured(device: &Path) -> Result<(), BackendError> {
        for _ in 0..ASKED_AGAIN {
            match uevent::present(Disk::below(device))? {
                Some(disk) if disk.size() == 0 => {}
                _ => break,
            }
            tracing::warn!(device = %device.display(), "the disk has no bytes, having the kernel ask it again");
            if !Disk::measure(device)? {
                break;
            }
        }
        Ok(())
    }

    /// Has the kernel ask the disk of a SCSI device for its size again, and for what else it knows of it. False if there is no
    /// such device. Blocks.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn measure(device: &Path) -> Result<bool, BackendError> {
        command(device, "rescan", "1")
    }

    /// The disk with this directory. Blocks.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn at(directory: &Path) -> Probe<Disk> {
        let size = attribute(directory, "size")?.and_then(|size| size.checked_mul(SECTOR));
        Ok(Disk {
            name: Name::of(directory)?,
            size: size.ok_or_else(|| missing("size", directory))?,
            directory: directory.to_owned(),
        })
    }

    /// Its directory in sysfs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its node, which may not be there yet.
    pub fn node(&self) -> &Path {
        &self.name.node
    }

    /// Its number.
    pub fn number(&self) -> DeviceNumber {
        self.name.number
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it is in its place still. Blocks.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn is_there(&self) -> Result<bool, BackendError> {
        let now = uevent::present(Name::of(&self.directory))?;
        let (was, sequence) = (self.name.number, self.name.sequence);
        Ok(now.is_some_and(|now| now.number == was && now.sequence == sequence))
    }

    /// Opens the node for reading and proves that it is this disk: the number fits, and so does the count of disks; where the
    /// kernel does not count them, the disk was there before and after. Blocks.
    ///
    /// # Errors
    ///
    /// As for [`crate::device::open()`].
    pub fn open(&self) -> Probe<File> {
        let node = self.node().display();
        let (open, number) = node::open_numbered(self.node())?
            .ok_or_else(|| NotReady::not_found(format!("device {node} is not ready")))?;
        let wanted = self.number();
        if number != wanted {
            let message = format!("{node} is block device {number} and not {wanted}");
            return Err(NotReady::not_found(message));
        }
        let is_it = match (self.name.sequence, sys::disk_sequence(&open)) {
            (Some(wanted), Ok(sequence)) => wanted == sequence,
            _ => self.is_there()?,
        };
        if !is_it {
            let message = format!("another disk has taken the name {node}");
            return Err(NotReady::not_found(message));
        }
        Ok(open)
    }
}

impl Disk {
    /// The same, and goes on if the disk did not take all that was cached: `lost` is then that error, for when the disk
    /// is out.
    ///
    /// # Errors
    ///
    /// As for [`hold`](Self::hold), but for `LostWrites`.
    pub async fn hold_or_lose(
        &self,
        timeout: Duration,
        lost: &mut Result<(), BackendError>,
    ) -> Result<Option<File>, BackendError> {
        match self.hold(timeout).await {
            Err(error) if error.kind() == ErrorKind::LostWrites => {
                *lost = Err(error);
                self.hold(timeout).await
            }
            held => held,
        }
    }

    /// Proves that nobody uses the disk, writes what is cached to it, and holds it exclusively for as long as
    /// the answer lives. Nothing if it has gone meanwhile: what may be in its place is not to be touched. A disk that has no node
    /// is waited for: in sysfs it comes before its node, and goes after it.
    ///
    /// # Errors
    ///
    /// As for [`crate::device::hold_free`]; `Other` if it is there and cannot be opened. `LostWrites` is said once, and
    /// the next call holds the disk.
    pub async fn hold(&self, timeout: Duration) -> Result<Option<File>, BackendError> {
        let deadline = Instant::now() + timeout;
        loop {
            let missing = match free::hold_free(self.node(), timeout).await {
                Err(error) if error.kind() == ErrorKind::NotFound => error,
                held => return self.prove(held?).await,
            };
            let disk = self.clone();
            let look = move || match disk.is_there()? {
                false => Ok(Some(false)),
                true => Ok(node::open(disk.node())?.map(|_| true)),
            };
            match uevent::wait_until(deadline, look).await? {
                Some(false) => return Ok(None),
                Some(true) if Instant::now() < deadline => {}
                _ => {
                    let (node, why) = (self.node().display(), missing.message());
                    let message = format!("cannot prove that nobody uses {node}: {why}");
                    return Err(BackendError::other(message).with_source(missing));
                }
            }
        }
    }

    /// What is held must be what is meant.
    async fn prove(&self, held: File) -> Result<Option<File>, BackendError> {
        let disk = self.clone();
        blocking(move || {
            let is_it = DeviceNumber::of(&held)? == disk.number() && disk.is_there()?;
            Ok(is_it.then_some(held))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn say(disk: &Path, uevent: &str, sequence: u64) {
        let uevent = format!("MAJOR=8\nMINOR=16\n{uevent}DISKSEQ={sequence}\n");
        fs::write(disk.join("uevent"), uevent).unwrap();
    }

    fn made_up(dir: &Path, name: &str, uevent: &str) -> PathBuf {
        let disk = dir.join("block").join(name);
        fs::create_dir_all(&disk).unwrap();
        fs::write(disk.join("size"), "2048\n").unwrap();
        say(&disk, uevent, 9);
        disk
    }

    #[test]
    fn a_disk_is_what_sysfs_says_and_not_what_its_directory_is_called() {
        let dir = tempfile::tempdir().unwrap();
        let at = made_up(
            dir.path(),
            "cciss!c0d0",
            "DEVNAME=cciss/c0d0\nDEVTYPE=disk\n",
        );
        let disk = Disk::below(dir.path()).unwrap();
        assert_eq!(disk.node(), Path::new("/dev/cciss/c0d0"));
        assert_eq!(
            (disk.number().to_string(), disk.size()),
            ("8:16".into(), 1 << 20)
        );
        assert!(disk.is_there().unwrap());
        say(&at, "DEVNAME=cciss/c0d0\n", 10);
        assert!(!disk.is_there().unwrap());
        fs::remove_dir_all(&at).unwrap();
        assert!(!disk.is_there().unwrap());
        let missing = Disk::below(dir.path()).unwrap_err().into_error();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_disk_without_bytes_is_asked_for_its_size_again_and_no_other_is() {
        let dir = tempfile::tempdir().unwrap();
        let disk = made_up(dir.path(), "sda", "DEVNAME=sda\n");
        let rescan = dir.path().join("rescan");
        for (bytes, asked) in [("8\n", ""), ("0\n", "1")] {
            fs::write(disk.join("size"), bytes).unwrap();
            fs::write(&rescan, "").unwrap();
            Disk::ensure_measured(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&rescan).unwrap(), asked);
        }
    }

    #[test]
    fn several_disks_are_a_conflict_and_a_name_does_not_lead_out_of_dev() {
        let dir = tempfile::tempdir().unwrap();
        for bad in [
            "DEVNAME=../etc/passwd\n",
            "DEVNAME=/etc/passwd\n",
            "DEVNAME=\n",
            "",
        ] {
            made_up(dir.path(), "sda", bad);
            assert!(Disk::below(dir.path()).is_err(), "{bad:?}");
        }
        made_up(dir.path(), "sdb", "");
        let error = Disk::below(dir.path()).unwrap_err().into_error();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.message().ends_with("sda, sdb"), "{error}");
    }

    #[test]
    fn a_node_that_is_another_device_is_not_ready() {
        let dir = tempfile::tempdir().unwrap();
        made_up(dir.path(), "x", "DEVNAME=blockmount-no-such-node\n");
        let disk = Disk::below(dir.path()).unwrap();
        let missing = disk.open().unwrap_err().into_error();
        assert!(missing.message().ends_with("is not ready"), "{missing}");
        made_up(dir.path(), "x", "DEVNAME=null\n");
        let disk = Disk::below(dir.path()).unwrap();
        assert_eq!(
            disk.open().unwrap_err().into_error().kind(),
            ErrorKind::Invalid
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn whatever_is_written_there_is_read_or_refused(content in proptest::collection::vec(any::<u8>(), 0..60)) {
            let dir = tempfile::tempdir().unwrap();
            let at = made_up(dir.path(), "x", "DEVNAME=x\n");
            for name in ["size", "uevent"] {
                fs::write(at.join(name), &content).unwrap();
                if let Ok(found) = Disk::below(dir.path()) {
                    prop_assert!(found.node().starts_with("/dev"));
                }
            }
        }
    }
}
