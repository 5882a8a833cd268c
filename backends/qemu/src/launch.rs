//! Starting virtual machines: what they boot, their hardware, their processes, and the streams into their guests.
//!
//! | file | concern |
//! |---|---|
//! | `kernel.rs`, `modules.rs`, `program.rs`, `cpio.rs`, `image.rs` | what a guest boots |
//! | `hardware.rs` | what a VM has, and where the guest finds it |
//! | `builder.rs`, `saved.rs` | which start it is: by booting, or from a saved state; KVM where it works |
//! | `boot.rs` | one start, until the guest is up |
//! | `migrate.rs` | a VM that goes on in another QEMU |
//! | `process.rs`, `spawn.rs`, `detached.rs` | the process, and one that outlives us |
//! | `shown.rs` | images of other formats, shown as raw files without a VM |
//! | `vm.rs`, `port.rs`, `channel.rs` | the running VM, and the streams into its guest |

mod boot;
mod builder;
mod channel;
mod cpio;
mod detached;
mod error;
mod hardware;
mod image;
mod kernel;
mod migrate;
mod modules;
mod port;
mod process;
mod program;
mod saved;
mod shown;
mod spawn;
mod vm;

pub use builder::{Accelerator, VmBuilder};
pub use channel::{AgentChannel, AgentPort};
pub use error::VmError;
pub use hardware::{MAX_CONTROLLERS, MAX_MEMORY_PORTS, controller_address, memory_port_address};
pub use image::{
    AEAD_MODULES, ENCRYPTION_MODULES, GuestImage, GuestImageBuilder, MODULE_LIST, MODULES,
    PROGRAMS, VERITY_MODULES,
};
pub use kernel::GuestKernel;
pub use migrate::IncomingVm;
pub use port::GuestStream;
pub use saved::abandoned_state;
pub use shown::ShownImages;
pub use vm::Vm;
