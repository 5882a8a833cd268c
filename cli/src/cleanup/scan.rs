//! What runs have left that are no longer alive.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use blockmount::{ErrorKind, HolderName};
use blockmount_linux::mapper::{DeviceMapper, Marked};
use blockmount_linux::mountinfo::{self, MountInfo};
use blockmount_loopback::{BoundLoop, bound_loops};
use rustix::fs::FlockOperation;
use serde::Serialize;

use crate::failure::{Context, Failure};
use crate::guest::kept_vm;
use crate::run::{self, Entry, Kept, OVERLAY, Orphan, RunPaths};

/// What the filesystem of an image that was shown as a raw file is called.
const FUSE: &str = "fuse";

/// Which mounts of ended runs with a name are to be removed, with all that was written to them.
#[derive(Debug, Clone)]
pub(crate) enum Unwanted {
    Nothing,
    Named(HolderName),
    All,
}

impl Unwanted {
    fn has(&self, paths: &RunPaths) -> bool {
        match self {
            Unwanted::Nothing => false,
            Unwanted::Named(name) => paths
                .remembered()
                .is_some_and(|found| found.is_called(name)),
            Unwanted::All => true,
        }
    }

    fn has_all(&self) -> bool {
        matches!(self, Unwanted::All)
    }
}

/// What is there.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) dead: Vec<Dead>,
    /// Runs that are alive.
    pub(crate) living: Vec<Living>,
    /// Runs that have ended, and are kept because they can be resumed.
    pub(crate) resumable: Vec<Resumable>,
    /// Runs that have ended and cannot be resumed, and why they are kept for their scratch.
    pub(crate) lost: Vec<(Dead, String)>,
    /// What carries the mark of a run that the directory of runs does not know: it may be alive where another directory
    /// is, such as outside of this container.
    pub(crate) unknown: Vec<Dead>,
    /// Runs of which cannot be told whether they are alive, and why.
    pub(crate) doubtful: Vec<(Dead, String)>,
    /// How many runs are alive whose directory is elsewhere.
    pub(crate) living_elsewhere: usize,
    /// Keeps the directories of runs without a directory here from being anybody else's while we work.
    _orphans: Vec<Orphan>,
    /// Keeps runs from starting, and other clean-ups from looking, while we work.
    _runs: File,
}

/// A run that is alive.
#[derive(Debug, Serialize)]
pub(crate) struct Living {
    run: String,
    /// Its program, where the kernel says which it is: not if it is in a container elsewhere.
    pub(crate) process: Option<u32>,
}

/// A run that has ended, and that another program can go on with.
#[derive(Debug, Serialize)]
pub(crate) struct Resumable {
    run: String,
    pub(crate) name: HolderName,
    pub(crate) target: PathBuf,
    /// The command that goes on with it.
    #[serde(skip)]
    pub(crate) resuming: String,
}

/// A run that has ended without finishing, and what is left of it.
#[derive(Debug)]
pub(crate) struct Dead {
    pub(crate) paths: RunPaths,
    /// In the kernel's order: what stands on another comes after it.
    pub(crate) mounts: Vec<MountInfo>,
    /// What is made of its loop devices, in any order.
    pub(crate) mapped: Vec<Marked>,
    pub(crate) loops: Vec<BoundLoop>,
    /// Directories that were made for a target, from the top.
    pub(crate) directories: Vec<PathBuf>,
    /// Mounts of others that are on top of what is left.
    pub(crate) foreign_mounts: Vec<MountInfo>,
    /// Loop devices of others with a file of this run.
    pub(crate) foreign_loops: Vec<BoundLoop>,
}

