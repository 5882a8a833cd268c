//! Mounts in every combination of layers, of which each step fails once, or is the last of its process.
//!
//! The engine runs in this process, over a journal, beside the agent that is under test. What is killed is a process of this
//! program. After each round everything must be as before: mounts, mapped devices, partitions, the tree, and the journal.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{
    BackendError, BlockDevice, DeviceLocator, DeviceRole, Encryption, ErrorKind, Expose,
    ExtraDevice, Format, InvalidOptions, KeySource, LuksKey, MountOptions, Mounter, Resolver,
    Verity,
};
use blockmount_linux::device::{self, DeviceNumber};
use blockmount_linux::mapper::DeviceMapper;
use blockmount_linux::{LinuxGuest, LinuxGuestBuilder, mountinfo, uevent};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

/// What of a disk is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// All of it.
    Whole,
    /// Its first partition.
    Partition,
    /// A range of bytes.
    Range,
    /// The first partition of a range of bytes.
    PartitionOfRange,
}

/// What is between the disk and what appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// Nothing.
    Plain,
    /// What checks its integrity.
    Verity,
    /// The same, by a tree on another disk.
    VerityApart,
    /// What encrypts it.
    Crypt,
    /// What encrypts it, over tags for its blocks.
    CryptWithTags,
    /// A volume of LUKS2, opened by the passphrase in the file `luks`.
    Luks,
}

impl Layer {
    /// Whether the disk is written to in any case.
    pub fn is_written(self) -> bool {
        matches!(self, Layer::Crypt | Layer::CryptWithTags)
    }
}

/// What appears at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Appears {
    /// The filesystem that is there.
    Filesystem,
    /// A filesystem that is made first.
    NewFilesystem,
    /// The device itself.
    Device,
}

/// How a round ends at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The step fails.
    Fails,
    /// The process is killed.
    Killed,
}

/// One combination, and the disk that it is tried on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exercise {
    /// What of the disk is used.
    pub place: Place,
    /// What is above that.
    pub layer: Layer,
    /// What appears.
    pub appears: Appears,
    /// How the rounds end.
    pub fault: Fault,
    /// The first step that is tried, and how many steps further the next one is.
    pub steps: (u32, u32),
    /// The node of the disk, or its SCSI address in this guest (`0:0:0:3`).
    pub disk: PathBuf,
    /// The range of the disk, in bytes, where one is used.
    pub range: (u64, u64),
    /// How the integrity is checked, where it is.
    pub verity: Option<Verity>,
    /// The node of the disk with the tree, or its SCSI address, where that is another one.
    pub tree: Option<PathBuf>,
    /// A directory in memory, for the target and the journal.
    pub directory: PathBuf,
    /// Where keys are, if one is needed.
    #[serde(default)]
    pub keys: Option<PathBuf>,
}

/// All combinations that can be. What is checked, and a range, cannot be written to; and what is encrypted with a new key
/// holds nothing that could be mounted.
pub fn combinations() -> Vec<(Place, Layer, Appears)> {
    let mut all = Vec::new();
    for place in [
        Place::Whole,
        Place::Partition,
        Place::Range,
        Place::PartitionOfRange,
    ] {
        let is_range = matches!(place, Place::Range | Place::PartitionOfRange);
        for layer in [
            Layer::Plain,
            Layer::Verity,
            Layer::VerityApart,
            Layer::Crypt,
            Layer::CryptWithTags,
            Layer::Luks,
        ] {
            for appears in [Appears::Filesystem, Appears::NewFilesystem, Appears::Device] {
                let is_written = layer.is_written() || appears == Appears::NewFilesystem;
                let can_be = match (layer, appears) {
                    (Layer::Verity, Appears::NewFilesystem) => false,
                    (Layer::Crypt, Appears::Filesystem) => false,
                    (Layer::CryptWithTags, Appears::Filesystem | Appears::Device) => false,
                    // What is below makes no difference any more.
                    (Layer::VerityApart, Appears::NewFilesystem | Appears::Device) => false,
                    // It is read only; what is made on it is what is made on others.
                    (Layer::Luks, Appears::NewFilesystem | Appears::Device) => false,
                    (Layer::VerityApart | Layer::CryptWithTags | Layer::Luks, _)
                        if place != Place::Whole =>
                    {
                        false
                    }
                    _ => !(is_range && is_written),
                };
                if can_be {
                    all.push((place, layer, appears));
                }
            }
        }
    }
    all
}

