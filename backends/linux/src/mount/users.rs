//! Who uses a device or a mount: only ever for messages, and for nothing that is decided.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use blockmount::printable;
use rustix::fs::{CWD, Mode, OFlags, RawDir, openat};

use crate::device::number::DeviceNumber;
use crate::device::partitions::partitions;
use crate::mount::mountinfo::{self, MountInfo};

/// Longer lists do not help.
const MOST_NAMED: usize = 8;

/// Users as a message names them.
pub(crate) fn listed(users: &[String]) -> String {
    match users {
        [] => "somebody who cannot be seen from here".to_owned(),
        users => users.join(", "),
    }
}

/// Who uses the device behind a node: who the kernel's tables name, or else who may.
pub(crate) fn of_device_at(path: &Path) -> Vec<String> {
    let named = named(path);
    if named.is_empty() { guessed() } else { named }
}

/// Who uses the device behind a node, as far as the kernel's tables tell: mounts in
/// whatever mount namespace, stacked devices, swap.
pub(crate) fn named(path: &Path) -> Vec<String> {
    let Ok(disk) = DeviceNumber::at(path) else {
        return Vec::new();
    };
    let numbers = with_partitions(disk);
    let mut found: Vec<String> = numbers.iter().flat_map(|number| holders(*number)).collect();
    let used = |mount: &MountInfo, _: &Path| {
        let (major, minor) = mount.device;
        numbers.contains(&DeviceNumber { major, minor })
    };
    found.extend(mounts_everywhere(used));
    found.extend(swap_on(path).then(|| "swap".to_owned()));
    found.truncate(MOST_NAMED);
    found
}

/// Who may use a device without being in a table that names it.
pub(crate) fn guessed() -> Vec<String> {
    let overlays = mounts_everywhere(is_overlay_of_gone_layers).into_iter();
    overlays
        .map(|at| format!("perhaps an overlay that has it as a layer: {at}"))
        .take(MOST_NAMED)
        .collect()
}

/// A disk and its partitions.
fn with_partitions(disk: DeviceNumber) -> Vec<DeviceNumber> {
    let sysfs = disk.sysfs();
    // The kernel's name for a partition begins with its name for the disk, and for each other attribute of a disk there would
    // be a system call.
    let kernel_name = fs::read_link(&sysfs).unwrap_or_default();
    let kernel_name = kernel_name.file_name().unwrap_or_default().as_bytes();
    let below = fs::read_dir(&sysfs).into_iter().flatten().flatten();
    let partitions = below
        .filter(|entry| entry.file_name().as_bytes().starts_with(kernel_name))
        .map(|entry| entry.path())
        .filter(|below| below.join("partition").exists())
        .filter_map(|below| fs::read_to_string(below.join("dev")).ok()?.parse().ok());
    std::iter::once(disk).chain(partitions).collect()
}

/// The devices stacked on a device, by the kernel's names.
fn holders(device: DeviceNumber) -> Vec<String> {
    let entries = fs::read_dir(device.sysfs().join("holders"));
    let entries = entries.into_iter().flatten().flatten();
    entries
        .map(|entry| format!("device {}", entry.file_name().to_string_lossy()))
        .collect()
}

/// Whether devices are stacked on a device. One on a partition holds the partition, and with that its disk.
pub(crate) fn has_holders(device: DeviceNumber) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = openat(CWD, device.sysfs().join("holders"), flags, Mode::empty()) else {
        return false;
    };
    // Room for more names than one: the first read has them all, or some.
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return true;
        }
        if entries.is_buffer_empty() {
            break;
        }
    }
    false
}

/// The processes that have a disk or one of its partitions open, by the names of their
/// descriptors. A single one of our own does not count: it is the one that we are about to close.
pub(crate) fn openers_of(path: &Path) -> Vec<String> {
    let mut nodes = vec![path.to_owned()];
    let partitions = DeviceNumber::at(path).and_then(partitions);
    nodes.extend(partitions.unwrap_or_default().into_values());
    let opens = |directory: &Path| {
        let descriptors = fs::read_dir(directory.join("fd"));
        let descriptors = descriptors.into_iter().flatten().flatten();
        let targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
        targets.filter(|target| nodes.contains(target)).count()
    };
    processes()
        .filter(|(pid, directory)| opens(directory) > usize::from(*pid == std::process::id()))
        .map(|(pid, directory)| format!("process {pid} ({})", command(&directory)))
        .take(MOST_NAMED)
        .collect()
}

