//! Writes what a guest boots besides its kernel into a file: the agent as `/init`, the kernel's modules, and what the agent is
//! told. For a VM that another program starts, such as that of `foreign_vm.rs`.
//!
//! ```console
//! $ cargo build --release
//! $ cargo run -p blockmount-qemu --example guest_image -- target/release/blockmount guest.cpio
//! the kernel of this guest is /var/lib/blockmount/kernel/vmlinuz
//! ```
//!
//! The smaller `target/release/blockmount-agent` does as well, but for `blockmount demo`, which needs the checker in the guest.

use std::error::Error;
use std::path::Path;

use blockmount_qemu::{GuestImage, GuestKernel};

/// What the agent is told, one word a line, where it looks for that as `/init`: the controller of `foreign_vm.rs`, and where it may
/// mount.
const ARGUMENTS: &str = "--scsi-controller
pci:0000:00:10.0
--root
/mnt
--root
/run/mounts
--root
/run/blockmount
";
/// What digests files for `blockmount demo`: a program that the guest keeps running, and its arguments.
const CHECKER: &str = "/init\nchecker\n/mnt\n/run/mounts\n/run/blockmount\n";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(agent), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err("usage: guest_image AGENT FILE".into());
    };
    // Fetched by tests/setup.sh; any other of Linux 5.10 or later does, with its modules not compressed.
    let kernel = GuestKernel::find()?;
    let has_checker = Path::new(&agent).file_name() == Some("blockmount".as_ref());
    let mut image = GuestImage::builder(kernel)
        .program(agent)
        .file("/etc/blockmount/agent.args", ARGUMENTS);
    if has_checker {
        image = image.file("/etc/blockmount/programs/checker", CHECKER);
    }
    let image = image.build().await?;
    std::fs::write(file, image.initramfs())?;
    println!(
        "the kernel of this guest is {}",
        image.kernel().image().display()
    );
    Ok(())
}