/// What an injected error says.
const INJECTED: &str = "this step was to fail";
/// How long a disk may take to be there, on a busy machine.
const APPEARS: Duration = Duration::from_secs(240);
/// So many steps no mount has.
const TOO_MANY: u32 = 500;

/// Which step is next, and which one is the end of the round. There is one round at a time.
static STEP: AtomicU32 = AtomicU32::new(0);
static LAST: AtomicU32 = AtomicU32::new(u32::MAX);
static ALONE: Mutex<()> = Mutex::const_new(());

fn is_last() -> bool {
    STEP.fetch_add(1, Ordering::SeqCst) == LAST.load(Ordering::SeqCst)
}

fn fail() -> Result<(), BackendError> {
    match is_last() {
        true => Err(BackendError::other(INJECTED)),
        false => Ok(()),
    }
}

fn die() {
    if is_last() {
        let _dying = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

fn begin_at(last: u32) {
    LAST.store(last, Ordering::SeqCst);
    STEP.store(0, Ordering::SeqCst);
}

/// Finds `exercise:/dev/sda`, `exercise:/dev/sda@4096-8192` and, by its SCSI address, `exercise:0:0:0:3`.
#[derive(Debug)]
pub(crate) struct ByName;

#[async_trait]
impl Resolver for ByName {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let Some((node, range)) = device.address().split_once('@') else {
            let address = Path::new(device.address());
            if address.has_root() {
                return Ok(BlockDevice::new(address));
            }
            let node = node_of(address).await;
            return node
                .map(BlockDevice::new)
                .map_err(|error| BackendError::not_found(error.to_string()));
        };
        let range = range
            .split_once('-')
            .and_then(|(start, end)| Some(start.parse::<u64>().ok()?..end.parse::<u64>().ok()?));
        let range = range.ok_or_else(|| BackendError::invalid("this is no range"))?;
        Ok(BlockDevice::new(node).with_range(range))
    }
}

/// Everything that a round could leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    mounts: Vec<PathBuf>,
    mapped: BTreeSet<String>,
    partitions: Vec<u32>,
    /// Those of ours that the kernel keeps, without their numbers.
    keys: BTreeSet<String>,
    tree: BTreeSet<PathBuf>,
}

impl Exercise {
    /// Runs rounds until one comes to its end, and answers how many did not.
    ///
    /// # Errors
    ///
    /// What was left, or was answered in place of the fault.
    pub async fn run(mut self) -> io::Result<u32> {
        let _alone = ALONE.lock().await;
        if !self.disk.has_root() {
            self.disk = node_of(&self.disk).await?;
        }
        if let Some(tree) = self.tree.as_mut().filter(|tree| !tree.has_root()) {
            *tree = node_of(tree).await?;
        }
        fs::create_dir_all(&self.directory)?;
        // The journal makes its directory.
        drop(self.guest(self.builder()).await?);
        self.blank()?;
        let before = self.state()?;
        let (first, apart) = self.steps;
        for step in (first..TOO_MANY).step_by(apart.max(1) as usize) {
            let is_over = match self.fault {
                Fault::Fails => self.failed_at(step).await?,
                Fault::Killed => self.killed_at(step).await?,
            };
            let after = self.state()?;
            if after != before {
                return Err(self.trouble(step, &format!("left {after:?}, and not {before:?}")));
            }
            if is_over {
                fs::remove_dir_all(&self.directory)?;
                return Ok(step);
            }
            self.blank()?;
        }
        Err(self.trouble(TOO_MANY, "there is no end of steps"))
    }

