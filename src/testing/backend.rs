//! The contracts, as the fake VM implements them.

use std::path::Path;

use async_trait::async_trait;

use super::state::VmState;
use super::{FakeVm, Key, Outcome, VmStep};
use crate::{
    BackendError, BindMount, Binder, BlockDevice, DeviceLocator, Disk, DiskId, ErrorKind,
    LayerCombiner, MountOptions, Mounter, Overlay, Presence, Resolver, Transport, Unplugger, Usage,
};

#[async_trait]
impl Transport for FakeVm {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let id = self.id(disk);
        let found = self.find(disk);
        let call = self.begin(VmStep::Identify, Key::Disk(id.clone()), None);
        call.act(|_, _| found.map(|()| id)).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let found = self.find(disk).and_then(|()| match self.id(disk) == *id {
            true => Ok(()),
            false => Err(BackendError::conflict(format!(
                "disk {disk} is not {id} any more"
            ))),
        });
        let call = self.begin(VmStep::Attach, Key::Disk(id.clone()), None);
        call.act(|state, reach| found.and_then(|()| state.attach(id, reach)))
            .await
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let id = self.id(disk);
        let call = self.begin(VmStep::Detach, Key::Disk(id.clone()), None);
        call.act(|state, reach| {
            state.detach(&id, reach);
            Ok(())
        })
        .await
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        let id = self.id(disk);
        self.state().vm.resize(&id, bytes)
    }

    async fn adopt(
        &self,
        _: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let call = self.begin(VmStep::Adopt, Key::Disk(id.clone()), None);
        self.state().vm.recognise(id, locator);
        // Set first, so that a panic leaves it so.
        let in_doubt = KeepSlot(self, id, locator);
        let adopted = call.act_as(|state, _| Ok(state.adopt(id, locator)), in_log);
        let adopted = unknown_if_uncertain(adopted.await);
        let gone = adopted
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::Gone);
        if gone || matches!(adopted, Ok(Presence::Present(_) | Presence::Absent)) {
            std::mem::forget(in_doubt);
        }
        adopted
    }
}

#[async_trait]
impl Unplugger for FakeVm {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let call = self.begin(VmStep::Unplug, Key::Device(device.clone()), None);
        call.act(|state, _| state.unplug(device)).await
    }
}

#[async_trait]
impl Resolver for FakeVm {
    async fn resolve(&self, device: &DeviceLocator) -> Result<BlockDevice, BackendError> {
        let call = self.begin(VmStep::Resolve, Key::Device(device.clone()), None);
        call.act(|state, _| state.resolve(device)).await
    }
}

#[async_trait]
impl Mounter for FakeVm {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let key = Key::Target(target.into());
        let call = self.begin(VmStep::Mount, key, Some(device.clone()));
        match Resolver::resolve(self, device).await {
            Ok(_) => {
                call.act(|state, _| state.mount(device, &target.into(), options))
                    .await
            }
            Err(error) => call.fail_as(error),
        }
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        let call = self.begin(VmStep::Unmount, Key::Target(target.into()), None);
        call.act(|state, _| state.unmount(target)).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.state().vm.usage(target)
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        let usage = self.state().vm.usage(target)?;
        Ok(usage.bytes.available)
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.state().vm.grow(target, bytes)
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let key = Key::Target(target.into());
        let call = self.begin(VmStep::Adopt, key, Some(device.clone()));
        let look = |state: &mut VmState, _| Ok(state.adopt_mount(device, target, options));
        unknown_if_uncertain(call.act_as(look, in_log).await)
    }
}

#[async_trait]
impl LayerCombiner for FakeVm {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let target = overlay.target.as_path();
        let call = self.begin(VmStep::Combine, Key::Target(target.into()), None);
        call.act(|state, _| state.combine(overlay, &target.into()))
            .await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        let call = self.begin(VmStep::Separate, Key::Target(target.into()), None);
        call.act(|state, _| state.separate(target)).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        let key = Key::Target(overlay.target.as_path().into());
        let call = self.begin(VmStep::Adopt, key, None);
        let look = |state: &mut VmState, _| Ok(state.adopt_overlay(overlay));
        unknown_if_uncertain(call.act_as(look, in_log).await)
    }
}

#[async_trait]
impl Binder for FakeVm {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        let target = bind.target.as_path();
        let call = self.begin(VmStep::Bind, Key::Target(target.into()), None);
        call.act(|state, _| state.bind(bind, &target.into())).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        let call = self.begin(VmStep::Unbind, Key::Target(target.into()), None);
        call.act(|state, _| state.unbind(target)).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        let key = Key::Target(bind.target.as_path().into());
        let call = self.begin(VmStep::Adopt, key, None);
        let look = |state: &mut VmState, _| Ok(state.adopt_view(bind));
        unknown_if_uncertain(call.act_as(look, in_log).await)
    }
}

/// Keeps the slot of a disk when it is dropped: nobody could tell whether it is there.
struct KeepSlot<'a>(&'a FakeVm, &'a DiskId, Option<&'a DeviceLocator>);

impl Drop for KeepSlot<'_> {
    fn drop(&mut self) {
        if let KeepSlot(vm, disk, Some(locator)) = self {
            vm.keep_slot(disk, locator);
        }
    }
}

fn in_log<T>(presence: &Presence<T>) -> Outcome {
    match presence {
        Presence::Absent => Outcome::Absent,
        _ => Outcome::Done,
    }
}

/// A question without an answer leaves open what is there.
fn unknown_if_uncertain<T>(
    adopted: Result<Presence<T>, BackendError>,
) -> Result<Presence<T>, BackendError> {
    match adopted {
        Err(error) if error.kind() == ErrorKind::Uncertain => Ok(Presence::Unknown),
        adopted => adopted,
    }
}
