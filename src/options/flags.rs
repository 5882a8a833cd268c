//! The flags that the kernel knows for every filesystem.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Makes everything that is said of flags from one table: a flag, its name in mount(8), the name that
/// unsets it (or none), what it decides (options that decide the same exclude each other), and whether it
/// belongs to each mount or to the superblock.
macro_rules! mount_flags {
    ($($(#[$doc:meta])* $flag:ident: $name:literal / $opposite:expr, $decides:literal, $level:ident;)*) => {
        /// A flag that the kernel knows for every filesystem, by its name in mount(8).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum MountFlag {
            $($(#[$doc])* $flag,)*
        }

        /// In the order of the flags.
        const TABLE: &[Row] = &[$(Row {
            flag: MountFlag::$flag,
            name: $name,
            opposite: $opposite,
            decides: $decides,
            level: Level::$level,
        },)*];

        impl MountFlag {
            /// Every flag, in canonical order.
            pub const fn all() -> &'static [MountFlag] {
                &[$(MountFlag::$flag,)*]
            }
        }
    };
}

mount_flags! {
    /// Ignore set-user-id bits.
    NoSuid: "nosuid" / Some("suid"), "suid", Mount;
    /// Ignore device nodes.
    NoDev: "nodev" / Some("dev"), "dev", Mount;
    /// Refuse to run programs.
    NoExec: "noexec" / Some("exec"), "exec", Mount;
    /// Never update access times.
    NoAtime: "noatime" / Some("atime"), "atime", Mount;
    /// Never update access times of directories.
    NoDirAtime: "nodiratime" / Some("diratime"), "diratime", Mount;
    /// Update access times at each access.
    StrictAtime: "strictatime" / Some("relatime"), "atime", Mount;
    /// Never follow symbolic links.
    NoSymFollow: "nosymfollow" / Some("symfollow"), "symfollow", Mount;
    /// Write everything at once.
    Sync: "sync" / Some("async"), "sync", Superblock;
    /// Write changes of directories at once.
    DirSync: "dirsync" / None, "dirsync", Superblock;
    /// Keep changes of time stamps in memory for a while.
    LazyTime: "lazytime" / Some("nolazytime"), "lazytime", Superblock;
}

struct Row {
    flag: MountFlag,
    name: &'static str,
    opposite: Option<&'static str>,
    decides: &'static str,
    level: Level,
}

#[derive(PartialEq)]
enum Level {
    Mount,
    Superblock,
}

impl MountFlag {
    /// Its name in mount(8).
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Whether it belongs to the filesystem, and so is shared by all mounts of a device.
    pub fn is_of_superblock(self) -> bool {
        self.row().level == Level::Superblock
    }

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Some(TABLE.iter().find(|row| row.name == name)?.flag)
    }
}

/// What an option decides, if the kernel decides it for every filesystem. Options that decide the same
/// exclude each other.
pub(super) fn decides(option: &str) -> Option<&'static str> {
    let row = TABLE
        .iter()
        .find(|row| row.name == option || row.opposite == Some(option));
    match (row, option) {
        (Some(row), _) => Some(row.decides),
        (None, "ro" | "rw") => Some("access"),
        (None, "silent" | "loud") => Some("silent"),
        _ => Propagation::from_name(option).map(|_| "propagation"),
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
        let all = MountFlag::all().iter().copied();
        all.filter(move |flag| self.contains(*flag))
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
#[non_exhaustive]
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
