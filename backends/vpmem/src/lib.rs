//! Disks as persistent memory of a virtual machine (VPMEM): whole devices, and many disks packed on one.
//!
//! | file | concern |
//! |---|---|
//! | `address.rs` | device numbers, byte ranges, and their locators `vpmem:2`, `vpmem:2@4194304+1052672` |
//! | `attacher.rs` | what a hypervisor has to do |

mod address;
mod attacher;
#[cfg(target_os = "linux")]
mod resolver;

pub use address::{ByteRange, DeviceNumber, InvalidAddress, PAGE, SCHEME, VpmemAddress};
pub use attacher::Attacher;
#[cfg(target_os = "linux")]
pub use resolver::{PmemId, VpmemResolver, VpmemUnplugger};
