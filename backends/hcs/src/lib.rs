//! Hyper-V as hypervisor for blockmount: disks on SCSI controllers and as persistent memory (VPMEM), put into a VM by documents of
//! the Host Compute Service (HCS), and mounted by requests that the service passes on to the guest.
//!
//! The service is whatever implements [`ComputeSystem`]. On Windows that is `HcsSystem`, a VM by its id. Here it is one that
//! does as it is told and remembers the documents:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//!
//! use async_trait::async_trait;
//! use blockmount::{Disk, Transport};
//! use blockmount_hcs::documents::{ModifySettingRequest, Properties, PropertyQuery};
//! use blockmount_hcs::{ComputeSystem, GuestOs, HcsError, ScsiAttacher};
//! use blockmount_scsi::{Attacher, ScsiTransport};
//!
//! #[derive(Default)]
//! struct Recorder(Mutex<Vec<String>>);
//!
//! #[async_trait]
//! impl ComputeSystem for Recorder {
//!     async fn modify(&self, request: &ModifySettingRequest) -> Result<(), HcsError> {
//!         self.0.lock().unwrap().push(request.to_json());
//!         Ok(())
//!     }
//!     async fn properties(&self, _: &PropertyQuery) -> Result<Properties, HcsError> {
//!         Ok(Properties::default())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let system = Arc::new(Recorder::default());
//! let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
//! let geometry = attacher.geometry();
//! // The VM has its root disk at 0/0.
//! let scsi = ScsiTransport::new(attacher, geometry, &["0/0".parse()?])?;
//! let layer = Disk::extensible("layers", "sha256/ab").read_only();
//! let locator = scsi.attach(&layer, &scsi.identify(&layer).await?).await?;
//! assert_eq!(locator.as_str(), "scsi:0/1");
//! scsi.detach(&layer).await?;
//! assert_eq!(*system.0.lock().unwrap(), [
//!     r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/1","RequestType":"Add","Settings":{"Type":"ExtensibleVirtualDisk","Path":"sha256/ab","ReadOnly":true,"ExtensibleVirtualDiskType":"layers"}}"#,
//!     r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/1","RequestType":"Remove"}"#,
//! ]);
//! # Ok(())
//! # }
//! ```
//!
//! With a VM of this machine (Windows 10 1809, Windows Server 2019 and later; the process must be of an administrator or of the
//! group Hyper-V Administrators):
//!
//! ```no_run
//! # #[cfg(windows)]
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use blockmount::{Disk, Manager, MountOptions, MountRequest};
//! use blockmount_hcs::{GuestOs, HcsChannel, HcsGuest, HcsSystem, ScsiAttacher, grant_vm_access};
//! use blockmount_scsi::ScsiTransport;
//!
//! let id = "my-vm";
//! let system = HcsSystem::open(id).await?;
//! let attacher = ScsiAttacher::new(system.clone(), GuestOs::Linux);
//! let geometry = attacher.geometry();
//! let guest = HcsGuest::new(HcsChannel::open(system, GuestOs::Linux).await?);
//! let manager = Manager::builder()
//!     .transport(ScsiTransport::new(attacher, geometry, &["0/0".parse()?])?)
//!     .unplugger(guest.clone())
//!     .mounter(guest.clone())
//!     .combiner(guest)
//!     .build();
//! let disk = Disk::virtual_disk(r"C:\layers\base.vhd").read_only();
//! grant_vm_access(id, disk.source()).await?;
//! let mount = manager.add(&disk, &MountRequest::new(MountOptions::read_only())).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Architecture
//!
//! ```text
//! ScsiTransport ── ScsiAttacher  ─┐                                  ┌─ HcsSystem ── computecore.dll ~~~ the service
//! VPMEM         ── VpmemAttacher ─┼─ Vm (error kinds, in doubt) ── ComputeSystem
//! HcsGuest      ── HcsChannel    ─┘                                  └─ your own
//!  (the bridge's ledger and requests)
//! ```
//!
//! - **Access is the caller's business.** No attacher grants it; `grant_vm_access` and `grant_vm_group_access` are functions
//!   that a program calls, once for each file.
//! - **The service opens disks by their paths.** A disk is identified again right before its document is sent; a file that is
//!   replaced after that is attached unnoticed.
//! - **What a guest cannot mount is not attached.** The agent of a Windows guest knows only SCSI controller 0 and no VPMEM.
//!   [`ScsiAttacher::geometry`] keeps the transport to that, and an attacher refuses anything else before it asks the service.
//! - **No path ends a document early.** Documents are written from types, by one encoder; what is no Unicode or has a NUL in it
//!   is refused.
//! - **A callback finds nothing that it could break.** The service is given the number of an operation, never a pointer.
//!
//! # Errors
//!
//! | the service | kind |
//! |---|---|
//! | knows no such VM, or says that it has ended; the handle was closed | `Gone` |
//! | does not answer within the deadline, answers with a time-out or a lost connection | `Uncertain`, or `Gone` if its properties say that the VM has ended |
//! | says that the VM is in no state for it (paused) | `Busy`, or `Gone` likewise |
//! | has a disk at the address already | `Conflict` |
//! | has nothing at the address | success, where it was to be removed |
//! | does not find the file | `NotFound` |
//! | lets a guest fail to set something up and does not say why | `Uncertain` |
//! | says anything else | by its number ([`Hresult::kind`](blockmount_bridge::gcs::Hresult::kind)), else `Other` |
//!
//! After `Uncertain` the address is in doubt: the transport uses it for nothing else, and before the disk is removed the service
//! is asked whether the VM lives at all, so that a VM that hangs costs no long deadline for each of its disks. Numbers are compared by
//! their 32 bits, with either prefix that the service has for its own. A disk that is added after its time-out, when its address
//! is free again, is noticed by the next one there, and removed.
//!
//! # After a restart
//!
//! The service does not say which disks a VM has. The properties of a VM (schema 2, as hcsshim has it in
//! `internal/hcs/schema2/properties.go`) have nothing about its devices, and the query `MappedVirtualDisk` is answered for
//! compute systems of schema 1 only (`internal/hcs/schema1`). So a disk that a journal remembers is `Absent` if the VM has ended,
//! and else `Unknown`: its address is quarantined, whoever held it learns that it is lost, and the tear-down that follows, which
//! the guest begins, frees the address. A removal where nothing is any more is a success. What others may have put at that
//! address since cannot be told from ours, so nobody else may use the addresses of a transport.
//!
//! | file | concern |
//! |---|---|
//! | `documents.rs`, `documents/*.rs` | the documents: requests, paths, the part of a VM's document that is about disks, properties |
//! | `compute_system.rs` | what the service does |
//! | `vm.rs` | what its errors mean, and what is in doubt after them |
//! | `disk.rs` | disks of the host: which one is meant, how they are named to the service |
//! | `scsi_attacher.rs`, `vpmem_attacher.rs` | the contracts of the transports |
//! | `guest.rs` | the guest behind the service |
//! | `windows.rs`, `windows/*.rs` | the service itself, on Windows |

mod compute_system;
mod disk;
pub mod documents;
#[cfg(windows)]
mod files;
mod guest;
mod scsi_attacher;
mod vm;
mod vpmem_attacher;
#[cfg(windows)]
mod windows;

pub use compute_system::{ComputeSystem, HcsError};
pub use guest::{GuestOs, HcsChannel, HcsGuest};
pub use scsi_attacher::ScsiAttacher;
pub use vpmem_attacher::VpmemAttacher;
#[cfg(windows)]
pub use windows::{HcsDeadlines, HcsSystem, grant_vm_access, grant_vm_group_access};
