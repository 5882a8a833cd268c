//! A journal in a file for `blockmount`: what is attached and mounted is found again after a restart.
//!
//! ```no_run
//! use blockmount::{HolderName, Manager, MountOptions, MountRequest};
//! use blockmount_journal::FileJournal;
//!
//! # async fn example(builder: blockmount::ManagerBuilder, layer: blockmount::Disk) -> Result<(), Box<dyn std::error::Error>> {
//! let journal = FileJournal::open("/run/my-runtime/vm1")?;
//! let recovery = builder.recover(journal).await?;
//! let web = HolderName::new("web")?;
//! let mount = match recovery.claim(&web) {
//!     Ok(held) => held.into_mount().ok_or("web held a mount")?, // the process before was killed
//!     Err(_) => {
//!         let request = MountRequest::new(MountOptions::read_only()).held_by(web);
//!         recovery.manager().add(&layer, &request).await?
//!     }
//! };
//! recovery.settle().await; // what nobody has claimed is released
//! # let _ = mount;
//! # Ok(())
//! # }
//! ```
//!
//! # The file
//!
//! A directory of its own (0700) holds one file, `journal` (0600), to which changes are appended. It belongs in `/run`: a VM
//! does not outlive a boot of its host, and neither should what is remembered of it. Nothing is synchronised to a medium
//! unless [`FileJournalBuilder::sync`] asks for it: the file survives its process without that.
//!
//! ```text
//! file   = "blockmount journal 1\n", change ...
//! change = length of the text (u32, little-endian), CRC-32C of these four bytes, CRC-32C of the text, text (JSON)
//! ```
//!
//! A process that is killed in a write leaves the first bytes of a change at the end of the file, and a power failure may leave
//! zeros there: both are cut off when the file is opened. Anything else that does not fit its checksum is damage, which is an
//! error and is left as it is. The length has a checksum of its own, so that a damaged length is not taken for the end.
//!
//! Where there is no space left, a change is refused and the file stays as it was; a manager goes on with its tear-downs (see
//! [`blockmount::journal`]). The last record can be removed without any space.
//!
//! Once the file has more outdated changes than live ones, the live ones are written to a new file, which is renamed into
//! place. A change takes one `write`: 0.3 µs in a tmpfs, where a commit of an embedded database (redb 3) takes 20; an add has
//! four changes, and one more if it has a holder.

#![cfg(target_os = "linux")]

mod directory;
mod file_journal;
mod format;

pub use file_journal::{FileJournal, FileJournalBuilder};