    /// The process that is killed: what `run` starts.
    ///
    /// # Errors
    ///
    /// Those of the mount.
    pub async fn run_until(&self, last: u32) -> io::Result<()> {
        begin_at(last);
        let guest = self.guest(self.builder().at_journal_change(die)).await?;
        self.mount(&guest).await.map_err(io::Error::other)?;
        guest
            .unmount(&self.target())
            .await
            .map_err(io::Error::other)
    }

    async fn failed_at(&self, step: u32) -> io::Result<bool> {
        begin_at(u32::MAX);
        let guest = self.guest(self.builder().at_step(fail)).await?;
        begin_at(step);
        let target = self.target();
        let failed = match self.mount(&guest).await {
            Err(error) => Some(error),
            Ok(()) => guest.unmount(&target).await.err(),
        };
        // An unmount that failed goes on where it was, and one after a failed mount has nothing to do.
        let again = guest.unmount(&target).await;
        match (failed, again) {
            (None, Ok(())) => Ok(true),
            (Some(error), Ok(()))
                if error.kind() == ErrorKind::Other && error.message() == INJECTED =>
            {
                Ok(false)
            }
            (failed, again) => {
                Err(self.trouble(step, &format!("answered {failed:?}, and then {again:?}")))
            }
        }
    }

    async fn killed_at(&self, step: u32) -> io::Result<bool> {
        let exercise = serde_json::to_string(self)?;
        let program = std::env::current_exe()?;
        let ended = tokio::process::Command::new(program)
            .args(["--exercise", &exercise, "--until", &step.to_string()])
            .output()
            .await?;
        let is_over = match (ended.status.success(), ended.status.signal()) {
            (true, _) => true,
            (_, Some(9)) => false,
            _ => return Err(self.trouble(step, &String::from_utf8_lossy(&ended.stderr))),
        };
        let guest = self.guest(self.builder()).await?;
        let unmounted = guest.unmount(&self.target()).await;
        unmounted.map_err(|error| self.trouble(step, &format!("cannot be undone: {error}")))?;
        Ok(is_over)
    }

    fn trouble(&self, step: u32, what: &str) -> io::Error {
        let Exercise {
            place,
            layer,
            appears,
            fault,
            ..
        } = self;
        io::Error::other(format!(
            "{place:?}, {layer:?}, {appears:?}: step {step} ({fault:?}): {what}"
        ))
    }

    fn builder(&self) -> LinuxGuestBuilder {
        let builder = LinuxGuest::builder()
            .resolver("exercise", Arc::new(ByName))
            .busy_timeout(Duration::from_secs(20));
        let keys = self.keys.iter();
        keys.fold(builder, LinuxGuestBuilder::key_directory)
    }

    async fn guest(&self, builder: LinuxGuestBuilder) -> io::Result<LinuxGuest> {
        let journal = builder.journal(self.directory.join("journal")).await;
        journal.map_err(io::Error::other)
    }

    fn target(&self) -> PathBuf {
        self.directory.join("made/target")
    }

    async fn mount(&self, guest: &LinuxGuest) -> Result<(), BackendError> {
        let (node, (start, end)) = (self.disk.display(), self.range);
        let address = match self.place {
            Place::Whole | Place::Partition => node.to_string(),
            Place::Range | Place::PartitionOfRange => format!("{node}@{start}-{end}"),
        };
        let locator = DeviceLocator::new("exercise", address);
        let locator = locator.map_err(|error| BackendError::invalid(error.to_string()))?;
        let options = self.options();
        let options = options.map_err(|error| BackendError::invalid(error.to_string()))?;
        guest.mount(&locator, &self.target(), &options).await
    }

    fn is_written(&self) -> bool {
        self.layer.is_written() || self.appears == Appears::NewFilesystem
    }

