//! What the kernel says is there: mounts, mapped devices and loop devices, to prove that nothing is left.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use blockmount_linux::mapper::{DeviceMapper, Marked};
use blockmount_linux::mountinfo::{self, MountInfo};
use blockmount_loopback::bound_loops;

use crate::failure::{Context, Failure};
use crate::run::OVERLAY;

/// The kernel's tables at one moment.
#[derive(Debug)]
pub(crate) struct Tables {
    mounts: Vec<MountInfo>,
    /// Those that carry a mark; none where they cannot be listed.
    mapped: Vec<Marked>,
    /// Each loop device in use, and the file behind it.
    loops: BTreeMap<String, PathBuf>,
}

/// What would be ours if it were found.
#[derive(Debug, Default)]
pub(crate) struct Ours {
    /// What our overlays, mapped devices and loop devices carry.
    pub(crate) mark: String,
    /// Directories of ours, with all below them.
    pub(crate) directories: Vec<PathBuf>,
    /// Paths at which something of ours was mounted.
    pub(crate) targets: Vec<PathBuf>,
    /// Loop devices that were ours, by kernel name, and the file that was behind each.
    pub(crate) loops: Vec<(String, PathBuf)>,
}

impl Tables {
    /// Reads `/proc/self/mountinfo` and `/sys/block`, and asks the device mapper. Blocks.
    pub(crate) fn read() -> Result<Self, Failure> {
        let mounts = mountinfo::read()
            .context(|| "cannot read the table of mounts".to_owned())
            .map_err(|failure| failure.advise("mount /proc first: mount -t proc proc /proc"))?;
        let mut loops = BTreeMap::new();
        let devices = fs::read_dir("/sys/block")
            .context(|| "cannot read /sys/block".to_owned())
            .map_err(|failure| failure.advise("mount /sys first: mount -t sysfs sysfs /sys"))?;
        for device in devices.flatten() {
            // Devices without a file behind them have no such attribute.
            if let Ok(file) = fs::read(device.path().join("loop/backing_file")) {
                let file = PathBuf::from(OsString::from_vec(file.trim_ascii_end().to_vec()));
                loops.insert(device.file_name().to_string_lossy().into_owned(), file);
            }
        }
        let mapped = DeviceMapper::open().and_then(|mapper| mapper.marked());
        Ok(Tables {
            mounts,
            mapped: mapped.unwrap_or_default(),
            loops,
        })
    }

    /// The mounts, each with its path; of several at a path the topmost comes last.
    pub(crate) fn into_mounts(self) -> impl Iterator<Item = MountInfo> {
        self.mounts.into_iter()
    }

    pub(crate) fn mounts(&self) -> usize {
        self.mounts.len()
    }

    pub(crate) fn loops(&self) -> usize {
        self.loops.len()
    }

    /// What of ours is in these tables or on the disk and was not there `before`, one line each.
    ///
    /// A path or a number that was ours may be another run's by now: `marks` says what each loop device carries.
    pub(crate) fn left_over(
        &self,
        ours: &Ours,
        before: &Tables,
        marks: impl FnOnce() -> BTreeMap<String, String>,
    ) -> Vec<String> {
        let below = |path: &Path| ours.directories.iter().any(|dir| path.starts_with(dir));
        let mounts = self.mounts.iter().filter(|mount| {
            let is_marked = mount.filesystem == OVERLAY && *mount.source == *ours.mark;
            let is_at_target = is_marked && ours.targets.contains(&mount.mount_point);
            (below(&mount.mount_point) || is_at_target) && !before.mounts.contains(mount)
        });
        let mounts = mounts.map(|mount| {
            format!(
                "mount of {} at {}",
                mount.filesystem,
                mount.mount_point.display()
            )
        });
        let mapped = self.mapped.iter().filter(|marked| marked.mark == ours.mark);
        let mapped = mapped.map(|marked| format!("mapped device {}", marked.device.name));
        let loops = self.loops.iter().filter(|(name, file)| {
            let file = without_deleted(file);
            let was_ours = |(ours, was): &(String, PathBuf)| ours == *name && was == file;
            below(file) || ours.loops.iter().any(was_ours)
        });
        let loops: Vec<_> = loops.collect();
        let marks = match loops.is_empty() {
            true => BTreeMap::new(),
            false => marks(),
        };
        let is_anothers = |name: &str| marks.get(name).is_some_and(|mark| *mark != ours.mark);
        let loops = loops.into_iter().filter(|(name, _)| !is_anothers(name));
        let loops = loops.map(|(name, file)| format!("loop device {name} of {}", file.display()));
        let directories = ours
            .directories
            .iter()
            .filter(|path| path.symlink_metadata().is_ok());
        let directories = directories.map(|path| format!("directory {}", path.display()));
        let devices = mapped.chain(loops);
        mounts.chain(devices).chain(directories).collect()
    }
}

