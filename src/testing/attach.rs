//! Identifying and attaching in one call.

use async_trait::async_trait;

use crate::{BackendError, DeviceLocator, Disk, Transport};

/// Identifying and attaching in one call, as a manager does it.
#[async_trait]
pub trait AttachIdentified: Transport {
    /// Attaches the disk that its name means now.
    ///
    /// # Errors
    ///
    /// Those of [`Transport::identify`] and [`Transport::attach`].
    async fn attach_identified(&self, disk: &Disk) -> Result<DeviceLocator, BackendError> {
        let id = self.identify(disk).await?;
        self.attach(disk, &id).await
    }
}

impl<T: Transport + ?Sized> AttachIdentified for T {}
