//! Mounts a stack of disk images on this machine, shows its files, and takes everything out again.
//!
//! ```console
//! # cargo run -p blockmount-loopback --example local_stack -- /run/stack app.erofs base.erofs
//! ```
//!
//! The images are the layers, the topmost first. It needs root, because it attaches loop devices and mounts.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use blockmount::{Disk, Manager, MountOptions, MountRequest, StackRequest};
use blockmount_linux::LinuxGuest;
use blockmount_loopback::LoopTransport;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let target = arguments
        .next()
        .ok_or("usage: local_stack TARGET IMAGE...")?;
    let images: Vec<PathBuf> = arguments.collect();

    // Host and guest are this machine: one transport, and the Linux engine for everything in the guest.
    let transport = Arc::new(LoopTransport::builder().build()?);
    let guest = LinuxGuest::builder()
        .resolver("loop", transport.clone())
        .build();
    let manager = Manager::builder()
        .transport(transport)
        .unplugger(guest.clone())
        .mounter(guest.clone())
        .combiner(guest)
        .build();

    let mut request = StackRequest::new(&target);
    for image in &images {
        let layer = Disk::virtual_disk(std::path::absolute(image)?).read_only();
        request = request.layer(layer, MountRequest::new(MountOptions::read_only()));
    }
    let stack = manager.stack(&request).await?;

    println!("{} has", target.display());
    for entry in std::fs::read_dir(&target)? {
        println!("  {}", entry?.file_name().display());
    }

    // A release that met a user of the tree changed nothing and can be retried.
    if let Err(busy) = stack.release().await {
        eprintln!("{busy}; retrying once");
        busy.retry().await?;
    }
    let drained = manager.drain().await;
    assert!(drained.is_clean(), "something is left: {drained:?}");
    println!("released; nothing is left");
    Ok(())
}
