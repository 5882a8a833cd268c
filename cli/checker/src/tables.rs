//! Reading the kernel's tables.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use blockmount_linux::mountinfo::{self, MountInfo};
use walkdir::WalkDir;

use crate::Context;
use crate::protocol::{BlockDevice, DmDevice, MountLine, PmemDevice, Tables};

/// The unit of sizes in sysfs, whatever the blocks of the device are, in bytes.
const SECTOR: u64 = 512;

/// Reads all tables, with the directories below roots. Blocks.
///
/// # Errors
///
/// If one of them cannot be read.
pub fn read(roots: &[PathBuf]) -> io::Result<Tables> {
    let mounts = mountinfo::read().context(|| "cannot read the table of mounts".to_owned())?;
    let disks = names(Path::new("/sys/block"))?;
    let dm = disks.iter().filter(|name| name.starts_with("dm-"));
    let pmem = disks.iter().filter(|name| name.starts_with("pmem"));
    Ok(Tables {
        mounts: mounts.iter().map(mount_line).collect(),
        dm_devices: dm.map(|name| dm_device(name)).collect(),
        pmem_devices: pmem.map(|name| pmem_device(name)).collect(),
        block_devices: disks.iter().map(|name| block_device(name)).collect(),
        scsi_devices: names(Path::new("/sys/bus/scsi/devices"))?
            .into_iter()
            .filter(|name| is_scsi_address(name))
            .collect(),
        directories: directories(roots)?,
    })
}

/// The names in a directory, sorted; none if it is not there.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(|| format!("cannot read {}", directory.display()))?,
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

fn mount_line(mount: &MountInfo) -> MountLine {
    let (major, minor) = mount.device;
    let (own, filesystems) = (&mount.options, &mount.super_options);
    MountLine {
        mount_point: mount.mount_point.to_string_lossy().into_owned(),
        filesystem: mount.filesystem.clone(),
        source: mount.source.to_string_lossy().into_owned(),
        device: format!("{major}:{minor}"),
        options: format!(
            "{},{}",
            own.to_string_lossy(),
            filesystems.to_string_lossy()
        ),
    }
}

/// An attribute of a disk. A device that is going has none any more, and is told as far as it is there.
fn attribute(disk: &str, name: &str) -> Option<String> {
    let text = fs::read(Path::new("/sys/block").join(disk).join(name)).ok()?;
    Some(String::from_utf8_lossy(text.trim_ascii_end()).into_owned())
}

fn block_device(name: &str) -> BlockDevice {
    let parent = fs::canonicalize(Path::new("/sys/block").join(name).join("device"));
    let address = parent.ok().and_then(|parent| {
        let address = parent.file_name()?.to_str()?.to_owned();
        is_scsi_address(&address).then_some(address)
    });
    let sectors: Option<u64> = attribute(name, "size").and_then(|text| text.parse().ok());
    BlockDevice {
        name: name.to_owned(),
        size: sectors.unwrap_or_default().saturating_mul(SECTOR),
        read_only: attribute(name, "ro").is_some_and(|text| text != "0"),
        scsi_address: address,
    }
}

fn dm_device(node: &str) -> DmDevice {
    DmDevice {
        node: node.to_owned(),
        name: attribute(node, "dm/name").unwrap_or_default(),
        uuid: attribute(node, "dm/uuid").unwrap_or_default(),
    }
}

/// A disk on persistent memory is a namespace of a region, which knows the address.
fn pmem_device(name: &str) -> PmemDevice {
    let namespace = fs::canonicalize(Path::new("/sys/block").join(name).join("device"));
    let resource = namespace.ok().and_then(|namespace| {
        let found = namespace
            .ancestors()
            .find_map(|directory| fs::read_to_string(directory.join("resource")).ok())?;
        Some(found.trim_end().to_owned())
    });
    PmemDevice {
        name: name.to_owned(),
        resource,
    }
}

/// `HOST:CHANNEL:TARGET:LUN`; buses, hosts and targets have names of other kinds.
pub fn is_scsi_address(name: &str) -> bool {
    let mut numbers = name.split(':');
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.clone().count() == 4 && numbers.all(is_number)
}

/// The directories below roots that are on the same filesystem as their root.
fn directories(roots: &[PathBuf]) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for root in roots.iter().filter(|root| root.exists()) {
        let walk = WalkDir::new(root).same_file_system(true);
        for entry in walk {
            let entry = match entry {
                // The agent removes directories while they are looked at.
                Err(error) if is_absent(&error) => continue,
                entry => entry.context(|| format!("cannot read {}", root.display()))?,
            };
            if entry.file_type().is_dir() {
                found.push(entry.path().to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn is_absent(error: &walkdir::Error) -> bool {
    error
        .io_error()
        .is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_real_tables() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/file"), "").unwrap();
        let roots = [dir.path().to_owned(), "/absent".into()];
        let tables = read(&roots).unwrap();
        let expected = ["", "/a", "/a/b"].map(|end| format!("{}{end}", dir.path().display()));
        assert_eq!(tables.directories, expected);
        assert!(
            tables
                .mounts
                .iter()
                .any(|mount| mount.mount_point == "/proc")
        );
        let names = fs::read_dir("/sys/block").unwrap().count();
        assert!(tables.block_devices.len().abs_diff(names) < 3);
    }

    #[test]
    fn scsi_addresses_have_four_numbers() {
        assert!(is_scsi_address("12:0:0:255"));
        for name in [
            "host0",
            "target0:0:0",
            "0:0:0",
            "0:0:0:x",
            "0:0::1",
            "0:0:0:0:0",
        ] {
            assert!(!is_scsi_address(name), "{name}");
        }
    }
}
