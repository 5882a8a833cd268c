//! Disks on the SCSI controllers of a virtual machine.
//!
//! A [`ScsiTransport`] gives each disk an address of its own ([`ScsiAddress`]: a controller and a LUN), and has a
//! hypervisor put it there. The hypervisor is whatever implements [`Attacher`]; here, one that
//! keeps its disks in memory:
//!
//! ```
//! use std::collections::{BTreeMap, BTreeSet};
//! use std::path::PathBuf;
//! use std::sync::Mutex;
//!
//! use async_trait::async_trait;
//! use blockmount::placement::Occupant;
//! use blockmount::{BackendError, Disk, DiskId, Transport};
//! use blockmount_scsi::{Attacher, Geometry, ScsiAddress, ScsiTransport};
//!
//! struct InMemory {
//!     images: BTreeSet<PathBuf>,
//!     bus: Mutex<BTreeMap<ScsiAddress, DiskId>>,
//! }
//!
//! #[async_trait]
//! impl Attacher for InMemory {
//!     async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
//!         match self.images.get(disk.source()) {
//!             Some(image) => Ok(DiskId::name(&image.to_string_lossy())),
//!             None => Err(BackendError::not_found(format!("there is no disk {disk}"))),
//!         }
//!     }
//!     async fn attach(&self, address: ScsiAddress, disk: &Disk, id: &DiskId) -> Result<(), BackendError> {
//!         if self.identify(disk).await? != *id {
//!             return Err(BackendError::conflict(format!("disk {disk} was replaced")));
//!         }
//!         self.bus.lock().unwrap().insert(address, id.clone());
//!         Ok(())
//!     }
//!     async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
//!         self.bus.lock().unwrap().remove(&address);
//!         Ok(())
//!     }
//!     async fn resize(&self, _: ScsiAddress, _: &Disk, _: u64) -> Result<(), BackendError> {
//!         Err(BackendError::unsuitable("what is in memory keeps its size"))
//!     }
//!     async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
//!         let bus = self.bus.lock().unwrap();
//!         Ok(bus.iter().map(|(at, id)| Occupant::new(*at, Some(id.clone()))).collect())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let root: ScsiAddress = "0/0".parse()?; // the VM boots from it
//! let memory = InMemory { images: ["/images/base.vhdx".into()].into(), bus: Mutex::default() };
//! let scsi = ScsiTransport::new(memory, Geometry::HYPER_V, &[root])?;
//! let disk = Disk::virtual_disk("/images/base.vhdx").read_only();
//! let locator = scsi.attach(&disk, &scsi.identify(&disk).await?).await?;
//! assert_eq!(locator.as_str(), "scsi:0/1");
//! scsi.detach(&disk).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Most programs give the transport to a [`blockmount::Manager`], which shares and counts.
//!
//! # What an implementor of [`Attacher`] must do
//!
//! Put the disk at the address it is told, allow calls for different addresses at once, and answer
//! `Uncertain` whenever it cannot prove what has happened. What it gets in exchange is in the
//! documentation of the trait: one call at a time for an address, and no address twice.
//!
//! | file | concern |
//! |---|---|
//! | `address.rs` | controller, LUN, and their locator `scsi:0/3` |
//! | `geometry.rs` | how many of them there are |
//! | `host/attacher.rs` | what a hypervisor has to do |
//! | `host/transport.rs` | which disk is at which address |
//! | `guest/` | finding and unplugging the disks in a Linux guest |
//!
//! # Features
//!
//! `host` has the transport and [`Attacher`], and builds for Linux and Windows. `guest` has `ScsiResolver` and
//! `ScsiUnplugger`, in Linux only. Both are on by default. Without either there are the addresses, [`SCHEME`] and
//! [`Geometry`]. `testing` has shortcuts for tests of attachers.

mod address;
mod geometry;
#[cfg(all(feature = "guest", target_os = "linux"))]
mod guest;
#[cfg(feature = "host")]
mod host;

pub use address::{Controller, HYPER_V_CONTROLLERS, InvalidAddress, Lun, SCHEME, ScsiAddress};
pub use geometry::{Geometry, InvalidGeometry};
#[cfg(all(feature = "guest", target_os = "linux"))]
pub use guest::{ControllerId, ScsiResolver, ScsiUnplugger};
#[cfg(feature = "testing")]
pub use host::testing;
#[cfg(feature = "host")]
pub use host::{Attacher, InvalidReserved, ScsiTransport, SlotEntry};
