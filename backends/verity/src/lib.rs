//! Hash trees of dm-verity: superblocks that are read and checked, trees that are built on all cores, images that are
//! sealed with a tree of their own. Nothing here needs a kernel, and nothing is searched for unasked.
//!
//! ```
//! use blockmount_verity::{Parameters, find, seal, verify};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = tempfile::tempfile()?;
//! image.set_len(1 << 20)?;
//! let sealed = seal(&image, &Parameters::default(), &|_| true)?;
//!
//! // What a guest is told, who then trusts nothing that is on the disk.
//! let verity = sealed.superblock.options(&sealed.root_digest, sealed.hash_offset)?;
//! assert_eq!(verity.hash_start_block, (1 << 20) / 4096 + 1);
//!
//! let size = image.metadata()?.len();
//! let (offset, superblock) = find(&image, size)?.ok_or("it has just been sealed")?;
//! let tree = superblock.tree(offset).ok_or("it fits on a disk")?;
//! verify(&image, &image, &tree, &sealed.root_digest, &|_| true)?;
//! # Ok(())
//! # }
//! ```
//!
//! | item | what it does |
//! |---|---|
//! | [`seal`] | appends a superblock and a tree to an image; an interrupted seal is found and taken back by the next one |
//! | [`format`](format()) | builds a tree in any file |
//! | [`Superblock::read`] | reads a superblock, and refuses what no kernel could be given |
//! | [`find`] | finds the superblock at the end of an image, for people who ask what is in it |
//! | [`verify`] | checks data and tree against a root digest |
//! | [`Metadata`] | the `.dmverity` file beside an image, as containerd writes and reads it |
//!
//! The format is version 1 with hash type 1, as `veritysetup` makes it. (Sources: Linux,
//! `Documentation/admin-guide/device-mapper/verity.rst`; cryptsetup, `lib/verity/`.)

mod digest;
mod error;
mod metadata;
mod parallel;
mod seal;
mod storage;
mod superblock;
mod tree;

pub use error::{Corrupt, VerityError};
pub use metadata::Metadata;
pub use seal::{Sealed, find, seal};
pub use storage::{ReadAt, WriteAt};
pub use superblock::{Place, SUPERBLOCK_SIZE, Superblock};
pub use tree::{Parameters, Progress, Tree, format, root_digest, verify};
