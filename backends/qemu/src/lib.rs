//! QEMU as hypervisor for blockmount: starts virtual machines and plugs disks into them.

pub mod qmp;

pub use qmp::{Qmp, QmpError};
