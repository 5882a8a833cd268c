//! Devices with a tag for each block (dm-integrity), below those that encrypt and authenticate.
//!
//! The kernel formats the device itself where its superblock is zero, for which it is made once with one block, and says then
//! how many it has room for. There is no journal: a block and its tag that do not fit each other after a crash are worth
//! nothing anyway, since the key is lost with the kernel.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blockmount::BackendError;

use crate::device::content::refuse_content;
use crate::device::mapper::{Access, DeviceMapper, Names, SECTOR, Target};
use crate::device::number::DeviceNumber;
use crate::device::partition::sequence;
use crate::device::{mapped, node};
use crate::errno::errno_error;
use crate::undo::ledger::UndoList;
use crate::undo::step::{IntegrityStep, Undo};

const KIND: &str = "integrity";
/// What has one tag, in bytes. It has to be what is encrypted at once.
pub(super) const BLOCK: u64 = 4096;
/// The length of the superblock, in bytes.
const SUPERBLOCK: usize = 4096;

impl IntegrityStep {
    /// From the number of the device alone: at most 42 bytes with a mark.
    pub(crate) fn names(&self) -> Names {
        let DeviceNumber { major, minor } = self.backing;
        let suffix = format!("integrity-{major}.{minor}");
        Names::new(&suffix, self.mark.as_deref())
    }
}

/// Makes a device with tags of so many bytes of another, and names its node. What was on the other is lost then: it has to be blank or noise,
/// unless anything `may_destroy`. Blocks.
///
/// # Errors
///
/// `Conflict` if there is something on the device that is known, or somebody else has made a device of the name; `Invalid`
/// if it is too small; `Unsuitable` if this kernel has no dm-integrity; others as they come.
pub(crate) fn open(
    list: &UndoList<'_>,
    below: &Path,
    tag: usize,
    may_destroy: bool,
) -> Result<PathBuf, BackendError> {
    let mut device = node::measure(below)?;
    let backing = device.number;
    let step = IntegrityStep {
        backing,
        sequence: sequence(backing),
        mark: list.device_mark(),
    };
    let undo = Undo::CloseIntegrity(step.clone());
    mapped::open(list, &step.names(), undo, |mapper, names| {
        if !may_destroy {
            refuse_content(below, &mut device.open)?;
        }
        erase_superblock(below)?;
        let made = format(mapper, names, backing, tag)
            .and_then(|table| mapper.create_mapped(names, &table, Access::ReadWrite));
        made.map_err(|error| explain_refusal(mapper, below, device.size, error))
    })
}

/// Removes the device with tags of another. Blocks.
///
/// # Errors
///
/// `Busy` while somebody uses it.
pub(crate) fn undo(step: &IntegrityStep) -> Result<(), BackendError> {
    mapped::remove(&step.names())
}

/// The node of the device with tags of another. Blocks.
pub(crate) fn node(step: &IntegrityStep) -> Option<PathBuf> {
    mapped::node(&step.names())
}

fn erase_superblock(below: &Path) -> Result<(), BackendError> {
    let erase = || -> io::Result<()> {
        let device = File::options().write(true).open(below)?;
        device.write_all_at(&[0; SUPERBLOCK], 0)?;
        device.sync_all()
    };
    erase().map_err(|error| errno_error(format!("cannot write to {}", below.display()), error))
}

/// Has the kernel format a device, and answers the table of all blocks that it has room for.
fn format(
    mapper: &DeviceMapper,
    names: &Names,
    backing: DeviceNumber,
    tag: usize,
) -> Result<Target, BackendError> {
    let one_block = table(backing, BLOCK / SECTOR, tag);
    mapper.create_mapped(names, &one_block, Access::ReadWrite)?;
    let status = mapper.status(&names.uuid);
    mapper.remove(&names.name)?;
    let room = status?.as_deref().and_then(room);
    let room = room.ok_or_else(|| {
        let name = &names.name;
        BackendError::other(format!("the kernel does not say how large {name} can be"))
    })?;
    Ok(table(backing, room, tag))
}

/// The number of sectors in a status: `0 130048 -`, after that of the tags that did not fit.
fn room(status: &[Target]) -> Option<u64> {
    let [target] = status else { return None };
    let room = target.parameters.split_ascii_whitespace().nth(1)?;
    room.parse().ok().filter(|room| *room > 0)
}

fn table(backing: DeviceNumber, length: u64, tag: usize) -> Target {
    Target {
        start: 0,
        length,
        kind: KIND.to_owned(),
        // Without a journal (D), which is there all the same and made as small as can be.
        parameters: format!("{backing} 0 {tag} D 2 journal_sectors:1 block_size:{BLOCK}"),
    }
}

/// Says why the kernel refuses a table that is well-formed.
fn explain_refusal(
    mapper: &DeviceMapper,
    below: &Path,
    size: u64,
    error: BackendError,
) -> BackendError {
    /// What is more is never too small for superblock, journal and one run of tags.
    const LARGE: u64 = 1 << 20;
    match mapper.version_of(KIND) {
        Ok(None) => {
            let why = "this kernel has no dm-integrity (is its module loaded?)";
            BackendError::unsuitable(format!("{}: {why}", error.message())).with_source(error)
        }
        Ok(Some(_)) if size < LARGE => {
            let (message, below) = (error.message(), below.display());
            let message = format!("{message}: {below} has {size} bytes, too few for its tags");
            BackendError::invalid(message).with_source(error)
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_what_the_kernels_documentation_says() {
        let disk = DeviceNumber { major: 8, minor: 0 };
        let table = table(disk, 8, 32);
        assert_eq!((table.start, table.length), (0, 8));
        let expected = "8:0 0 32 D 2 journal_sectors:1 block_size:4096";
        assert_eq!(table.parameters, expected);
    }

    #[test]
    fn how_much_room_there_is_is_in_the_status() {
        let status = |parameters: &str| {
            let target = Target {
                start: 0,
                length: 8,
                kind: KIND.to_owned(),
                parameters: parameters.to_owned(),
            };
            room(&[target])
        };
        assert_eq!(status("0 130048 -"), Some(130_048));
        assert_eq!(status("0 130048"), Some(130_048));
        for unknown in ["", "0", "0 0 -", "0 x -"] {
            assert_eq!(status(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn g14_the_longest_name_of_a_device_with_tags_fits() {
        let step = IntegrityStep {
            backing: DeviceNumber {
                major: u32::MAX,
                minor: u32::MAX,
            },
            sequence: None,
            mark: Some("m".repeat(40)),
        };
        let Names { name, uuid } = step.names();
        assert!(name.len().max(uuid.len()) <= 127, "{name}");
    }
}
