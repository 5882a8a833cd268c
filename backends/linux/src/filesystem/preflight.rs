//! Validating a request by what is on the device, and an error by what else is known.

use std::fs::File;
use std::path::Path;

use blockmount::{BackendError, DeviceRole, Encryption, Expose, ExtraDevice, MountOptions};
use rustix::io::Errno;

use crate::device::{free, node};
use crate::errno::{DAMAGED, errno_error, errno_of};
use crate::filesystem::mkfs;
use crate::filesystem::probe::{Content, ProbeResult, Superblock};
use crate::mount::{expose, permission, users};

/// Refuses what no guest could do, or this engine does not, before anything is touched.
pub(crate) fn refuse_unsupported(options: &MountOptions) -> Result<(), BackendError> {
    options.format().map_or(Ok(()), mkfs::validate)?;
    let is_mount = options.expose() == Expose::Filesystem;
    let is_noise = options.encryption().is_some_and(Encryption::is_ephemeral);
    if is_noise && options.format().is_none() && is_mount {
        return Err(BackendError::invalid(
            "a device that is encrypted with a new key holds noise: ask for a filesystem to be made on it",
        ));
    }
    let lacks_tree = options.verity().is_some_and(|verity| verity.separate_tree)
        && !options.devices().iter().any(is_tree);
    if lacks_tree {
        return Err(BackendError::invalid(
            "the hash tree is on a device of its own, which is not part of the request",
        ));
    }
    match is_mount {
        true => Ok(()),
        false => expose::validate(options),
    }
}

fn is_tree(device: &ExtraDevice) -> bool {
    device.role == DeviceRole::HashTree
}

/// The filesystem to mount, by what is on the device and what was asked for.
pub(crate) fn choose_filesystem(
    node: &Path,
    found: &ProbeResult,
    asked: Option<&str>,
) -> Result<String, BackendError> {
    let node = node.display();
    let absent = |what: String| {
        Err(BackendError::not_found(format!(
            "there is no filesystem on {node}: {what}"
        )))
    };
    if let Some(needs) = found.truncated() {
        return Err(BackendError::invalid(format!(
            "{node} is truncated: the filesystem needs {needs} bytes, the device has {}",
            found.device_bytes,
        )));
    }
    match (&found.content, asked) {
        (Content::Filesystem(has), None) => Ok(has.name.to_owned()),
        (Content::Filesystem(has), Some(asked)) if is_same_driver(has.name, asked) => {
            Ok(asked.to_owned())
        }
        // The kernel decides about a filesystem that was asked for by name and is not known here.
        (Content::Unknown | Content::Ambiguous(_), Some(asked)) if found.device_bytes > 0 => {
            Ok(asked.to_owned())
        }
        (Content::Filesystem(has), Some(asked)) => {
            absent(format!("{asked} was asked for, but it holds {}", has.name))
        }
        (Content::PartitionTable(table), _) => {
            let numbers: Vec<String> = table
                .partitions
                .iter()
                .map(|p| p.number.to_string())
                .collect();
            absent(format!(
                "it holds a {} partition table, name one of its partitions: {}",
                table.kind,
                numbers.join(", ")
            ))
        }
        (Content::DiskImage(format), _) => Err(BackendError::invalid(format!(
            "{node} holds a disk image of the format {format}, attached as if it were the disk itself: attach it in that \
             format, or convert it to a raw image"
        ))),
        (Content::Compressed(format), _) => Err(BackendError::invalid(format!(
            "{node} holds a file compressed with {format}, and no disk: unpack it, and attach what comes out"
        ))),
        (Content::Ambiguous(_), None) => Err(BackendError::invalid(format!(
            "{node} has {}: name the filesystem to mount",
            found.content
        ))),
        (_, _) if found.device_bytes == 0 => absent("it has no bytes".to_owned()),
        (other, _) => absent(format!("it holds {other}")),
    }
}

/// Says why a filesystem could not be mounted whose blocks are smaller than what the device reads at once: the kernel has only
/// a number for that.
pub(crate) fn ensure_block_size(
    node: &Path,
    device: &File,
    found: &ProbeResult,
) -> Result<(), BackendError> {
    let Content::Filesystem(superblock) = &found.content else {
        return Ok(());
    };
    let node = node.display();
    let smallest = node::logical_block_size(device)
        .map_err(|error| errno_error(format!("cannot ask {node} for its block size"), error))?;
    match superblock.block_size {
        Some(size) if size < smallest => Err(BackendError::invalid(format!(
            "the {} on {node} has blocks of {size} bytes, and the device reads {smallest} at once: make the image \
             with blocks of {smallest}, or its hash tree or encryption in units of {size}",
            superblock.name
        ))),
        _ => Ok(()),
    }
}

/// Names under which one filesystem may be asked for.
pub(crate) fn is_same_driver(found: &str, asked: &str) -> bool {
    let is_ext = |name: &str| matches!(name, "ext2" | "ext3" | "ext4");
    let is_fat = |name: &str| matches!(name, "vfat" | "msdos");
    found == asked || (is_ext(found) && is_ext(asked)) || (is_fat(found) && is_fat(asked))
}

