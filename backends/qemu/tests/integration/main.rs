//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod common;

mod adopt;
mod adopt_vpmem;
mod conformance;
mod half_done;
mod images;
mod in_doubt;
mod qmp_peers;
mod qmp_qemu;
mod qmp_random;
mod qmp_slow;
mod replaced;
mod root_qemu_devices;
#[cfg(feature = "launch")]
mod starting;
mod vpmem;
