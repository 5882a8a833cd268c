//! A VM that goes on in another QEMU, with its disks.

use std::path::Path;
use std::time::Duration;

use super::boot::Incoming;
use super::builder::VmBuilder;
use super::error::VmError;
use super::vm::Vm;

/// A VM that waits for the state of another one ([`VmBuilder::start_incoming`]).
#[derive(Debug)]
pub struct IncomingVm {
    vm: Vm,
    builder: VmBuilder,
}

impl VmBuilder {
    /// Starts a QEMU that takes over the state of a VM of the same builder, and does not boot. With
    /// [`Accelerator::Auto`](super::Accelerator::Auto) nothing is tried: name the accelerator of the other VM.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started. Nothing is left then.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn start_incoming(self) -> Result<IncomingVm, VmError> {
        self.check()?;
        let vm = self
            .run(self.known_accelerator(), Some(Incoming::Later))
            .await?;
        let builder = self;
        Ok(IncomingVm { vm, builder })
    }
}

impl IncomingVm {
    /// The VM, whose guest does not run yet. Before the state comes it is given the disks of the other VM, each at the same
    /// address, by [`Attacher::attach`](blockmount_scsi::Attacher::attach) of [`Vm::scsi`].
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Has QEMU listen at a Unix socket, for [`Vm::migrate`] of the other VM.
    ///
    /// # Errors
    ///
    /// If it cannot listen there.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves it open whether QEMU listens.
    pub async fn listen(&self, socket: &Path) -> Result<(), VmError> {
        let listening = self.vm.qmp().listen_for_state(socket).await;
        listening.map_err(|error| {
            VmError::new("the VM cannot wait for the state of another").because(error)
        })
    }

    /// Waits until the state has come and the guest goes on.
    ///
    /// # Errors
    ///
    /// If it does not come in the time of [`VmBuilder::timeout`], or is that of a VM with other disks. Nothing is left of this
    /// VM then.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn arrived(self) -> Result<Vm, VmError> {
        let IncomingVm { vm, builder } = self;
        builder.wait_until_up(vm, builder.timeout).await
    }
}

impl Vm {
    /// Sends the VM to an [`IncomingVm`] that listens at a Unix socket, and returns when that has it: this one is stopped for good,
    /// and is only to be shut down. Streams into the guest end; after a failure they can be opened again.
    ///
    /// # Errors
    ///
    /// If the other one does not take it within `deadline`, or if the VM has persistent memory: QEMU has no state to send of
    /// `virtio-pmem`, whose driver would meet a device that nobody has set up. The migration is then called off, and the VM goes on.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves it open whether the VM has migrated.
    pub async fn migrate(&self, socket: &Path, deadline: Duration) -> Result<(), VmError> {
        let failed = |error| VmError::new("the VM cannot migrate").because(error);
        let memory = crate::plug::of_type(self.qmp(), "virtio-pmem-pci").await;
        if let Some(device) = memory.map_err(failed)?.first() {
            let message = format!(
                "the VM cannot migrate with {device}, since QEMU sends no state of virtio-pmem; \
                 release the disks on persistent memory first"
            );
            return Err(VmError::new(message));
        }
        self.ports().close_all().await?;
        let migrated = self.qmp().migrate_over(socket, deadline).await;
        migrated.map_err(failed)
    }
}