    fn options(&self) -> Result<MountOptions, InvalidOptions> {
        let mut options = MountOptions::builder();
        if !self.is_written() {
            options = options.read_only();
        }
        if let Place::Partition | Place::PartitionOfRange = self.place {
            options = options.partition(std::num::NonZeroU32::MIN);
        }
        options = match (self.layer, &self.verity) {
            (Layer::Verity | Layer::VerityApart, Some(verity)) => options.verity(verity.clone()),
            (Layer::CryptWithTags, _) => options.encryption(Encryption::EphemeralWithIntegrity),
            (Layer::Crypt, _) => options.encryption(Encryption::Ephemeral),
            (Layer::Luks, _) => {
                let passphrase = LuksKey::Passphrase(KeySource::File("luks".to_owned()));
                options.encryption(Encryption::Luks2(passphrase))
            }
            _ => options,
        };
        if let Some(tree) = &self.tree {
            let locator = DeviceLocator::new("exercise", tree.display().to_string());
            let locator = locator.expect("a node is an address");
            options = options.device(ExtraDevice::new(DeviceRole::HashTree, locator));
        }
        match self.appears {
            Appears::Filesystem => options,
            Appears::NewFilesystem => options.format(Format::new("ext4")),
            Appears::Device => options.expose(Expose::BlockDevice),
        }
        .build()
    }

    /// Makes the place blank where it is written to: a filesystem that was made once would not be made again.
    fn blank(&self) -> io::Result<()> {
        /// What is looked at to prove a device blank, at its start and its end.
        const LOOKED_AT: u64 = 1 << 20;
        if !self.is_written() {
            return Ok(());
        }
        let disk = File::options().write(true).open(&self.disk)?;
        let (start, end) = self.range;
        let zeros = vec![0; LOOKED_AT as usize];
        for at in [start, end - LOOKED_AT] {
            disk.write_all_at(&zeros, at)?;
        }
        disk.sync_all()
    }

    fn state(&self) -> io::Result<State> {
        State::of(&self.disk, &self.directory)
    }
}

impl State {
    /// What there is of a disk, by its node, and below a directory.
    pub(crate) fn of(disk: &Path, directory: &Path) -> io::Result<Self> {
        let mounts = mountinfo::read()?
            .into_iter()
            .map(|mount| mount.mount_point);
        let mapped = match DeviceMapper::open() {
            Ok(mapper) => mapper.list().map_err(io::Error::other)?,
            // Where there is no device-mapper, nothing is mapped.
            Err(_) => Vec::new(),
        };
        let disk = DeviceNumber::of(&File::open(disk)?).map_err(io::Error::other)?;
        let partitions = device::partitions(disk).map_err(io::Error::other)?;
        let mut tree = BTreeSet::new();
        walk(directory, &mut tree)?;
        Ok(State {
            mounts: mounts
                .filter(|point| point.starts_with(directory))
                .collect(),
            mapped: mapped.into_iter().map(|mapped| mapped.name).collect(),
            partitions: partitions.into_keys().collect(),
            keys: keys(),
            tree,
        })
    }
}

/// The keys that the kernel keeps for devices of ours; none where it tells no keys. Those that are only to be collected, which
/// happens in a moment, have an `i` among their flags.
fn keys() -> BTreeSet<String> {
    let all = fs::read_to_string("/proc/keys").unwrap_or_default();
    let ours = all.lines().filter_map(|line| {
        let flags = line.split_ascii_whitespace().nth(1)?;
        let at = line.find("blockmount:").filter(|_| !flags.contains('i'))?;
        Some(line[at..].to_owned())
    });
    ours.collect()
}

/// The node of the disk at a SCSI address, once it is there.
pub(crate) async fn node_of(address: &Path) -> io::Result<PathBuf> {
    let block = Path::new("/sys/bus/scsi/devices")
        .join(address)
        .join("block");
    let look = move || {
        let name = fs::read_dir(&block).ok().and_then(|mut names| names.next());
        let node = name.and_then(|name| Some(Path::new("/dev").join(name.ok()?.file_name())));
        // It can be opened once the kernel has read its partitions.
        Ok(node.filter(|node| File::open(node).is_ok()))
    };
    let found = uevent::wait_until(Instant::now() + APPEARS, look).await;
    let nothing = || io::Error::other(format!("there is no disk at {}", address.display()));
    found.map_err(io::Error::other)?.ok_or_else(nothing)
}

fn walk(directory: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        }
        found.insert(entry.path());
    }
    Ok(())
}
