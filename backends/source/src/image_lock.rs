//! The locks by which QEMU keeps programs from using one image file at once when one of them writes to it.
//!
//! A user of an image holds shared locks on single bytes of the file: one for each thing that it does with the image, and
//! one for each thing that nobody else may do meanwhile. Then it looks whether another holds the opposite. (Source: QEMU,
//! `block/file-posix.c`, `raw_apply_lock_bytes` and `raw_check_lock_bytes`)
//!
//! The locks belong to the open file (`F_OFD_SETLK`) and not to the process, so they last as long as anybody has it open, which may be
//! QEMU or a loop device.
#![allow(unsafe_code)] // rustix has no locks of open files; the reason is at the call

use std::fs::{self, File};
use std::io;
use std::mem;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use blockmount::{BackendError, printable};
use rustix::io::Errno;

/// A byte for each thing that its holder does, and one for each that it does not share.
const DOES: i64 = 100;
const KEEPS_OTHERS_FROM: i64 = 200;

/// Things to do with an image, by their bytes after [`DOES`] and [`KEEPS_OTHERS_FROM`] (`BLK_PERM_*`). Byte 2, to write
/// what is there already, is left to QEMU.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Longer lists of holders do not help.
const MOST_NAMED: usize = 8;

/// What a user of an image does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads, beside others that read.
    Read,
    /// It reads, writes, and makes the image longer; others can only read what they know may change.
    Write,
}

impl Access {
    fn does(self) -> &'static [i64] {
        match self {
            Access::Read => &[READ],
            Access::Write => &[READ, WRITE, RESIZE],
        }
    }

    fn keeps_others_from(self) -> &'static [i64] {
        match self {
            Access::Read => &[WRITE],
            Access::Write => &[WRITE, RESIZE],
        }
    }
}

/// How long is worth to wait for a lock: a process that was just started has copies of all descriptors until its program
/// runs.
pub const MOMENT: Duration = Duration::from_secs(2);

