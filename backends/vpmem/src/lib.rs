//! Disks as persistent memory of a virtual machine (VPMEM): whole devices, and many disks packed on one.
//!
//! A [`VpmemTransport`] gives each read-only disk a device of its own, or a range of one ([`VpmemAddress`]), and
//! has a hypervisor put it there. The hypervisor is whatever implements [`Attacher`]; here, one that
//! keeps its disks in memory:
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Mutex;
//!
//! use async_trait::async_trait;
//! use blockmount::placement::Occupant;
//! use blockmount::{BackendError, Disk, DiskId, Transport};
//! use blockmount_vpmem::{Attacher, ByteRange, DeviceNumber, Geometry, Mode, VpmemAddress, VpmemTransport};
//!
//! type Key = (DeviceNumber, Option<ByteRange>);
//!
//! #[derive(Default)]
//! struct InMemory(Mutex<BTreeMap<Key, Disk>>);
//!
//! impl InMemory {
//!     fn put(&self, key: Key, disk: &Disk) -> Result<(), BackendError> {
//!         self.0.lock().unwrap().insert(key, disk.clone());
//!         Ok(())
//!     }
//!     fn take(&self, key: Key) -> Result<(), BackendError> {
//!         self.0.lock().unwrap().remove(&key);
//!         Ok(())
//!     }
//! }
//!
//! #[async_trait]
//! impl Attacher for InMemory {
//!     async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
//!         Ok(DiskId::name(&disk.source().to_string_lossy()))
//!     }
//!     async fn size(&self, _: &Disk) -> Result<u64, BackendError> {
//!         Ok((5 << 20) + 512)
//!     }
//!     async fn attach(&self, device: DeviceNumber, disk: &Disk, _: &DiskId) -> Result<(), BackendError> {
//!         self.put((device, None), disk)
//!     }
//!     async fn detach(&self, device: DeviceNumber) -> Result<(), BackendError> {
//!         self.take((device, None))
//!     }
//!     async fn map(&self, device: DeviceNumber, range: ByteRange, disk: &Disk, _: &DiskId) -> Result<(), BackendError> {
//!         self.put((device, Some(range)), disk)
//!     }
//!     async fn unmap(&self, device: DeviceNumber, range: ByteRange) -> Result<(), BackendError> {
//!         self.take((device, Some(range)))
//!     }
//!     async fn list(&self) -> Result<Vec<Occupant<VpmemAddress>>, BackendError> {
//!         let keys = self.0.lock().unwrap().keys().copied().collect::<Vec<Key>>();
//!         let address = |(device, range)| VpmemAddress { device, range };
//!         Ok(keys.into_iter().map(|key| Occupant::new(address(key), None)).collect())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let root = DeviceNumber::try_from(0)?; // the VM boots from it
//! let vpmem = VpmemTransport::new(InMemory::default(), Geometry::default(), Mode::Packed, &[root])?;
//! let layers = ["/images/base.erofs", "/images/app.erofs"].map(|image| Disk::virtual_disk(image).read_only());
//! for (layer, expected) in layers.iter().zip(["vpmem:1@0+5246976", "vpmem:1@5246976+5246976"]) {
//!     let locator = vpmem.attach(layer, &vpmem.identify(layer).await?).await?;
//!     assert_eq!(locator.as_str(), expected);
//! }
//! for layer in &layers {
//!     vpmem.detach(layer).await?;
//! }
//! let writable = Disk::virtual_disk("/run/scratch.img");
//! let id = vpmem.identify(&writable).await?;
//! assert!(vpmem.attach(&writable, &id).await.is_err());
//! # Ok(())
//! # }
//! ```
//!
//! Most programs give the transport to a [`blockmount::Manager`], which shares and counts, in front of one
//! that takes what does not fit here.
//!
//! # What an implementor of [`Attacher`] must do
//!
//! Put the disk on the device, or map it to the range, that it is told, so that the guest can only read it; allow
//! calls for different addresses at once, also on one device; answer `Uncertain` whenever it
//! cannot prove what has happened; and answer `Unsuitable` for a device that it can never take out.
//! What it gets in exchange is in the documentation of the trait: one call at a time for an address, and no
//! address twice.
//!
//! | file | concern |
//! |---|---|
//! | `address.rs` | device numbers, byte ranges, and their locators `vpmem:2`, `vpmem:2@4194304+1052672` |
//! | `geometry.rs` | how many devices there are, and how large |
//! | `host/attacher.rs` | what a hypervisor has to do |
//! | `host/transport.rs` | which disk is on which device or range |
//! | `host/devices.rs` | which devices and ranges are free |
//! | `host/packing.rs` | which pages of a device belong to which disk |
//! | `guest/` | finding and unplugging a device in a Linux guest |
//!
//! # Features
//!
//! `host` has the transport and [`Attacher`], and builds for Linux and Windows. `guest` has `VpmemResolver` and
//! `VpmemUnplugger`, in Linux only. Both are on by default. Without either there are the addresses, [`SCHEME`] and
//! [`Geometry`]. `testing` has shortcuts for tests of attachers.

mod address;
mod geometry;
#[cfg(all(feature = "guest", target_os = "linux"))]
mod guest;
#[cfg(feature = "host")]
mod host;

pub use address::{ByteRange, DeviceNumber, InvalidAddress, PAGE, SCHEME, VpmemAddress};
pub use geometry::{Geometry, InvalidGeometry};
#[cfg(all(feature = "guest", target_os = "linux"))]
pub use guest::{PmemId, VpmemResolver, VpmemUnplugger};
#[cfg(feature = "testing")]
pub use host::testing;
#[cfg(feature = "host")]
pub use host::{
    Attacher, InvalidReserved, MAX_MAPPINGS, Mode, PackedRange, Packing, SlotEntry, VpmemTransport,
};
