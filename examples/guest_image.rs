//! Writes what a guest boots besides its kernel into a file: the agent as `/init`, the kernel's modules, and what the agent is
//! told. For a VM that another program starts, such as that of `foreign_vm.rs`.
//!
//! ```console
//! $ cargo build --release -p blockmount-agent
//! $ cargo run -p blockmount-qemu --example guest_image -- target/release/blockmount-agent guest.cpio
//! the kernel of this guest is /var/lib/blockmount/kernel/vmlinuz
//! ```

use std::error::Error;

use blockmount_qemu::{GuestImage, GuestKernel};

/// What the agent is told, one word a line, where it looks for that as `/init`: the controller of `foreign_vm.rs`.
const ARGUMENTS: &str = "--virtio-port\nblockmount.0\n--scsi-controller\npci:0000:00:10.0\n--root\n/mnt\n--root\n/run/mounts\n";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(agent), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err("usage: guest_image AGENT FILE".into());
    };
    // Fetched by tests/setup.sh; any other of Linux 5.10 or later does, with its modules not compressed.
    let kernel = GuestKernel::find()?;
    let image = GuestImage::builder(kernel)
        .program(agent)
        .file("/etc/blockmount/agent.args", ARGUMENTS);
    let image = image.build().await?;
    std::fs::write(file, image.initramfs())?;
    println!(
        "the kernel of this guest is {}",
        image.kernel().image().display()
    );
    Ok(())
}
