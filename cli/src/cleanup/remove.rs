//! Removing what is left, in the order in which it stands on each other.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use blockmount_linux::mapper::{DeviceMapper, Marked};
use blockmount_linux::mountinfo::MountInfo;
use blockmount_loopback::BoundLoop;
use blockmount_qemu::Vm;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::report::{Item, Outcome, What};
use super::scan::{Dead, Found};
use crate::failure::Failure;
use crate::guest::kept_vm;
use crate::interrupt::Stop;
use crate::run::remove_empty;

/// How long all mounts together are waited for, in case their user is on the way out.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the mapped devices of one run are waited for: who looks at a device that has changed opens it for a moment.
const MAPPED_TIMEOUT: Duration = Duration::from_millis(500);
/// How long one loop device is waited for.
const LOOP_TIMEOUT: Duration = Duration::from_millis(500);
/// As many users of a mount as a table can hold.
const USERS: usize = 4;

/// Says what would be removed, in the order of the removal, after what is in virtual machines of others.
pub(crate) fn show(found: &Found, in_machines: Vec<Item>) -> Vec<Item> {
    let mut items = in_machines;
    items.extend(kept(found));
    for dead in &found.dead {
        let machine = kept_vm(&dead.paths.work);
        items.extend(machine.map(|at| Item::new(dead, What::Machine, &at, Outcome::Found)));
        items.extend(foreign(dead));
        let mounts = dead
            .mounts
            .iter()
            .rev()
            .map(|mount| Item::mount(dead, mount, Outcome::Found));
        items.extend(mounts);
        let mapped = dead.mapped.iter();
        items.extend(mapped.map(|marked| Item::mapped(dead, marked, Outcome::Found)));
        items.extend(
            dead.loops
                .iter()
                .map(|bound| Item::of_loop(dead, bound, Outcome::Found)),
        );
        let directories = dead.directories.iter().rev();
        items
            .extend(directories.map(|path| Item::new(dead, What::Directory, path, Outcome::Found)));
        let paths = [&dead.paths.work, &dead.paths.dir]
            .into_iter()
            .filter(|path| path.exists());
        items.extend(paths.map(|path| Item::new(dead, What::Files, path, Outcome::Found)));
    }
    items
}

/// Removes all of it that is not in use, after what was in virtual machines of others: a run that has left something there stays. A
/// signal ends it between two steps.
pub(crate) fn remove(
    found: &Found,
    in_machines: Vec<Item>,
    stop: &Stop,
) -> Result<Vec<Item>, Failure> {
    let mut items = in_machines;
    items.extend(kept(found));
    items.extend(found.dead.iter().flat_map(foreign));
    let deadline = Instant::now() + DEFAULT_TIMEOUT;
    for dead in &found.dead {
        if let Some(directory) = kept_vm(&dead.paths.work) {
            stop.check()?;
            Vm::kill_in(&directory);
            items.push(Item::new(dead, What::Machine, &directory, Outcome::Removed));
        }
    }
    for (dead, mount) in latest_first(found) {
        stop.check()?;
        items.push(Item::mount(
            dead,
            mount,
            outcome(unmount_exactly(mount, deadline)),
        ));
    }
    for dead in &found.dead {
        // What is still mounted keeps its device for as long; others may close it in a moment.
        let is_mounted = items.iter().any(|item| item.is_left_of(dead));
        let unless_mounted = |timeout| if is_mounted { Duration::ZERO } else { timeout };
        stop.check()?;
        let removed = remove_mapped(&dead.mapped, unless_mounted(MAPPED_TIMEOUT));
        items.extend(
            removed
                .into_iter()
                .map(|(marked, result)| Item::mapped(dead, marked, outcome(result))),
        );
        let timeout = unless_mounted(LOOP_TIMEOUT);
        for bound in &dead.loops {
            stop.check()?;
            let result = bound.unbind(timeout).map_err(|error| error.to_string());
            items.push(Item::of_loop(dead, bound, outcome(result)));
        }
        stop.check()?;
        let stays = items.iter().any(|item| item.is_left_of(dead));
        remove_files(dead, stays, &mut items);
    }
    Ok(items)
}

/// What stays, whether it is in use or not.
fn kept(found: &Found) -> Vec<Item> {
    let lost = found.lost.iter().map(|(run, why)| {
        let why = format!("{why}; with all that was written: blockmount cleanup --resumable");
        Item::new(run, What::Files, &run.paths.work, Outcome::Left(why))
    });
    let doubtful = found.doubtful.iter().map(|(run, why)| {
        let why = format!("cannot tell whether its run is alive: {why}");
        Item::new(run, What::Files, &run.paths.dir, Outcome::Left(why))
    });
    let unknown = found.unknown.iter().flat_map(unknown);
    unknown.chain(lost).chain(doubtful).collect()
}

