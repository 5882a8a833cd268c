//! QEMU as hypervisor for blockmount: starts virtual machines and plugs disks into them.
//!
#![cfg_attr(feature = "launch", doc = "```no_run")]
#![cfg_attr(not(feature = "launch"), doc = "```ignore")]
//! use blockmount::{Disk, Manager, MountOptions, MountRequest};
//! use blockmount_qemu::{GuestImage, GuestKernel, Vm, controller_address};
//! use blockmount_scsi::ScsiTransport;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // A guest whose only program is the agent.
//! let arguments = format!("--scsi-controller\npci:{}\n", controller_address(0));
//! let image = GuestImage::builder(GuestKernel::find()?)
//!     .program("/usr/local/bin/blockmount")
//!     .file("/etc/blockmount/agent.args", arguments)
//!     .build()
//!     .await?;
//! // It boots once; later ones go on from its saved state.
//! let states = "/var/cache/blockmount/states";
//! let vm = Vm::builder(image).controllers(1).saved_states(states).start().await?;
//!
//! let guest = vm.guest("blockmount.agent").await?;
//! let scsi = ScsiTransport::new(vm.scsi(), vm.scsi().geometry(), &[])?;
//! let manager = Manager::builder()
//!     .transport(scsi)
//!     .unplugger(guest.clone())
//!     .mounter(guest.clone())
//!     .combiner(guest)
//!     .mount_root("/run/mounts")
//!     .build();
//! let layer = Disk::virtual_disk("/images/base.erofs").read_only();
//! let mount = manager.add(&layer, &MountRequest::new(MountOptions::read_only())).await?;
//! println!("{} is at {} in the guest", mount.locator(), mount.path().display());
//! mount.release().await?;
//! vm.shut_down().await;
//! # Ok(())
//! # }
//! ```
//!
//! [`QemuScsi`] and [`QemuVpmem`] work with a QEMU that somebody else has started, too: all they need is its monitor, a
//! [`Qmp`]. Guests are x86-64.
//!
//! # Architecture
//!
//! ```text
//! Vm ── Process             QEMU, which ends when we do, however that is
//!  ├─── Qmp                 the monitor: an inherited descriptor
//!  ├─── QemuScsi, QemuVpmem the attachers
//!  └─── Ports ── GuestStream ── AgentChannel ── BridgeGuest ~~~ the agent in the guest
//! ```
//!
//! - **A stream is a port.** Each stream to a program in the guest is a virtio-serial port of its own, plugged for it and
//!   unplugged with it, because a port that is used again has bytes of the last stream in it. It ends when the
//!   program does, which QEMU tells by an event at most once a second.
//! - **An agent is not a guest.** An agent that dies comes back, and has its mounts still: the next request goes over a
//!   new stream. Only when QEMU is gone is the guest `Gone`.
//! - **A state is a guest that was booted.** It is kept under a digest of all that it depends on, and a VM that goes on
//!   from it is up in less than half a second.
//!
//! # Errors
//!
//! `VmError` for the VM as a whole: its message has the last words of QEMU and of the guest's console where they tell
//! why. [`QmpError`] for the monitor. The attachers answer by kind, as their contracts say.
//!
//! | file | concern |
//! |---|---|
//! | `qmp.rs`, `qmp/` | the monitor's protocol |
//! | `scsi.rs`, `scsi/` | SCSI disks |
//! | `vpmem.rs`, `vpmem/` | persistent memory |
//! | `plug.rs`, `plug/` | a device that comes and goes |
//! | `source.rs` | the file behind a disk |
//! | `launch.rs`, `launch/` | starting VMs: the feature `launch`, which is on by default |
//!
//! Without the feature there are the monitor and the attachers, for a QEMU that another program starts.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    //! What the targets in `fuzz/` call.
    pub use crate::scsi::fuzz_qcow2 as qcow2;
}
mod image_format;
#[cfg(feature = "launch")]
mod launch;
mod open_file;
mod plug;
pub mod qmp;
pub mod scsi;
pub mod vpmem;

pub use image_format::ImageFormat;
#[cfg(feature = "launch")]
pub use launch::{
    AEAD_MODULES, Accelerator, AgentChannel, AgentPort, ENCRYPTION_MODULES, GuestImage,
    GuestImageBuilder, GuestKernel, GuestStream, IncomingVm, MAX_CONTROLLERS, MAX_MEMORY_PORTS,
    MODULE_LIST, MODULES, PROGRAMS, ShownImages, VERITY_MODULES, Vm, VmBuilder, VmError,
    abandoned_state, controller_address, memory_port_address,
};
pub use qmp::{Qmp, QmpError};
pub use scsi::QemuScsi;
pub use vpmem::QemuVpmem;
