//! QEMU as hypervisor for blockmount: starts virtual machines and plugs disks into them.

pub mod qmp;
pub mod scsi;

pub use qmp::{Qmp, QmpError};
pub use scsi::QemuScsi;
