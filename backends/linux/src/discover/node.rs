//! Device nodes, also where `/dev` has none: a container's `/dev` is most often a copy that nothing keeps up
//! to date.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::DeviceNumber;
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};
use rustix::io::Errno;

/// The directory of our own nodes. It is in `/dev`, because other filesystems are often mounted `nodev`.
const OWN: &str = "/dev/blockmount";

/// How often a node is tried again that others remove or make at the same time.
const ATTEMPTS: usize = 16;

/// The node of a device, by the kernel's name for it: the one in `/dev`, or one of our own, which is made if
/// it is missing and stays until [`remove`]. Blocks.
///
/// # Errors
///
/// The system's, if no node can be made.
pub fn ensure(name: &str, number: DeviceNumber) -> io::Result<PathBuf> {
    let usual = Path::new("/dev").join(name);
    if is_node_of(&usual, number) {
        return Ok(usual);
    }
    let own = Path::new(OWN).join(name);
    for _ in 0..ATTEMPTS {
        match make(&own, number) {
            Err(Errno::EXIST) if is_node_of(&own, number) => return Ok(own),
            // It is from before the name went to another device.
            Err(Errno::EXIST) => drop(fs::remove_file(&own)),
            made => return made.map(|()| own).map_err(|errno| unmade(name, errno)),
        }
    }
    Err(unmade(name, Errno::EXIST))
}

/// Opens a device by the kernel's name for it, and proves that the node is that device. Leaves no node behind. The flag says
/// whether the node in `/dev` is that device. Blocks.
///
/// # Errors
///
/// The system's, of opening it or of making a node.
pub fn open(name: &str, number: DeviceNumber, options: &OpenOptions) -> io::Result<(File, bool)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if let Some(file) = open_if(&Path::new("/dev").join(name), number, options)? {
        return Ok((file, true));
    }
    for _ in 0..ATTEMPTS {
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let own = Path::new(OWN).join(format!(".{name}-{}-{unique}", std::process::id()));
        match make(&own, number) {
            Ok(()) => {
                let opened = open_if(&own, number, options);
                remove_path(&own);
                let opened = opened?.ok_or_else(|| unmade(name, Errno::NOENT));
                return opened.map(|file| (file, false));
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(unmade(name, errno)),
        }
    }
    Err(unmade(name, Errno::EXIST))
}

/// Removes the node of our own, if there is one. Blocks.
pub fn remove(name: &str) {
    remove_path(&Path::new(OWN).join(name));
}

fn remove_path(node: &Path) {
    match fs::remove_file(node) {
        // The last one out removes the directory.
        Ok(()) => drop(fs::remove_dir(OWN)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(node = %blockmount::printable(node.display()), %error, "cannot remove a device node")
        }
    }
}

fn is_node_of(path: &Path, number: DeviceNumber) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| {
        metadata.file_type().is_block_device() && DeviceNumber::from_rdev(metadata.rdev()) == number
    })
}

/// Opens the node if it is there and is the device.
fn open_if(node: &Path, number: DeviceNumber, options: &OpenOptions) -> io::Result<Option<File>> {
    // Without waiting for whatever has the name in its place.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match options.clone().custom_flags(flags).open(node) {
        Err(error) if is_node_of(node, number) => return Err(error),
        Err(_) => return Ok(None),
        Ok(file) => file,
    };
    let found = file.metadata()?;
    let is_device = found.file_type().is_block_device();
    Ok((is_device && DeviceNumber::from_rdev(found.rdev()) == number).then_some(file))
}

fn make(path: &Path, number: DeviceNumber) -> Result<(), Errno> {
    let device = makedev(number.major, number.minor);
    for _ in 0..ATTEMPTS {
        match mknodat(
            CWD,
            path,
            FileType::BlockDevice,
            Mode::RUSR | Mode::WUSR,
            device,
        ) {
            Err(Errno::NOENT) => match DirBuilder::new().mode(0o700).create(OWN) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
                }
                _ => {}
            },
            made => return made,
        }
    }
    Err(Errno::NOENT)
}

fn unmade(name: &str, errno: Errno) -> io::Error {
    let error = io::Error::from(errno);
    let text = format!("/dev has no node for {name}, and none can be made in {OWN}: {error}");
    io::Error::new(error.kind(), text)
}
