//! QEMU as hypervisor for blockmount: starts virtual machines and plugs disks into them.

mod channel;
mod cpio;
mod error;
mod hardware;
mod image;
mod kernel;
mod modules;
mod port;
mod process;
mod program;
pub mod qmp;
mod saved;
pub mod scsi;
mod spawn;
mod start;
mod vm;
pub mod vpmem;

pub use channel::AgentChannel;
pub use error::VmError;
pub use hardware::{MAX_CONTROLLERS, MAX_MEMORY_PORTS, PciAddress};
pub use image::{GuestImage, GuestImageBuilder, MODULE_LIST, MODULES};
pub use kernel::GuestKernel;
pub use port::GuestStream;
pub use qmp::{Qmp, QmpError};
pub use scsi::QemuScsi;
pub use start::{Accelerator, VmBuilder};
pub use vm::Vm;
pub use vpmem::QemuVpmem;