/// Whether a mount is an overlay of which a layer is no longer where it was. It keeps the layer's filesystem alive, which
/// no table shows any more: a bind mount of an overlay, or a copy of it in another mount namespace.
fn is_overlay_of_gone_layers(mount: &MountInfo, process: &Path) -> bool {
    let options = mount.super_options.to_string_lossy();
    let layers = options.split(',').filter_map(|option| {
        let (name, paths) = option.split_once('=')?;
        matches!(name, "lowerdir" | "lowerdir+" | "upperdir").then_some(paths)
    });
    let is_gone = |layer: &str| match layer.strip_prefix('/') {
        Some(below) => {
            let mut files = fs::read_dir(process.join("root").join(below))
                .into_iter()
                .flatten();
            files.next().is_none()
        }
        // The number of a descriptor of who made it.
        None => true,
    };
    mount.filesystem == "overlay" && layers.flat_map(|paths| paths.split(':')).any(is_gone)
}

/// The mounts that fit, in every mount namespace that a process is in. What decides is given the process's directory in
/// `/proc` as well.
fn mounts_everywhere(fits: impl Fn(&MountInfo, &Path) -> bool) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    for (pid, directory) in processes() {
        let namespace = fs::read_link(directory.join("ns/mnt")).ok();
        if namespace.is_some() && !seen.insert(namespace.clone()) {
            continue;
        }
        let table = fs::read(directory.join("mountinfo")).unwrap_or_default();
        let mounts = mountinfo::parse(&table);
        for mount in mounts.iter().filter(|mount| fits(mount, &directory)) {
            let elsewhere = match &namespace {
                namespace if *namespace == own => String::new(),
                namespace => format!(
                    " in mount namespace{} of process {pid} ({})",
                    namespace.as_deref().map_or(String::new(), number_of),
                    command(&directory)
                ),
            };
            found.push(format!(
                "the mount at {}{elsewhere}",
                mount.mount_point.display()
            ));
        }
    }
    found
}

/// The number of a namespace, as tools name it: of `mnt:[4026532345]`.
fn number_of(namespace: &Path) -> String {
    let name = namespace.to_string_lossy();
    let number = name.trim_start_matches("mnt:[").trim_end_matches(']');
    format!(" {number}")
}

fn swap_on(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let mut nodes = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').next());
    nodes.any(|node| node == path.as_os_str().as_bytes())
}

/// A mount, and all that it stands on.
fn below(mounts: &[MountInfo], id: u64) -> BTreeSet<u64> {
    let mut below = BTreeSet::new();
    let mut next = Some(id);
    // The table was read in pieces while it changed; a circle must not hold us.
    while let Some(id) = next.filter(|id| below.insert(*id)) {
        let mount = mounts.iter().find(|mount| mount.id == id);
        next = mount.map(|mount| mount.parent);
    }
    below
}

/// Who keeps a mount from being unmounted: mounts on it or over it, and processes with files, programs
/// or directories on it.
pub(crate) fn of_mount(target: &Path, id: u64) -> Vec<String> {
    let mounts = mountinfo::read().unwrap_or_default();
    let below = below(&mounts, id);
    let is_above = |mount: &&MountInfo| {
        let covers = target.starts_with(&mount.mount_point) && !below.contains(&mount.id);
        mount.parent == id || covers
    };
    let above = mounts.iter().filter(is_above);
    let mut found: Vec<String> = above
        .map(|mount| format!("the mount at {}", mount.mount_point.display()))
        .collect();
    found.truncate(MOST_NAMED);
    for (pid, directory) in processes() {
        if found.len() >= MOST_NAMED {
            break;
        }
        if uses(&directory, target, id) {
            found.push(format!("process {pid} ({})", command(&directory)));
        }
    }
    found
}

/// Whether a process has something on the mount. Nothing is opened or followed there, so that a
/// dead filesystem cannot hold us up.
fn uses(process: &Path, target: &Path, id: u64) -> bool {
    let below =
        |link: &str| fs::read_link(process.join(link)).is_ok_and(|at| at.starts_with(target));
    let open = || {
        let wanted = format!("mnt_id:\t{id}");
        let fds = fs::read_dir(process.join("fdinfo"))
            .into_iter()
            .flatten()
            .flatten();
        fds.filter_map(|fd| fs::read_to_string(fd.path()).ok())
            .any(|info| info.lines().any(|line| line == wanted))
    };
    below("cwd") || below("root") || below("exe") || open() || maps_from(process, target)
}

fn maps_from(process: &Path, target: &Path) -> bool {
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    maps.split(|byte| *byte == b'\n').any(|line| {
        let path = line
            .iter()
            .position(|byte| *byte == b'/')
            .map(|at| OsStr::from_bytes(&line[at..]));
        path.is_some_and(|path| Path::new(path).starts_with(target))
    })
}

fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

fn command(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    printable(String::from_utf8_lossy(&name).trim_end()).to_string()
}
