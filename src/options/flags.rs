//! The flags that the kernel knows for every filesystem.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A flag that the kernel knows for every filesystem, by its name in mount(8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum MountFlag {
    /// Ignore set-user-id bits.
    NoSuid,
    /// Ignore device nodes.
    NoDev,
    /// Refuse to run programs.
    NoExec,
    /// Never update access times.
    NoAtime,
    /// Never update access times of directories.
    NoDirAtime,
    /// Update access times at each access.
    StrictAtime,
    /// Never follow symbolic links.
    NoSymFollow,
    /// Write everything at once.
    Sync,
    /// Write changes of directories at once.
    DirSync,
    /// Keep changes of time stamps in memory for a while.
    LazyTime,
}

impl MountFlag {
    /// Every flag, in canonical order.
    pub const ALL: [MountFlag; 10] = [
        MountFlag::NoSuid,
        MountFlag::NoDev,
        MountFlag::NoExec,
        MountFlag::NoAtime,
        MountFlag::NoDirAtime,
        MountFlag::StrictAtime,
        MountFlag::NoSymFollow,
        MountFlag::Sync,
        MountFlag::DirSync,
        MountFlag::LazyTime,
    ];

    /// Its name in mount(8).
    pub fn name(self) -> &'static str {
        match self {
            MountFlag::NoSuid => "nosuid",
            MountFlag::NoDev => "nodev",
            MountFlag::NoExec => "noexec",
            MountFlag::NoAtime => "noatime",
            MountFlag::NoDirAtime => "nodiratime",
            MountFlag::StrictAtime => "strictatime",
            MountFlag::NoSymFollow => "nosymfollow",
            MountFlag::Sync => "sync",
            MountFlag::DirSync => "dirsync",
            MountFlag::LazyTime => "lazytime",
        }
    }

    /// Whether it belongs to the filesystem, and so is shared by all mounts of a device.
    pub fn is_of_superblock(self) -> bool {
        matches!(
            self,
            MountFlag::Sync | MountFlag::DirSync | MountFlag::LazyTime
        )
    }
}

/// A set of [`MountFlag`]s.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MountFlags(u16);

impl MountFlags {
    /// Whether the flag is in the set.
    pub fn contains(self, flag: MountFlag) -> bool {
        self.0 & Self::bit(flag) != 0
    }

    /// The flags in the set, in canonical order.
    pub fn iter(self) -> impl Iterator<Item = MountFlag> {
        MountFlag::ALL
            .into_iter()
            .filter(move |flag| self.contains(*flag))
    }

    /// Those that belong to the filesystem.
    pub(super) fn of_superblock(self) -> Self {
        self.iter().filter(|flag| flag.is_of_superblock()).collect()
    }

    fn bit(flag: MountFlag) -> u16 {
        1 << flag as u8
    }
}

impl FromIterator<MountFlag> for MountFlags {
    fn from_iter<I: IntoIterator<Item = MountFlag>>(flags: I) -> Self {
        MountFlags(
            flags
                .into_iter()
                .fold(0, |bits, flag| bits | Self::bit(flag)),
        )
    }
}

impl fmt::Debug for MountFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(MountFlag::name))
            .finish()
    }
}

/// Whether mounts below a target appear in other mount namespaces, and theirs below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Propagation {
    /// Which way mounts spread.
    pub mode: PropagationMode,
    /// Whether it holds for all mounts below as well.
    pub recursive: bool,
}

/// Which way mounts spread between mount namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PropagationMode {
    /// Neither way.
    Private,
    /// Both ways.
    Shared,
    /// Only inwards.
    Slave,
    /// Neither way, and it cannot be bound elsewhere.
    Unbindable,
}

impl Propagation {
    /// Reads `shared`, `rslave` and the like.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let (recursive, mode) = match name.strip_prefix('r') {
            Some(mode) => (true, mode),
            None => (false, name),
        };
        let mode = match mode {
            "private" => PropagationMode::Private,
            "shared" => PropagationMode::Shared,
            "slave" => PropagationMode::Slave,
            "unbindable" => PropagationMode::Unbindable,
            _ => return None,
        };
        Some(Propagation { mode, recursive })
    }
}

impl fmt::Display for Propagation {
    /// The name in mount(8): `rshared`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            PropagationMode::Private => "private",
            PropagationMode::Shared => "shared",
            PropagationMode::Slave => "slave",
            PropagationMode::Unbindable => "unbindable",
        };
        write!(f, "{}{mode}", if self.recursive { "r" } else { "" })
    }
}
