//! The contracts, as the fake VM implements them.

use std::path::Path;

use async_trait::async_trait;

use super::{FakeVm, Key, VmStep};
use crate::{
    BackendError, BlockDevice, DeviceLocator, Disk, DiskId, LayerCombiner, MountOptions, Mounter,
    Overlay, Resolver, Transport, Unplugger,
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
}