/// What a filesystem may lack on its device, and the options by which a client says how to do without.
struct Driver {
    names: &'static [&'static str],
    /// What it replays when it is mounted.
    journal: &'static str,
    /// Options that mount it without a replay.
    no_replay: &'static [&'static str],
    /// Options that name its other devices, or that do without them.
    devices: &'static [&'static str],
}

const DRIVERS: [Driver; 5] = [
    Driver {
        names: &["ext3", "ext4"],
        journal: "journal",
        no_replay: &["noload", "norecovery"],
        devices: &["journal_dev", "journal_path", "noload", "norecovery"],
    },
    Driver {
        names: &["xfs"],
        journal: "log",
        no_replay: &["norecovery"],
        devices: &["logdev", "rtdev"],
    },
    Driver {
        names: &["btrfs"],
        journal: "log tree",
        no_replay: &["norecovery", "nologreplay", "rescue"],
        devices: &["device", "degraded"],
    },
    Driver {
        names: &["f2fs"],
        journal: "log",
        no_replay: &["norecovery", "disable_roll_forward"],
        devices: &[],
    },
    Driver {
        names: &["erofs"],
        journal: "journal",
        no_replay: &[],
        devices: &["device"],
    },
];

impl Driver {
    fn of(filesystem: &str) -> Option<&'static Driver> {
        DRIVERS
            .iter()
            .find(|driver| driver.names.contains(&filesystem))
    }
}

/// Refuses a filesystem that would be mounted with other content than was written to it, unless the client says how.
///
/// # Errors
///
/// `Invalid` if it needs devices that are not named, or would be mounted read-only without what its journal has. `Busy` in
/// place of the latter if the journal is in use: the filesystem is mounted elsewhere.
pub(crate) fn refuse_incomplete(
    node: &Path,
    found: &Superblock,
    options: &MountOptions,
    is_first: bool,
) -> Result<(), BackendError> {
    // What is given as further devices is checked with them.
    let names_none = options.devices().iter().all(is_tree);
    let Some(driver) = Driver::of(found.name) else {
        return Ok(());
    };
    let names =
        |given: &str, known: &[&str]| known.contains(&given.split('=').next().unwrap_or(given));
    let says = |known: &[&str]| options.data().iter().any(|given| names(given, known));
    let (name, at) = (found.name, node.display());
    if found.more_devices > 0 && names_none && !says(driver.devices) {
        let devices = match found.more_devices {
            1 => "1 more device, which is".to_owned(),
            more => format!("{more} more devices, which are"),
        };
        return Err(BackendError::invalid(format!(
            "the {name} filesystem on {at} needs {devices} not part of the request"
        )));
    }
    if found.needs_recovery && options.is_read_only() && !says(driver.no_replay) {
        if is_first {
            free::prove_free(node)?;
        }
        return Err(not_replayed(node, found.name));
    }
    Ok(())
}

fn not_replayed(node: &Path, filesystem: &str) -> BackendError {
    let driver = Driver::of(filesystem);
    let journal = driver.map_or("journal", |driver| driver.journal);
    let option = driver.and_then(|driver| driver.no_replay.first());
    let or_without = option.map_or(String::new(), |option| {
        format!(", or give the option {option} to see the older state")
    });
    BackendError::invalid(format!(
        "the {journal} of the {filesystem} filesystem on {} was not replayed, and without that a read-only mount shows an older \
         state: mount it writable once{or_without}",
        node.display()
    ))
}

/// Says more where the kernel's number alone says little.
pub(crate) fn explained(
    error: BackendError,
    node: &Path,
    found: &ProbeResult,
    read_only: bool,
) -> BackendError {
    let at = node.display();
    let superblock = match &found.content {
        Content::Filesystem(superblock) => Some(superblock),
        _ => None,
    };
    match errno_of(&error) {
        Some(errno) if DAMAGED.contains(&errno) => {
            explain(error, &format!("the filesystem on {at} is damaged"))
        }
        Some(Errno::BUSY) => {
            let by = users::listed(&users::of_device_at(node));
            explain(error, &format!("device {at} is in use by {by}"))
        }
        // What the kernel finds in a journal may be more than its superblock says.
        Some(Errno::ROFS) if read_only && superblock.is_some() => {
            let name = superblock.map_or("", |found| found.name);
            BackendError::invalid(format!(
                "{}: {}",
                error.message(),
                not_replayed(node, name).message()
            ))
            .with_source(error)
        }
        Some(Errno::ROFS | Errno::ACCESS) => explain(
            error,
            &format!("device {at} is read-only; mount it with ro"),
        ),
        Some(Errno::INVAL | Errno::OPNOTSUPP) => {
            let features = superblock.map(|found| found.features.join(", "));
            match features.filter(|features| !features.is_empty()) {
                None => error,
                Some(features) => explain(
                    error,
                    &format!("the filesystem uses features that not every kernel has: {features}"),
                ),
            }
        }
        Some(Errno::PERM) => explain(error, &permission::missing()),
        _ => error,
    }
}

/// Adds to an error of mounting what else is known, without a change of its kind.
fn explain(error: BackendError, more: &str) -> BackendError {
    BackendError::new(error.kind(), format!("{}: {more}", error.message())).with_source(error)
}
