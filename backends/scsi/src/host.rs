//! The host's side: choosing an address for each disk, and having a hypervisor put it there.

mod attacher;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;

pub use attacher::Attacher;
pub use transport::{InvalidReserved, ScsiTransport, SlotEntry};
