//! Tests for backends, and for programs that use the managers (feature `testing`).
//!
//! - [`FakeVm`] is a VM in memory that implements every contract. A test decides how its calls end, and
//!   reads from its log whether the caller kept its side of the contracts.
//! - [`conformance`] has the checks of each contract, for whoever writes a backend.
//! - [`Seed`], [`random_faults`] and [`random_delays`] make schedules that can be repeated.
//!
//! # A backend of your own in an afternoon
//!
//! Say that your hypervisor has sixteen disk bays. Write the transport, describe in a fixture what
//! your tests have to work on, and run the suite:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//!
//! use async_trait::async_trait;
//! use blockmount::testing::conformance::{self, TransportFixture};
//! use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Transport};
//!
//! /// Which disk is in which bay; a real backend asks its hypervisor.
//! type Bays = Arc<Mutex<[Option<DiskId>; 16]>>;
//!
//! struct BayTransport {
//!     bays: Bays,
//! }
//!
//! /// A real backend looks at the file; this one believes all names but one.
//! fn identity(disk: &Disk) -> DiskId {
//!     DiskId::name(&disk.source().to_string_lossy())
//! }
//!
//! #[async_trait]
//! impl Transport for BayTransport {
//!     async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
//!         if disk.source().ends_with("missing.img") {
//!             return Err(BackendError::not_found(format!("there is no disk {disk}")));
//!         }
//!         Ok(identity(disk))
//!     }
//!
//!     async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
//!         let id = self.identify(disk).await?;
//!         let mut bays = self.bays.lock().unwrap();
//!         let Some(bay) = bays.iter().position(Option::is_none) else {
//!             return Err(BackendError::full(format!("no bay is free for disk {disk}")));
//!         };
//!         bays[bay] = Some(id);
//!         Ok(DeviceLocator::new("bay", bay).expect("a number is an address"))
//!     }
//!
//!     // What is absent is detached, also when its source is gone: this must not identify the disk.
//!     async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
//!         let id = identity(disk);
//!         for bay in self.bays.lock().unwrap().iter_mut() {
//!             bay.take_if(|there| *there == id);
//!         }
//!         Ok(())
//!     }
//! }
//!
//! // In your crate this is a `#[tokio::test]`.
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! # runtime.block_on(async {
//! let bays = Bays::default();
//! let transport = BayTransport { bays: bays.clone() };
//! let fixture = TransportFixture::new(
//!     (0..17).map(|n| Disk::virtual_disk(format!("/images/{n}.img"))),
//!     Disk::virtual_disk("/images/missing.img"),
//!     move || bays.lock().unwrap().iter().flatten().map(DiskId::to_string).collect(),
//! )
//! .capacity(16);
//! let passed = conformance::transport(&transport, &fixture).await;
//! assert!(passed.successes > 50);
//! # });
//! ```
//!
//! A check that does not hold is a panic that names it: had `detach` begun with
//! `self.identify(disk).await?`, the answer would be
//!
//! ```text
//! the transport broke the check "detaching what was never attached succeeds":
//! detach of /images/missing.img (read-write) answered not found: there is no disk ...
//! ```
//!
//! # What a program does with your backend
//!
//! A program that uses the managers tests itself over a [`FakeVm`] the same way: give clones of it to the
//! manager as each of its backends, set gates, run the program, and end with
//! [`FakeVm::check`] and [`FakeVm::assert_empty`].

mod attach;
mod backend;
mod check;
pub mod conformance;
mod fake;
mod faults;
mod gate;
mod log;
mod names;
mod running;
mod seed;
mod state;

pub use attach::AttachIdentified;
pub use check::{Rule, Violation};
pub use fake::FakeVm;
pub use gate::{Call, Gate, Key, VmStep};
pub use log::{Event, Outcome, Phase};
pub use seed::{Seed, random_delays, random_faults};