/// Locks an open image as QEMU does, and says whether it may be used so, at the latest after `timeout`. Either way the locks
/// are there until the last descriptor of the open file is closed. Where the filesystem or the system has no such locks, it
/// may be used. Blocks.
pub fn lock(image: &File, access: Access, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let locked = try_lock(image, access).unwrap_or_else(|error| {
            // Otherwise somebody has all of the file for itself, by the locks of POSIX.
            Errno::from_io_error(&error) != Some(Errno::AGAIN)
        });
        if locked || Instant::now() >= deadline {
            return locked;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn try_lock(image: &File, access: Access) -> io::Result<bool> {
    let (does, keeps) = (access.does(), access.keeps_others_from());
    // First both, so that of two that lock at once at least one finds the other.
    for thing in does {
        share(image, DOES + thing)?;
    }
    for thing in keeps {
        share(image, KEEPS_OTHERS_FROM + thing)?;
    }
    // Mostly nobody has any of them, which is one question.
    let all = DOES + WRITE..=KEEPS_OTHERS_FROM + does.last().unwrap_or(&READ);
    if !is_held_by_another(image, all)? {
        return Ok(true);
    }
    for thing in does {
        if is_held_by_another(image, one(KEEPS_OTHERS_FROM + thing))? {
            return Ok(false);
        }
    }
    for thing in keeps {
        if is_held_by_another(image, one(DOES + thing))? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn one(byte: i64) -> RangeInclusive<i64> {
    byte..=byte
}

/// Takes a shared lock on a byte.
#[cfg(target_os = "linux")]
fn share(image: &File, byte: i64) -> io::Result<()> {
    call(image, libc::F_OFD_SETLK, libc::F_RDLCK, one(byte)).map(drop)
}

/// Whether another open file has a lock on any of these bytes.
#[cfg(target_os = "linux")]
fn is_held_by_another(image: &File, bytes: RangeInclusive<i64>) -> io::Result<bool> {
    let found = call(image, libc::F_OFD_GETLK, libc::F_WRLCK, bytes)?;
    Ok(found.l_type != libc::F_UNLCK as libc::c_short)
}

/// Only Linux has locks of open files.
#[cfg(not(target_os = "linux"))]
fn share(_: &File, _: i64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn is_held_by_another(_: &File, _: RangeInclusive<i64>) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(target_os = "linux")]
fn call(
    image: &File,
    command: libc::c_int,
    kind: libc::c_int,
    bytes: RangeInclusive<i64>,
) -> io::Result<libc::flock> {
    // SAFETY: a structure of integers, for which zero is a value; the process must be 0.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = *bytes.start() as libc::off_t;
    lock.l_len = (bytes.end() - bytes.start() + 1) as libc::off_t;
    // SAFETY: both commands take a `flock`, which is read or filled during the call.
    match unsafe { libc::fcntl(image.as_raw_fd(), command, &raw mut lock) } {
        0 => Ok(lock),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The error `Conflict` for an image at a path that [`lock`] refuses, or QEMU.
pub fn in_use(path: &Path, holders: &[String]) -> BackendError {
    let holders = match holders {
        [] => "somebody who cannot be seen from here".to_owned(),
        named => named.join(", "),
    };
    BackendError::conflict(format!(
        "{} is in use by {holders}, and an image that anybody writes to is not shared; detach it there first",
        path.display()
    ))
}

/// Who holds locks of these on an image, at a path, for a message: processes and loop devices, as far as they can be seen.
/// The descriptor that is given does not count. Blocks.
pub fn holders(image: &File, path: &Path) -> Vec<String> {
    let Ok(metadata) = image.metadata() else {
        return Vec::new();
    };
    let own = format!("self/fdinfo/{}", image.as_raw_fd());
    let own = fs::canonicalize(Path::new("/proc").join(own)).unwrap_or_default();
    // The kernel's text is read, and nothing is opened or followed that could block.
    let holds = |descriptor: &PathBuf| {
        let text = fs::read_to_string(descriptor).unwrap_or_default();
        *descriptor != own && text.lines().any(|line| is_lock_of(line, metadata.ino()))
    };
    let mut found = Vec::new();
    for (process, directory) in numbered(Path::new("/proc")) {
        let descriptors = numbered(&directory.join("fdinfo"));
        if descriptors.map(|(_, path)| path).any(|path| holds(&path)) {
            let name = fs::read(directory.join("comm")).unwrap_or_default();
            let name = String::from_utf8_lossy(&name);
            let name = printable(name.trim_end());
            found.push(format!("process {process} ({name})"));
        }
    }
    found.extend(loop_devices_of(path));
    found.truncate(MOST_NAMED);
    found
}

/// The loop devices that have the file at a path.
fn loop_devices_of(path: &Path) -> Vec<String> {
    let Ok(path) = path.canonicalize() else {
        return Vec::new();
    };
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let has_it = |device: &PathBuf| {
        let file = fs::read_to_string(device.join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim_end_matches('\n')) == path)
    };
    devices
        .map(|device| device.path())
        .filter(has_it)
        .filter_map(|device| Some(format!("/dev/{}", device.file_name()?.to_str()?)))
        .collect()
}

/// The entries of a directory whose names are numbers.
fn numbered(directory: &Path) -> impl Iterator<Item = (u32, PathBuf)> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Whether a line of what the kernel says of a descriptor is about one of these locks on a file:
/// `lock: 1: OFDLCK ADVISORY   READ -1 fe:00:10183014 100 101`. The device in it is not always the one of `stat`.
fn is_lock_of(line: &str, inode: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else {
        return false;
    };
    let words: Vec<&str> = lock.split_ascii_whitespace().collect();
    let [.., kind, _, _, _, file, first, last] = words[..] else {
        return false;
    };
    let number = |word: &str| match word {
        "EOF" => Some(i64::MAX),
        _ => word.parse().ok(),
    };
    let (Some(first), Some(last)) = (number(first), number(last)) else {
        return false;
    };
    let of_file = file.rsplit(':').next() == Some(&inode.to_string());
    let covers = |base: i64| first <= base + RESIZE && base + READ <= last;
    matches!(kind, "OFDLCK" | "POSIX") && of_file && (covers(DOES) || covers(KEEPS_OTHERS_FROM))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(image: &File, access: Access) -> bool {
        super::lock(image, access, Duration::ZERO)
    }

    #[test]
    fn readers_share_an_image_and_a_writer_has_it_alone() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = fs::OpenOptions::new();
            options.read(true).write(true).open(image.path()).unwrap()
        };
        use Access::{Read, Write};
        for (first, second, is_shared) in [
            (Read, Read, true),
            (Read, Write, false),
            (Write, Read, false),
            (Write, Write, false),
        ] {
            let (held, other) = (open(), open());
            assert!(lock(&held, first));
            assert_eq!(lock(&other, second), is_shared, "{first:?}, {second:?}");
            let ours = format!("process {} (", std::process::id());
            let named = holders(&other, image.path());
            assert!(
                matches!(&named[..], [one] if one.starts_with(&ours)),
                "{named:?}"
            );
            // Another descriptor of the open file keeps the locks.
            let copy = held.try_clone().unwrap();
            drop((held, other));
            assert_eq!(lock(&open(), second), is_shared);
            drop(copy);
            assert!(lock(&open(), second));
        }
        assert_eq!(holders(&open(), image.path()), [""; 0]);
        // What belongs to the whole file is of the same bytes.
        let exclusive = open();
        call(&exclusive, libc::F_OFD_SETLK, libc::F_WRLCK, 0..=999).unwrap();
        assert!(!lock(&open(), Read));
        // As on a filesystem without locks.
        let unlocked = fs::OpenOptions::new().write(true).open(image.path());
        assert!(lock(&unlocked.unwrap(), Write));
    }

    /// What QEMU 7.2 has locked, read from its `/proc/PID/fdinfo`.
    #[test]
    fn the_locks_of_qemu_are_told_from_others() {
        let lock = |kind: &str, bytes: &str| format!("lock:\t2: {kind} fe:00:10183012 {bytes}");
        let qemu = "OFDLCK ADVISORY  READ -1";
        for bytes in ["100 101", "103 103", "201 201", "0 EOF"] {
            assert!(is_lock_of(&lock(qemu, bytes), 10_183_012), "{bytes}");
        }
        assert!(!is_lock_of(&lock(qemu, "100 101"), 183_012));
        assert!(!is_lock_of(&lock(qemu, "104 199"), 10_183_012));
        assert!(!is_lock_of(
            &lock("FLOCK  ADVISORY  WRITE 7", "0 EOF"),
            10_183_012
        ));
        assert!(!is_lock_of("ino:\t10183012", 10_183_012));
        assert!(!is_lock_of("lock:\t", 10_183_012));
    }
}
