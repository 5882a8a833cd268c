//! What the kernel's log says about a mount that it refuses. Only ever for messages, and for nothing that is decided.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::printable;
use rustix::fs::OFlags;

use crate::device::number::DeviceNumber;

/// The longest record that the kernel gives (`PRINTK_MESSAGE_MAX`), in bytes.
const LONGEST_RECORD: usize = 2048;
/// More lines than these do not help.
const MOST_LINES: usize = 4;
/// Reading ends after as many records, whatever the kernel goes on to log.
const MOST_RECORDS: usize = 1000;
/// More records than a kernel keeps, whose log has at most some megabytes.
const MOST_KEPT: usize = 100_000;
/// Warnings and what is worse.
const WARNING: u32 = 4;

/// The kernel's log from a moment on. Empty where it cannot be read: it may be for root alone.
#[derive(Debug)]
pub(crate) struct KernelLog(Option<File>);

/// Logs that were read before, for whoever reads next.
static IDLE: Mutex<Vec<File>> = Mutex::new(Vec::new());

fn idle() -> MutexGuard<'static, Vec<File>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for KernelLog {
    fn drop(&mut self) {
        if let Some(log) = self.0.take() {
            idle().push(log);
        }
    }
}

/// Closes the logs that are kept for the next readers: there is none for now.
pub(crate) fn close_idle() {
    let logs = std::mem::take(&mut *idle());
    drop(logs);
}

impl KernelLog {
    pub(crate) fn from_now() -> Self {
        let from_end = |mut log: File| log.seek(SeekFrom::End(0)).map(|_| log);
        let known = idle().pop();
        KernelLog(known.or_else(Self::open).and_then(|log| from_end(log).ok()))
    }

    fn open() -> Option<File> {
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let mut options = File::options();
        options.read(true).custom_flags(flags);
        options.open("/dev/kmsg").ok()
    }

    /// The warnings since then that name the device, or that the driver of the filesystem begins with its name and that name
    /// no other device, for the end of a message. Control characters are escaped: names and labels of an image may be among them.
    pub(crate) fn said(&self, filesystem: &str, source: &Path) -> String {
        let device = DeviceNumber::at(source).ok().and_then(kernel_name);
        let driver = match filesystem {
            "ext2" | "ext3" => "ext",
            other => other,
        };
        let is_about = |line: &str| {
            let names_device = device.as_deref().is_some_and(|name| has_word(line, name));
            names_device || is_from(driver, line)
        };
        let mut lines = self.warnings();
        lines.retain(|line| is_about(line));
        lines.dedup();
        lines.truncate(MOST_LINES);
        match lines.is_empty() {
            true => String::new(),
            false => format!(": the kernel says {}", printable(&lines.join("; "))),
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for_each_record(&self.0, MOST_RECORDS, |record| {
            lines.extend(warning(record));
        });
        lines
    }
}

/// Writes a line to the kernel's log, at the level of information. It is nobody's loss if it is not there.
pub(crate) fn note(text: &str) {
    let open = File::options().write(true).open("/dev/kmsg");
    let line = format!("<6>{}\n", printable(text));
    if let Err(error) = open.and_then(|mut log| log.write_all(line.as_bytes())) {
        tracing::debug!(%error, "cannot write to the kernel's log");
    }
}

/// What the kernel has logged since the last line with a text; nothing if it has no such line any more, or cannot be read.
pub(crate) fn since(text: &str) -> Vec<String> {
    let mut lines = None::<Vec<String>>;
    for_each_record(&KernelLog::open(), MOST_KEPT, |record| {
        let record = String::from_utf8_lossy(record);
        let Some((_, line)) = record.split_once(';') else {
            return;
        };
        if line.contains(text) {
            lines = Some(Vec::new());
        } else if let Some(lines) = &mut lines {
            lines.extend(line.lines().next().map(str::to_owned));
        }
    });
    lines.unwrap_or_default()
}

/// Reads records until there are no more, or so many.
fn for_each_record(log: &Option<File>, most: usize, mut see: impl FnMut(&[u8])) {
    let Some(mut log) = log.as_ref() else {
        return;
    };
    let mut buffer = [0; LONGEST_RECORD];
    for _ in 0..most {
        match log.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => see(&buffer[..length]),
            // The kernel has dropped the oldest records, and goes on with the next.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_nothing_more) => break,
        }
    }
}