/// What each loop device in use carries, by its kernel name; nothing if they cannot be asked. Blocks.
pub(crate) fn loop_marks() -> BTreeMap<String, String> {
    let bound = bound_loops().unwrap_or_default().into_iter();
    bound
        .map(|bound| (format!("loop{}", bound.number()), bound.mark()))
        .collect()
}

/// The kernel appends this to the name of a file that was removed.
fn without_deleted(file: &Path) -> &Path {
    let bytes = file.as_os_str().as_bytes();
    Path::new(OsStr::from_bytes(
        bytes.strip_suffix(b" (deleted)").unwrap_or(bytes),
    ))
}

#[cfg(test)]
mod tests {
    use blockmount_linux::device::DeviceNumber;
    use blockmount_linux::mapper::Mapped;

    use super::*;

    #[test]
    fn r23_finds_what_is_ours_and_nothing_else() {
        let mounts = mountinfo::parse(
            b"1 0 7:1 / /run/blockmount/x/m/0 rw - ext4 /dev/loop1 rw\n\
              2 0 7:2 / /mnt/tree rw - overlay blockmount:x rw\n\
              5 0 7:2 / /mnt/tree rw - overlay blockmount:y rw\n\
              3 0 7:3 / /run/blockmount/xy rw - ext4 /dev/loop3 rw\n\
              4 0 7:4 / /mnt/tree rw - ext4 /dev/sda1 rw\n",
        );
        // Somebody else's, below ours: it was there before.
        let before = Tables {
            mounts: mounts[4..].to_vec(),
            mapped: Vec::new(),
            loops: BTreeMap::new(),
        };
        let loops = [
            ("loop1", "/w/a (deleted)"),
            ("loop2", "/img"),
            ("loop3", "/img"),
            ("loop4", "/wx"),
            ("loop5", "/img"),
        ];
        let loops = loops
            .map(|(name, file)| (name.to_owned(), PathBuf::from(file)))
            .into();
        let ours = Ours {
            mark: "blockmount:x".to_owned(),
            directories: vec!["/run/blockmount/x".into(), "/w".into()],
            targets: vec!["/mnt/tree".into()],
            loops: vec![
                ("loop2".into(), "/img".into()),
                ("loop4".into(), "/img".into()),
                ("loop5".into(), "/img".into()),
            ],
        };
        // The number and the file are those of ours, and the device is another run's by now.
        let marks = || BTreeMap::from([("loop5".to_owned(), "blockmount:y".to_owned())]);
        let marked = |name: &str, mark: &str| Marked {
            device: Mapped {
                name: name.to_owned(),
                number: DeviceNumber {
                    major: 254,
                    minor: 0,
                },
            },
            uuid: String::new(),
            mark: mark.to_owned(),
        };
        let mapped = vec![
            marked("crypt", "blockmount:x"),
            marked("other", "blockmount:xy"),
        ];
        let tables = Tables {
            mounts,
            mapped,
            loops,
        };
        let found = tables.left_over(&ours, &before, marks);
        assert_eq!(
            found,
            [
                "mount of ext4 at /run/blockmount/x/m/0",
                "mount of overlay at /mnt/tree",
                "mapped device crypt",
                "loop device loop1 of /w/a (deleted)",
                "loop device loop2 of /img",
            ]
        );
    }

    #[test]
    fn reads_the_real_tables() {
        let tables = Tables::read().unwrap();
        let proc = Path::new("/proc");
        assert!(tables.into_mounts().any(|mount| mount.mount_point == proc));
    }
}