/// What is not ours to remove, and is in the way.
fn foreign(dead: &Dead) -> impl Iterator<Item = Item> {
    const WHY: &str = "it is not of a run of blockmount; whoever made it has to remove it";
    each(dead, &dead.foreign_mounts, &[], &dead.foreign_loops, || {
        Outcome::Left(WHY.to_owned())
    })
}

/// What is a run's that may be alive elsewhere.
fn unknown(run: &Dead) -> impl Iterator<Item = Item> {
    const WHY: &str = "/run/blockmount here does not know its run, which may be alive in another container: run \
                       \"blockmount cleanup\" where it was started";
    each(run, &run.mounts, &run.mapped, &run.loops, || {
        Outcome::Elsewhere(WHY.to_owned())
    })
}

fn each<'a>(
    dead: &'a Dead,
    mounts: &'a [MountInfo],
    mapped: &'a [Marked],
    loops: &'a [BoundLoop],
    outcome: fn() -> Outcome,
) -> impl Iterator<Item = Item> + 'a {
    let mounts = mounts.iter();
    let mounts = mounts.map(move |mount| Item::mount(dead, mount, outcome()));
    let mapped = mapped.iter();
    let mapped = mapped.map(move |marked| Item::mapped(dead, marked, outcome()));
    let loops = loops.iter();
    let loops = loops.map(move |bound| Item::of_loop(dead, bound, outcome()));
    mounts.chain(mapped).chain(loops)
}

/// All mounts, the latest first: nothing is below what is unmounted.
fn latest_first(found: &Found) -> Vec<(&Dead, &MountInfo)> {
    let of_run = |dead| move |mount| (dead, mount);
    let mut mounts: Vec<(&Dead, &MountInfo)> = found
        .dead
        .iter()
        .flat_map(|dead| dead.mounts.iter().map(of_run(dead)))
        .collect();
    mounts.reverse();
    mounts
}

fn outcome(result: Result<(), String>) -> Outcome {
    match result {
        Ok(()) => Outcome::Removed,
        Err(reason) => Outcome::Left(reason),
    }
}

/// Unmounts this mount and no other, waiting until the deadline for those who use it.
fn unmount_exactly(mount: &MountInfo, deadline: Instant) -> Result<(), String> {
    // The directory is opened once, without following links: what its path leads to may be exchanged meanwhile.
    let (parent, name) = match parent_of(&mount.mount_point) {
        Ok(opened) => opened,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(errno) => return Err(format!("cannot look at it: {errno}")),
    };
    let opened = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
    let target = &opened.join(name);
    loop {
        match mount_at(target) {
            Ok(Some(id)) if id == mount.id => {}
            Ok(Some(_)) if is_mounted(mount) => {
                if Instant::now() >= deadline {
                    return Err(format!("it is in use{}", users(mount)));
                }
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            // Whoever has shown an image there is gone.
            Err(Errno::NOTCONN) if is_mounted(mount) => {}
            Err(errno) => return Err(format!("cannot look at it: {errno}")),
        }
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            // Gone in the meantime: the next look will say.
            Err(Errno::INVAL) if !is_mounted(mount) => return Ok(()),
            // There is no event for the end of a use.
            Err(Errno::BUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::BUSY) => return Err(format!("it is in use{}", users(mount))),
            Err(errno) => return Err(format!("cannot unmount it: {errno}")),
        }
    }
}

