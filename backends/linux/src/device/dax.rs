//! Files without a copy of them in the page cache (DAX): whether it was asked for, and whether it is so.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;

use blockmount::{BackendError, ErrorKind, MountOptions};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use crate::device::number::DeviceNumber;
use crate::discover::sysfs;
use crate::mount::mountinfo;

/// So many entries are looked at for a file that tells: images are as large as they like.
const MOST_ENTRIES: usize = 4096;

/// What there is to know about a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dax {
    /// Whether the filesystem itself says that it is mounted so.
    pub(crate) option: bool,
    /// Whether any file is accessed so (`STATX_ATTR_DAX`), among those that were looked at; nothing if there
    /// was none. Directories never are.
    pub(crate) files: Option<bool>,
}

impl Dax {
    pub(crate) fn is_on(self) -> bool {
        self.files.unwrap_or(self.option)
    }
}

fn is_always(option: &str) -> bool {
    matches!(option, "dax" | "dax=always")
}

/// Whether all files shall be accessed so.
pub(crate) fn is_asked(options: &MountOptions) -> bool {
    options.data().iter().any(|option| is_always(option))
}

/// Says more about a mount that was refused without a reason. Other filesystems do without it in silence.
pub(crate) fn explained(error: BackendError, node: &Path) -> BackendError {
    if error.kind() != ErrorKind::Invalid {
        return error;
    }
    let why = match has_access(node) {
        Some(false) => "the device has no direct access",
        _ => "the blocks of the filesystem must be as large as a page",
    };
    let message = format!("{}: it has dax=always, and {why}", error.message());
    BackendError::unsuitable(message).with_source(error)
}

/// Whether a device can be accessed directly, where the kernel says so.
fn has_access(node: &Path) -> Option<bool> {
    let directory = DeviceNumber::at(node).ok()?.sysfs();
    // A partition has the queue of its disk.
    let mut queues = ["queue", "../queue"].into_iter();
    let found = queues.find_map(|queue| sysfs::text(&directory.join(queue), "dax").ok()?)?;
    Some(found == "1")
}

/// How a mount is. Nothing if nothing is mounted there. Blocks.
pub(crate) fn of_mount(target: &Path) -> Option<Dax> {
    let table = mountinfo::read().ok()?;
    let mount = *mountinfo::at(&table, target).last()?;
    let option = ["dax", "dax=always"]
        .iter()
        .any(|name| mount.has_option(name));
    let files = any_file(target);
    Some(Dax { option, files })
}

/// Proves that a mount which was asked to be so is so. Blocks.
///
/// # Errors
///
/// `Unsuitable` if it is not.
pub(crate) fn prove(target: &Path) -> Result<(), BackendError> {
    let found = of_mount(target);
    tracing::info!(target = %blockmount::printable(target.display()), ?found, "mounted with dax=always");
    if found.is_some_and(|found| found.option || found.is_on()) {
        return Ok(());
    }
    let path = target.display();
    let message = format!("the filesystem at {path} does without dax=always");
    Err(BackendError::unsuitable(message))
}

fn any_file(root: &Path) -> Option<bool> {
    let device = |path: &Path| {
        let found = statx(
            CWD,
            path,
            AtFlags::SYMLINK_NOFOLLOW,
            StatxFlags::BASIC_STATS,
        )
        .ok()?;
        Some((found.stx_dev_major, found.stx_dev_minor, found))
    };
    let (major, minor, _) = device(root)?;
    let mut seen = None;
    let mut left = MOST_ENTRIES;
    let mut directories = VecDeque::from([root.to_owned()]);
    while let Some(directory) = directories.pop_front() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if left == 0 {
                return seen;
            }
            left -= 1;
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            let path = entry.path();
            let Some(found) = device(&path).filter(|found| (found.0, found.1) == (major, minor))
            else {
                continue;
            };
            if kind.is_dir() {
                directories.push_back(path);
            } else if kind.is_file() {
                if found.2.stx_attributes.contains(StatxAttributes::DAX) {
                    return Some(true);
                }
                seen = Some(false);
            }
        }
    }
    seen
}
