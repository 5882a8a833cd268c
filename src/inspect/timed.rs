//! Backends whose calls are timed.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::Latencies;
use crate::{
    BackendError, BindMount, Binder, DeviceLocator, Disk, DiskId, LayerCombiner, MountOptions,
    Mounter, Overlay, Presence, Step, Transport, Unplugger, Usage,
};

/// A backend between the manager and the one that does the work.
pub(crate) struct Timed<B: ?Sized> {
    backend: Box<B>,
    latencies: Arc<Latencies>,
}

impl<B: ?Sized> Timed<B> {
    pub(crate) fn new(backend: Box<B>, latencies: &Arc<Latencies>) -> Self {
        let latencies = Arc::clone(latencies);
        Timed { backend, latencies }
    }

    async fn time<T>(
        &self,
        step: Step,
        call: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        let since = Instant::now();
        let outcome = call.await;
        match &outcome {
            Ok(_) => self.latencies.took(step, since.elapsed()),
            Err(_) => self.latencies.failed(step),
        }
        outcome
    }
}

/// What `async_trait` makes of a future.
type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, BackendError>> + Send + 'a>>;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Transport for Timed<dyn Transport> {
    /// Handed on as it is: each request calls it, also for a disk that is up.
    fn identify<'a, 'b, 'c>(&'a self, disk: &'b Disk) -> Answer<'c, DiskId>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        self.backend.identify(disk)
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.time(Step::Attach, self.backend.attach(disk, id)).await
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        self.time(Step::Detach, self.backend.detach(disk)).await
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.backend.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        self.backend.adopt(disk, id, locator).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for Timed<dyn Unplugger> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.time(Step::Unplug, self.backend.unplug(device)).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Mounter for Timed<dyn Mounter> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let mount = self.backend.mount(device, target, options);
        self.time(Step::Mount, mount).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.time(Step::Unmount, self.backend.unmount(target)).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.backend.usage(target).await
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.backend.trim(target).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.backend.grow(target, bytes).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        self.backend.adopt(device, target, options).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for Timed<dyn LayerCombiner> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.time(Step::Combine, self.backend.combine(overlay))
            .await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.time(Step::Separate, self.backend.separate(target))
            .await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        self.backend.adopt(overlay).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Binder for Timed<dyn Binder> {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.time(Step::Bind, self.backend.bind(bind)).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.time(Step::Unbind, self.backend.unbind(target)).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        self.backend.adopt(bind).await
    }
}
