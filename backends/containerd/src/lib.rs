//! Lists of mounts as containerd describes root filesystems, planned for a guest and performed in it.
//!
//! A snapshotter of containerd 2.2 and later describes a root filesystem as a list of [`Mount`]s, each of which may use those
//! before it. [`plan`] understands such a list as a whole, before anything is done: which image is attached and mounted where,
//! which filesystem is made first, what is stacked on what. What is no block device's business (binds of the host's
//! directories, `tmpfs`, types that it does not know) is handed back for the caller to mount.
//!
//! ```
//! use blockmount_containerd::{Action, Mount, plan};
//!
//! let list = [
//!     Mount::new("erofs", "/layers/app.erofs").option("ro").option("loop"),
//!     Mount::new("erofs", "/layers/base.erofs").option("ro").option("loop"),
//!     Mount::new("format/overlay", "overlay").option("lowerdir={{ overlay 0 1 }}"),
//! ];
//! let plan = plan(&list, "/run/blockmount/web".as_ref())?;
//! assert!(plan.system.is_empty());
//! let Action::Overlay(overlay) = &plan.steps[2].action else { panic!() };
//! assert_eq!(overlay.lower[0].to_string(), "mount 0");
//! assert_eq!(plan.steps[2].mount.options, ["lowerdir=/run/blockmount/web/0:/run/blockmount/web/1"]);
//! # Ok::<(), blockmount_containerd::InvalidMount>(())
//! ```
//!
//! [`perform`] does what a plan says through a [`Manager`](blockmount::Manager), all or nothing:
//!
//! ```no_run
//! # use blockmount_containerd::{Mount, perform, plan};
//! # async fn example(manager: &blockmount::Manager, list: &[Mount]) -> Result<(), Box<dyn std::error::Error>> {
//! let plan = plan(list, "/run/blockmount/web".as_ref())?;
//! let performed = perform(manager, &plan, "web").await?;
//! let root = performed.points().last(); // where the last mount of the list is
//! # let _ = root;
//! performed.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The feature `service` has containerd's Mounts service, which does both for clients in any language: see `service`.
//!
//! # What a shim may declare
//!
//! A shim names what it mounts by itself in `containerd.types.MountCapabilities`; containerd leaves that to it. With this crate a
//! shim may name [`TYPES`] and [`TRANSFORMS`]:
//!
//! | type | what becomes of it |
//! |---|---|
//! | `loop` | the file is attached as a disk; its block device is at the mount point |
//! | `erofs`, `squashfs`, `ext2`, `ext3`, `ext4`, `xfs`, `btrfs` of a file or a block device, with or without `loop` | attached and mounted in the guest |
//! | the same of `{{ mount N }}` or `{{ source N }}`, where mount N is a `loop` | that disk is mounted |
//! | `bind` of what an earlier mount has | a view of it |
//! | `overlay` of what earlier mounts have | stacked in the guest: whole images, with `upper` and `work` in one of them |
//!
//! | transform | what becomes of it |
//! |---|---|
//! | `format/` | templates are filled in with the mount points in the guest: `source`, `target`, `mount`, `overlay` in both directions |
//! | `mkfs/` | the file is made where it is missing, with a filesystem (ext4 or xfs) |
//! | `mkdir/` | directories are made in what earlier mounts have |
//!
//! An overlay that has directories of the host besides, such as its `upperdir`, is an error; where the guest is this host ([`plan_here`])
//! it is handed back, and the caller mounts it over what is up.
//!
//! The transforms of one mount may stand in any order: templates are filled in first, as `mkdir/` and `mkfs/` need their values.
//!
//! (Source of the formats: containerd, `docs/mounts.md` and `core/mount/manager`, August 2026.)

mod list;
mod mkdir;
mod mkfs;
mod mount;
mod perform;
mod place;
mod placed;
mod plan;
#[cfg(feature = "service")]
pub mod service;
mod template;
mod words;

pub use list::{MAX_BYTES, MAX_MOUNTS, plan, plan_here};
pub use mkdir::Directory;
pub use mkfs::NewImage;
pub use mount::{InvalidMount, Mount};
pub use perform::{Lost, PerformError, Performed, Unreleased, holders, perform};
pub use place::Place;
pub use plan::{Action, Bind, Image, Overlay, Plan, Scratch, Step};

/// The base types that [`plan`] takes over.
pub const TYPES: [&str; 10] = [
    "loop", "erofs", "squashfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "bind", "overlay",
];

/// The transforms that [`plan`] does.
pub const TRANSFORMS: [&str; 3] = ["format", "mkfs", "mkdir"];