/// The text of a record, if it is a warning or worse: `4,1234,567890,-;text`, and lines with fields after it.
fn warning(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (prefix, text) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    let text = text.lines().next()?.trim();
    (priority & 7 <= WARNING && !text.is_empty()).then(|| text.to_owned())
}

/// The name that the kernel has for a device in its log.
pub(crate) fn kernel_name(device: DeviceNumber) -> Option<String> {
    let link = fs::read_link(device.sysfs()).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Whether a line begins with the name of a driver, and not with that of one of its functions (`btrfs_get_tree+0x5/0xb3`),
/// nor with that of one device, as `EXT4-fs (loop1): ` does. Btrfs names whichever of its devices was written last.
fn is_from(driver: &str, line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    // In brackets, before the first colon.
    let names_one_device = || {
        let start = line.split_once("):").map_or("", |(start, _)| start);
        let name = start.split_once('(');
        driver != "btrfs" && name.is_some_and(|(name, _)| !name.contains(':'))
    };
    let rest = line.strip_prefix(driver);
    rest.is_some_and(|rest| !rest.starts_with('_') && !line.contains("+0x") && !names_one_device())
}

fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric();
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u10_warnings_are_told_from_the_rest() {
        let warn = |record: &str| warning(record.as_bytes());
        let text =
            "EXT4-fs (loop3): Couldn't mount because of unsupported optional features (80000)";
        assert_eq!(
            warn(&format!("3,1,2,-;{text}\n SUBSYSTEM=block\n")).as_deref(),
            Some(text)
        );
        assert_eq!(warn("6,1,2,-;loop3: detected capacity change"), None);
        assert_eq!(
            warn("12,1,2,-;a user's own").as_deref(),
            Some("a user's own")
        );
        for damaged in ["", ";", "x,1;text", "3,1,2,-", "3,1,2,-;\n"] {
            assert_eq!(warn(damaged), None, "{damaged:?}");
        }
    }

    #[test]
    fn u10_a_device_is_named_as_a_word() {
        assert!(has_word("XFS (loop3): bad", "loop3") && has_word("dev sda, sector 2", "sda"));
        assert!(!has_word("XFS (loop33): bad", "loop3") && !has_word("xsda", "sda"));
        assert!(
            has_word("loop33 and loop3", "loop3") && has_word("erofs (device dm-0): x", "dm-0")
        );
    }

    #[test]
    fn u10_lines_of_a_driver_are_told_from_those_of_a_trace() {
        assert!(is_from("squashfs", "SQUASHFS error: xz is not supported"));
        assert!(is_from("ext", "ext4: Unknown parameter 'x'"));
        assert!(!is_from("btrfs", "btrfs_get_tree.cold+0xb/0xb3"));
        assert!(!is_from("xfs", "ext4: Unknown parameter 'x'"));
        for of_another in [
            "EXT4-fs (loop1): DAX unsupported by block device.",
            "erofs (device dm-0): unsupported",
            "extfs(loop1): a driver may write it without a space",
        ] {
            assert!(
                !is_from("ext", of_another) && !is_from("erofs", of_another),
                "{of_another}"
            );
        }
        assert!(is_from(
            "btrfs",
            "BTRFS error (device loop1): open_ctree failed"
        ));
        for of_all in [
            "EXT4-fs: Invalid want_extra_isize (of 3): no",
            "EXT4-fs: no (x)",
        ] {
            assert!(is_from("ext", of_all), "{of_all}");
        }
    }
}
