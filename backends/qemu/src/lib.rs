//! QEMU as hypervisor for blockmount: starts virtual machines and plugs disks into them.

pub mod qmp;
pub mod scsi;
pub mod vpmem;

pub use qmp::{Qmp, QmpError};
pub use scsi::QemuScsi;
pub use vpmem::QemuVpmem;