/// Removes the mapped devices of a run, each once nothing stands on it any more, waiting for those who use one.
fn remove_mapped(devices: &[Marked], timeout: Duration) -> Vec<(&Marked, Result<(), String>)> {
    if devices.is_empty() {
        return Vec::new();
    }
    let deadline = Instant::now() + timeout;
    let mapper = match DeviceMapper::open() {
        Ok(mapper) => mapper,
        Err(error) => {
            let failed = |device| (device, Err(error.to_string()));
            return devices.iter().map(failed).collect();
        }
    };
    let (mut done, mut left) = (Vec::new(), devices.iter().collect::<Vec<_>>());
    loop {
        let before = left.len();
        let mut failed = Vec::new();
        left.retain(|device| match mapper.remove_uuid(&device.uuid) {
            Ok(_) => {
                done.push((*device, Ok(())));
                false
            }
            Err(error) => {
                failed.push((*device, Err(error.to_string())));
                true
            }
        });
        if left.is_empty() || left.len() == before && Instant::now() >= deadline {
            done.extend(failed);
            return done;
        }
        if left.len() == before {
            // There is no event for the end of a use.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The directory that a mount point is in, and its name there.
fn parent_of(mount_point: &Path) -> rustix::io::Result<(OwnedFd, &OsStr)> {
    let (Some(parent), Some(name)) = (mount_point.parent(), mount_point.file_name()) else {
        return Err(Errno::INVAL);
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok((openat2(CWD, parent, flags, Mode::empty(), resolve)?, name))
}

/// The id of the mount that a path leads to.
fn mount_at(path: &Path) -> rustix::io::Result<Option<u64>> {
    let status = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID)?;
    let known = status.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    Ok(known.then_some(status.stx_mnt_id))
}

fn is_mounted(mount: &MountInfo) -> bool {
    let mounts = blockmount_linux::mountinfo::read().unwrap_or_default();
    mounts
        .iter()
        .any(|other| (other.id, &other.mount_point) == (mount.id, &mount.mount_point))
}

/// Who uses a mount, for the message.
fn users(mount: &MountInfo) -> String {
    let mounts = blockmount_linux::mountinfo::read().unwrap_or_default();
    let above = mounts.iter().filter(|other| other.parent == mount.id);
    let above = above.map(|other| format!("the mount at {}", other.mount_point.display()));
    let users: Vec<String> = above
        .chain(processes_in(&mount.mount_point))
        .take(USERS)
        .collect();
    match users.is_empty() {
        true => String::new(),
        false => format!(" by {}", users.join(", ")),
    }
}

/// The processes that use what is below a directory, for the message.
fn processes_in(directory: &Path) -> impl Iterator<Item = String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes
        .map(|entry| entry.path())
        .filter(|path| uses(path, directory));
    processes.filter_map(|path| {
        let name = fs::read_to_string(path.join("comm")).ok()?;
        Some(format!(
            "process {} ({})",
            path.file_name()?.to_str()?,
            name.trim_end()
        ))
    })
}

/// Waits until no process uses the image files of a run, or says who does: a virtual machine of which nothing else is
/// known any more.
fn wait_until_unused(dead: &Dead, deadline: Instant) -> Result<(), String> {
    loop {
        let users: Vec<String> = processes_in(&dead.paths.work).take(USERS).collect();
        match users.is_empty() {
            true => return Ok(()),
            false if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            false => return Err(format!("it is in use by {}; end it", users.join(", "))),
        }
    }
}

/// Whether a process works in, runs from or has open what is below a mount point.
fn uses(process: &Path, mount_point: &Path) -> bool {
    let leads_below = |link: &Path| fs::read_link(link).is_ok_and(|to| to.starts_with(mount_point));
    let descriptors = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    ["cwd", "root", "exe"]
        .iter()
        .any(|name| leads_below(&process.join(name)))
        || descriptors
            .map(|entry| entry.path())
            .any(|link| leads_below(&link))
}

/// Removes the directories and files of a run of which nothing is mounted or bound any more.
fn remove_files(dead: &Dead, stays: bool, items: &mut Vec<Item>) {
    for path in dead.directories.iter().rev() {
        let result = match remove_empty(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(describe(&error)),
            _ => Ok(()),
        };
        items.push(Item::new(dead, What::Directory, path, outcome(result)));
    }
    let there = [&dead.paths.work, &dead.paths.dir]
        .into_iter()
        .filter(|path| path.exists());
    let there: Vec<_> = there.collect();
    if there.is_empty() {
        return;
    }
    let removed = match stays {
        true => Err("what is still there needs it".to_owned()),
        false => remove_paths(dead, items.iter().any(|item| item.is_left_of(dead))),
    };
    for path in there {
        // The work may be gone although the rest is not.
        let result = if path.exists() {
            removed.clone()
        } else {
            Ok(())
        };
        items.push(Item::new(dead, What::Files, path, outcome(result)));
    }
}

/// Removes the image files of a run, and its record unless directories are left that only the record knows.
fn remove_paths(dead: &Dead, directories_left: bool) -> Result<(), String> {
    if dead.paths.is_named() {
        wait_until_unused(dead, Instant::now() + DEFAULT_TIMEOUT)?;
    }
    let removed = match directories_left {
        true => dead.paths.remove_images(),
        false => dead.paths.remove(),
    };
    removed.map_err(|failure| failure.to_string().replace('\n', ";"))?;
    match directories_left {
        true => Err("it is the record of the directories that are left".to_owned()),
        false => Ok(()),
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::DirectoryNotEmpty => "it is not empty".to_owned(),
        io::ErrorKind::ResourceBusy => "something is mounted there".to_owned(),
        _ => error.to_string(),
    }
}
