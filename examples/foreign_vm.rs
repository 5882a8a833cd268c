//! Plugs a disk into a VM that somebody else has started, mounts it there, and takes it out again.
//!
//! ```console
//! $ cargo build --release -p blockmount-agent
//! $ cargo run -p blockmount-qemu --example guest_image -- target/release/blockmount-agent guest.cpio
//! $ qemu-system-x86_64 -M q35 -m 1G -nographic \
//!     -device virtio-scsi-pci,id=scsi0,addr=10 \
//!     -qmp unix:/run/vm/qmp,server=on,wait=off \
//!     -device virtio-serial -device virtserialport,name=blockmount.agent,chardev=agent \
//!     -chardev socket,id=agent,path=/run/vm/agent,server=on,wait=off \
//!     -kernel /var/lib/blockmount/kernel/vmlinuz -initrd guest.cpio -append console=ttyS0
//! $ cargo run -p blockmount-qemu --no-default-features --example foreign_vm -- /run/vm/qmp /run/vm/agent base.erofs
//! ```
//!
//! In the guest runs `blockmount-agent --scsi-controller pci:0000:00:10.0`, here as its `/init` with all that it needs
//! (`guest_image.rs`); in a guest with an init of its own it is a service. `blockmount mount --vm qemu:/run/vm/qmp --agent
//! unix:/run/vm/agent` is a program that does this and more.

use std::error::Error;
use std::path::PathBuf;

use async_trait::async_trait;
use blockmount::{BackendError, Disk, Manager, MountOptions, MountRequest};
use blockmount_bridge::{BridgeGuest, Dialer, RedialingChannel};
use blockmount_qemu::{QemuScsi, Qmp};
use blockmount_scsi::ScsiTransport;
use tokio::net::UnixStream;

/// The socket behind which QEMU offers the agent's port.
struct AgentSocket {
    path: PathBuf,
    vm: Qmp,
}

#[async_trait]
impl Dialer for AgentSocket {
    type Stream = UnixStream;

    async fn dial(&self) -> Result<UnixStream, BackendError> {
        let stream = UnixStream::connect(&self.path).await;
        stream.map_err(|error| {
            let tried = format!("cannot reach the agent at {}", self.path.display());
            BackendError::other(tried).with_source(error)
        })
    }

    // A monitor that has closed its connection has ended with its VM. Nothing else says that a guest is gone.
    async fn is_alive(&self) -> bool {
        !self.vm.is_closed()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(monitor), Some(agent), Some(image)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: foreign_vm QMP_SOCKET AGENT_SOCKET IMAGE".into());
    };

    // Host side: disks at the addresses of the controller with the id scsi0.
    let qmp = Qmp::connect(UnixStream::connect(monitor).await?).await?;
    let attacher = QemuScsi::new(qmp.clone(), ["scsi0"])?;
    let geometry = attacher.geometry();
    let transport = ScsiTransport::new(attacher, geometry, &[])?;

    // Guest side: the agent, over whatever stream leads to it.
    let guest = RedialingChannel::connect(AgentSocket {
        path: agent,
        vm: qmp,
    });
    let guest = BridgeGuest::new(guest.await?);

    let manager = Manager::builder()
        .transport(transport)
        .unplugger(guest.clone())
        .mounter(guest)
        .build();

    let layer = Disk::virtual_disk(std::path::absolute(image)?).read_only();
    let request = MountRequest::new(MountOptions::read_only());
    let mount = manager.add(&layer, &request).await?;
    println!(
        "{} is {} in the guest",
        mount.locator(),
        mount.path().display()
    );

    mount.release().await?;
    assert!(manager.drain().await.is_clean());
    println!("unmounted, unplugged and detached");
    Ok(())
}