/// Looks for what dead runs have left, and shuts out other clean-ups and starts until it is dropped.
/// Runs with a name count as dead only if their mounts are `unwanted`.
pub(crate) fn scan(unwanted: &Unwanted) -> Result<Found, Failure> {
    let runs = run::open_runs().context(|| format!("cannot open {}", run::runs().display()))?;
    run::lock(&runs, FlockOperation::NonBlockingLockExclusive)?;
    let Sorted {
        living,
        mut dead,
        doubtful,
    } = sort_runs().context(|| format!("cannot look at the runs in {}", run::runs().display()))?;
    let (mut resumable, mut lost) = (Vec::new(), BTreeMap::new());
    dead.retain(|id| {
        let paths = RunPaths::of(id);
        match paths.kept() {
            Kept::No => return true,
            _ if unwanted.has(&paths) => return true,
            Kept::Lost(why) => {
                lost.insert(id.clone(), why);
            }
            Kept::Resumable(remembered) => resumable.push(Resumable {
                run: id.clone(),
                target: remembered.target(),
                resuming: remembered.resuming(),
                name: remembered.name,
            }),
        }
        false
    });
    // Only root may ask, and only root's runs have any.
    let loops = match run::is_root() {
        true => bound_loops()?,
        false => Vec::new(),
    };
    let mapped = match run::is_root() {
        true => mapped_devices()?,
        false => Vec::new(),
    };
    let mounts = mountinfo::read().context(|| "cannot read the table of mounts".to_owned())?;
    let loop_marks = loops.iter().map(|bound| bound.mark());
    let mapped_marks = mapped.iter().map(|device| device.mark.clone());
    let may_be_ours = |mount: &&MountInfo| mount.filesystem == OVERLAY && run::is_root();
    let overlays = mounts.iter().filter(may_be_ours);
    let overlay_marks = overlays.map(|mount| mount.source.to_string_lossy().into_owned());
    let marks = loop_marks.chain(mapped_marks).chain(overlay_marks);
    let marks: Vec<String> = marks.collect();
    let marked = marks.iter().filter_map(|mark| run::id_in(mark));
    let is_kept = |id: &str| lost.contains_key(id) || resumable.iter().any(|kept| kept.run == id);
    let is_known = |id: &str| living.contains(id) || dead.contains(id) || doubtful.contains_key(id);
    let is_unknown = |id: &&str| !is_known(id) && !is_kept(id);
    let unknown: BTreeSet<&str> = marked.filter(is_unknown).collect();
    let look_at = |id: &str| look_at(id, &loops, &mapped, &mounts);
    let orphans = run::orphans().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot look for image files of runs without a directory");
        Vec::new()
    });
    let orphans = orphans
        .into_iter()
        .filter(|orphan| !unknown.contains(&*orphan.id));
    let (gone, elsewhere): (Vec<_>, Vec<_>) = orphans.partition(|orphan| orphan.lock.is_some());
    let (kept, unneeded): (Vec<_>, Vec<_>) = gone
        .iter()
        .partition(|orphan| has_machine(orphan) || orphan.is_named && !unwanted.has_all());
    dead.extend(unneeded.iter().map(|orphan| orphan.id.clone()));
    lost.extend(
        kept.iter()
            .map(|orphan| (orphan.id.clone(), why_kept(orphan))),
    );
    Ok(Found {
        doubtful: doubtful
            .into_iter()
            .map(|(id, why)| (look_at(&id), why))
            .collect(),
        living_elsewhere: elsewhere.len(),
        _orphans: gone,
        unknown: unknown.into_iter().map(look_at).collect(),
        dead: dead.iter().map(|id| look_at(id)).collect(),
        living: living
            .into_iter()
            .map(|run| Living {
                process: RunPaths::of(&run).process(),
                run,
            })
            .collect(),
        lost: lost
            .iter()
            .map(|(id, why)| (look_at(id), why.clone()))
            .collect(),
        resumable,
        _runs: runs,
    })
}

/// Whether a virtual machine lives that the run has started, and of which nothing else is known here.
fn has_machine(orphan: &Orphan) -> bool {
    kept_vm(&RunPaths::of(&orphan.id).work).is_some()
}

fn why_kept(orphan: &Orphan) -> String {
    match has_machine(orphan) {
        true => "its virtual machine is alive, and /run/blockmount here does not know its run: end it first".to_owned(),
        false => "/run/blockmount here does not know its run, which had a name".to_owned(),
    }
}

/// The ids of the runs that have a directory.
#[derive(Default)]
struct Sorted {
    living: BTreeSet<String>,
    dead: BTreeSet<String>,
    /// Those that cannot be told, and why.
    doubtful: BTreeMap<String, String>,
}

