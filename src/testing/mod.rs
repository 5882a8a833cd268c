//! Tests for backends, and for programs that use the managers (feature `testing`).
//!
//! - [`FakeVm`] is a VM in memory that implements every contract. A test decides how its calls end, and
//!   reads from its log whether the caller kept its side of the contracts.
//! - [`conformance`] has the checks of each contract, for the author of a backend.
//! - [`MemoryJournal`] is a journal for restarts without a process that ends.
//! - [`Seed`], [`random_faults`] and [`random_delays`] make schedules that can be repeated.
//!
//! # A backend of your own
//!
//! Say that your hypervisor has sixteen disk bays. Write the transport, describe in a fixture what
//! your tests have to work on, and run the suite:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//!
//! use async_trait::async_trait;
//! use blockmount::testing::VmStep;
//! use blockmount::testing::conformance::{self, Fault, Faults, TransportFixture};
//! use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Presence, Transport};
//!
//! /// A hypervisor in memory: which disk is in which bay, and whether it leaves the next call without
//! /// an answer. A real backend has a connection to the hypervisor here.
//! #[derive(Clone, Default)]
//! struct Hypervisor(Arc<Mutex<([Option<DiskId>; 16], bool)>>);
//!
//! impl Hypervisor {
//!     fn set(&self, bay: usize, disk: Option<DiskId>) -> Result<(), BackendError> {
//!         let (bays, silent) = &mut *self.0.lock().unwrap();
//!         bays[bay] = disk;
//!         match std::mem::take(silent) {
//!             true => Err(BackendError::uncertain(format!("no answer about bay {bay} in 5 s"))),
//!             false => Ok(()),
//!         }
//!     }
//!
//!     fn find(&self, disk: &DiskId) -> Option<usize> {
//!         self.0.lock().unwrap().0.iter().position(|there| there.as_ref() == Some(disk))
//!     }
//!
//!     fn list(&self) -> Vec<String> {
//!         self.0.lock().unwrap().0.iter().flatten().map(DiskId::to_string).collect()
//!     }
//! }
//!
//! struct BayTransport {
//!     hypervisor: Hypervisor,
//!     /// Which disk has which bay, from before the hypervisor hears of it until it is out for certain.
//!     bays: Mutex<[Option<DiskId>; 16]>,
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
//!         if self.identify(disk).await? != *id {
//!             return Err(BackendError::conflict(format!("disk {disk} is not {id} any more")));
//!         }
//!         let mut bays = self.bays.lock().unwrap();
//!         let Some(bay) = bays.iter().position(Option::is_none) else {
//!             return Err(BackendError::full(format!("no bay is free for disk {disk}")));
//!         };
//!         // If the answer is lost, the bay stays the disk's until it is detached.
//!         bays[bay] = Some(id.clone());
//!         self.hypervisor.set(bay, Some(id.clone()))?;
//!         Ok(DeviceLocator::new("bay", bay).expect("a number is an address"))
//!     }
//!
//!     // What is absent is detached, also when its source is gone: this must not identify the disk.
//!     async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
//!         let id = Some(identity(disk));
//!         let mut bays = self.bays.lock().unwrap();
//!         if let Some(bay) = bays.iter().position(|there| *there == id) {
//!             self.hypervisor.set(bay, None)?;
//!             bays[bay] = None;
//!         }
//!         Ok(())
//!     }
//!
//!     async fn resize(&self, disk: &Disk, _: u64) -> Result<(), BackendError> {
//!         Err(BackendError::unsuitable(format!("disk {disk} keeps its size")))
//!     }
//!
//!     // After a restart: the hypervisor knows what is in its bays.
//!     async fn adopt(
//!         &self,
//!         _: &Disk,
//!         id: &DiskId,
//!         _: Option<&DeviceLocator>,
//!     ) -> Result<Presence<DeviceLocator>, BackendError> {
//!         let there = self.hypervisor.find(id);
//!         let Some(bay) = there else { return Ok(Presence::Absent) };
//!         self.bays.lock().unwrap()[bay] = Some(id.clone());
//!         Ok(Presence::Present(DeviceLocator::new("bay", bay).expect("a number is an address")))
//!     }
//! }
//!
//! #[async_trait]
//! impl Faults for Hypervisor {
//!     async fn inject(&self, _: VmStep, fault: Fault) -> bool {
//!         let silent = fault == Fault::Uncertain { happens: true };
//!         self.0.lock().unwrap().1 = silent;
//!         silent
//!     }
//!
//!     async fn clear(&self) {
//!         self.0.lock().unwrap().1 = false;
//!     }
//! }
//!
//! // In your crate this is a `#[tokio::test]`.
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! # runtime.block_on(async {
//! let hypervisor = Hypervisor::default();
//! let transport = BayTransport { hypervisor: hypervisor.clone(), bays: Mutex::default() };
//! let (tables, faults) = (hypervisor.clone(), hypervisor);
//! let fixture = TransportFixture::new(
//!     (0..17).map(|n| Disk::virtual_disk(format!("/images/{n}.img"))),
//!     Disk::virtual_disk("/images/missing.img"),
//!     move || tables.list(),
//! )
//! .capacity(16)
//! .faults(faults);
//! let passed = conformance::transport(&transport, &fixture).await;
//! println!("{passed}"); // also names the checks that were not run
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
//! Had `attach` forgotten the disk when the answer was lost, it would be
//!
//! ```text
//! the transport broke the check "detaching after an attach in doubt succeeds and leaves nothing":
//! detach left ["/images/0.img"] more and [] less in the tables
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
mod journal;
mod log;
mod names;
mod running;
mod seed;
mod sizes;
mod state;

pub use attach::AttachIdentified;
pub use check::{Rule, Violation};
pub use fake::FakeVm;
pub use gate::{Call, Gate, Key, VmStep};
pub use journal::MemoryJournal;
pub use log::{Event, Outcome, Phase};
pub use seed::{Seed, random_delays, random_faults};
