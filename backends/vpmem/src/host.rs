//! The host's side: choosing a device or a range of one for each disk, and having a hypervisor put it there.

mod attacher;
mod devices;
mod packing;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;

pub use attacher::Attacher;
pub use devices::{InvalidReserved, Mode};
pub use packing::{MAX_MAPPINGS, PackedRange, Packing};
pub use transport::{SlotEntry, VpmemTransport};
