//! The kernel's table of mounts.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One line of `/proc/<pid>/mountinfo`, with its escapes decoded. See `proc_pid_mountinfo(5)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's number; it is given to another mount after this one is gone.
    pub id: u64,
    /// The number of the mount below which it is mounted.
    pub parent: u64,
    /// Major and minor number of the device; what `stat` calls `st_dev` for files on it.
    pub device: (u32, u32),
    /// The directory of the filesystem that is the mount's root.
    pub root: PathBuf,
    /// Where it is mounted, as the process sees it.
    pub mount_point: PathBuf,
    /// Options of the mount, separated by commas.
    pub options: OsString,
    /// How mounts spread: `shared:1`, `master:2`, `unbindable`; empty for a private mount.
    pub propagation: Vec<String>,
    /// The filesystem by its kernel name, with its subtype.
    pub filesystem: String,
    /// What was mounted: a device, or whatever the filesystem calls it.
    pub source: OsString,
    /// Options of the filesystem, separated by commas.
    pub super_options: OsString,
}

impl MountInfo {
    /// Whether an option is set, on the mount or on its filesystem: `nodev`, `data=ordered`.
    pub fn has_option(&self, option: &str) -> bool {
        lists(&self.options, option) || lists(&self.super_options, option)
    }

    /// Whether the filesystem takes no writes although the mount is writable: it stopped by itself, or can only be
    /// read. Somebody who remounts it read-only does so to both.
    pub(crate) fn is_stopped(&self) -> bool {
        // The last two are of ext4 since Linux 6.15, which does not show `ro` any more.
        let stopped = ["ro", "emergency_ro", "shutdown"];
        lists(&self.options, "rw")
            && stopped
                .iter()
                .any(|option| lists(&self.super_options, option))
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line
            .split(|byte| *byte == b' ')
            .filter(|field| !field.is_empty());
        let id = number(fields.next()?)?;
        let parent = number(fields.next()?)?;
        let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
        let device = (major.parse().ok()?, minor.parse().ok()?);
        let root = PathBuf::from(unescape(fields.next()?));
        let mount_point = PathBuf::from(unescape(fields.next()?));
        let options = unescape(fields.next()?);
        let optional: Vec<&[u8]> = fields.by_ref().take_while(|field| *field != b"-").collect();
        let propagation = optional
            .iter()
            .map(|field| String::from_utf8_lossy(field).into_owned())
            .collect();
        let filesystem = String::from_utf8_lossy(unescape(fields.next()?).as_bytes()).into_owned();
        // A mount can be made with no source at all, and then the line has two spaces in its place.
        let rest: Vec<&[u8]> = fields.collect();
        let (source, super_options) = match rest[..] {
            [options] => (OsString::new(), unescape(options)),
            [source, options, ..] => (unescape(source), unescape(options)),
            [] => return None,
        };
        Some(MountInfo {
            id,
            parent,
            device,
            root,
            mount_point,
            options,
            propagation,
            filesystem,
            source,
            super_options,
        })
    }
}

fn lists(options: &OsStr, option: &str) -> bool {
    let mut options = options.as_bytes().split(|byte| *byte == b',');
    options.any(|listed| listed == option.as_bytes())
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Decodes the octal escapes of space, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match (byte, after) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => bytes.push(byte),
        }
    }
    OsString::from_vec(bytes)
}

/// Reads a table. Lines that are no mounts are left out.
pub fn parse(table: &[u8]) -> Vec<MountInfo> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(MountInfo::parse)
        .collect()
}

/// The mounts that this process sees, in the kernel's order. Blocks for as long as `/proc` does.
///
/// # Errors
///
/// Those of reading `/proc/self/mountinfo`.
pub fn read() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&table()?))
}

/// The same of the mount with this number alone, which costs less than to parse the whole table.
pub(crate) fn read_one(id: u64) -> io::Result<Option<MountInfo>> {
    Ok(line(&table()?, id))
}

fn line(table: &[u8], id: u64) -> Option<MountInfo> {
    let start = format!("{id} ");
    let mut lines = table.split(|byte| *byte == b'\n');
    MountInfo::parse(lines.find(|line| line.starts_with(start.as_bytes()))?)
}

fn table() -> io::Result<Vec<u8>> {
    /// A hundred mounts fit in it, in bytes. Of a file that does not know its size, the standard library would read a few bytes first.
    const USUAL: usize = 16 << 10;
    let mut table = Vec::with_capacity(USUAL);
    // In a `Take`, the file is not asked for a size that it does not know.
    let mounts = File::open("/proc/self/mountinfo")?;
    mounts.take(u64::MAX).read_to_end(&mut table)?;
    Ok(table)
}

/// The mounts at exactly this path, the lowest first.
pub fn at<'a>(mounts: &'a [MountInfo], path: &Path) -> Vec<&'a MountInfo> {
    let mut found: Vec<&MountInfo> = mounts
        .iter()
        .filter(|mount| mount.mount_point == path)
        .collect();
    // One that is stacked on another has that one as its parent; at most the first has none here.
    let mut sorted = Vec::with_capacity(found.len());
    while !found.is_empty() {
        let is_lowest = |m: &&MountInfo| {
            !found
                .iter()
                .any(|other| other.id == m.parent && other.id != m.id)
        };
        let next = found.iter().position(is_lowest).unwrap_or(0);
        sorted.push(found.swap_remove(next));
    }
    sorted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &[u8] = br"36 35 98:0 /mnt1 /mnt\0402/a\011b\012c\134d\043 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue
22 36 0:21 / /mnt\0402/x rw - tmpfs  rw
not a mount
23 22 0:22 / /mnt\0402/x ro,nodev - fuse.sshfs a\040b ro
";

    #[test]
    fn decodes_each_field() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt 2/a\tb\nc\\d#"));
        assert_eq!(mounts[0].propagation, ["shared:1", "master:2"]);
        assert_eq!(
            (mounts[0].device, mounts[0].root.as_path()),
            ((98, 0), Path::new("/mnt1"))
        );
        assert!(mounts[0].has_option("noatime") && mounts[0].has_option("errors=continue"));
        assert!(!mounts[0].has_option("errors"));
        assert_eq!(
            (mounts[1].source.as_os_str(), &*mounts[1].filesystem),
            (OsStr::new(""), "tmpfs")
        );
        assert_eq!(mounts[2].source, "a b");
    }

    #[test]
    fn one_line_is_that_of_the_whole_number() {
        for mount in parse(TABLE) {
            assert_eq!(line(TABLE, mount.id).as_ref(), Some(&mount));
            assert_eq!(line(TABLE, mount.id / 10), None);
        }
    }

    #[test]
    fn a_path_is_no_string_prefix_and_stacks_are_in_order() {
        let mut mounts = parse(TABLE);
        mounts.reverse();
        let ids: Vec<u64> = at(&mounts, Path::new("/mnt 2/x"))
            .iter()
            .map(|mount| mount.id)
            .collect();
        assert_eq!(ids, [22, 23]);
        assert!(at(&mounts, Path::new("/mnt 2")).is_empty());
    }

    #[test]
    fn reads_the_real_table() {
        let mounts = read().unwrap();
        assert!(
            mounts
                .iter()
                .any(|mount| mount.mount_point == Path::new("/proc"))
        );
        let lines = std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count();
        assert!(
            mounts.len().abs_diff(lines) < 3,
            "{} of {lines} lines",
            mounts.len()
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..TABLE.len()) {
            let mut damaged = TABLE[..cut].to_vec();
            damaged.extend(bytes);
            let mounts = parse(&damaged);
            let _ = at(&mounts, Path::new("/"));
        }
    }
}