fn sort_runs() -> io::Result<Sorted> {
    let mut sorted = Sorted::default();
    for entry in fs::read_dir(run::runs())? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().filter(|name| run::is_id(name)) else {
            continue;
        };
        let id = id.to_owned();
        match RunPaths::of(&id).is_alive() {
            Ok(true) => drop(sorted.living.insert(id)),
            Ok(false) => drop(sorted.dead.insert(id)),
            Err(error) => drop(sorted.doubtful.insert(id, error.to_string())),
        }
    }
    Ok(sorted)
}

/// The mapped devices of runs; none where the kernel cannot have any.
fn mapped_devices() -> Result<Vec<Marked>, Failure> {
    match DeviceMapper::open().and_then(|mapper| mapper.marked()) {
        Err(error) if error.kind() == ErrorKind::Unsuitable => Ok(Vec::new()),
        found => found.context(|| "cannot list the mapped devices".to_owned()),
    }
}

fn look_at(id: &str, loops: &[BoundLoop], mapped: &[Marked], mounts: &[MountInfo]) -> Dead {
    let paths = RunPaths::of(id);
    let mark = paths.mark();
    let (ours, others): (Vec<_>, Vec<_>) = loops
        .iter()
        .cloned()
        .partition(|bound| bound.mark() == mark);
    let mapped = mapped.iter().filter(|device| device.mark == mark);
    let mapped: Vec<Marked> = mapped.cloned().collect();
    let numbers = mapped.iter().map(|marked| marked.device.number);
    let numbers = numbers.map(|number| (number.major, number.minor));
    let devices = ours.iter().flat_map(|bound| device_numbers(bound.number()));
    let devices: BTreeSet<(u32, u32)> = devices.chain(numbers).collect();
    // Nobody but root can mount in there.
    let is_private = paths.has_private_work();
    let is_ours = |mount: &MountInfo| {
        let is_marked = mount.filesystem == OVERLAY && mount.source == *mark;
        let is_shown = is_private
            && mount.filesystem.starts_with(FUSE)
            && mount.mount_point.starts_with(&paths.work);
        is_marked || is_shown || devices.contains(&mount.device)
    };
    let by_id: BTreeMap<u64, &MountInfo> = mounts.iter().map(|mount| (mount.id, mount)).collect();
    let is_on_ours = |mount: &MountInfo| {
        let below =
            mount.mount_point.starts_with(&paths.dir) || mount.mount_point.starts_with(&paths.work);
        below || stands_on(mount, &by_id, is_ours)
    };
    let (ours_mounted, others_mounted): (Vec<_>, Vec<_>) =
        mounts.iter().cloned().partition(is_ours);
    Dead {
        mounts: ours_mounted,
        mapped,
        loops: ours,
        directories: noted_directories(&paths),
        foreign_mounts: others_mounted.into_iter().filter(is_on_ours).collect(),
        foreign_loops: others
            .into_iter()
            .filter(|bound| bound.backing_file().starts_with(&paths.work))
            .collect(),
        paths,
    }
}

/// Whether a mount is, at whatever depth, on a mount that fits.
fn stands_on(
    mount: &MountInfo,
    by_id: &BTreeMap<u64, &MountInfo>,
    fits: impl Fn(&MountInfo) -> bool,
) -> bool {
    let mut parent = by_id.get(&mount.parent);
    // The table was read in pieces while it changed; a circle must not hold us.
    for _ in 0..by_id.len() {
        match parent {
            None => return false,
            Some(mount) if fits(mount) => return true,
            Some(mount) => parent = by_id.get(&mount.parent),
        }
    }
    false
}

/// The device and its partitions.
fn device_numbers(number: u32) -> Vec<(u32, u32)> {
    let disk = PathBuf::from(format!("/sys/block/loop{number}"));
    let parts = fs::read_dir(&disk)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    std::iter::once(disk)
        .chain(parts)
        .filter_map(|path| device_number(&path))
        .collect()
}

fn device_number(directory: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The directories that were noted and are there.
fn noted_directories(paths: &RunPaths) -> Vec<PathBuf> {
    let noted = paths
        .read_journal()
        .into_iter()
        .map(|Entry::Directory(name)| name.into_path());
    noted
        .filter(|path| {
            path.symlink_metadata()
                .is_ok_and(|metadata| metadata.is_dir())
        })
        .collect()
}
