//! What tests of attachers do all the time.

use async_trait::async_trait;
use blockmount::{BackendError, Disk};

use crate::{Attacher, ByteRange, DeviceNumber};

/// Identifying and attaching in one call, as [`VpmemTransport`](crate::VpmemTransport) does it.
#[async_trait]
pub trait AttachIdentified: Attacher {
    /// Attaches the disk that its name means now.
    ///
    /// # Errors
    ///
    /// Those of [`Attacher::identify`] and [`Attacher::attach`].
    async fn attach_identified(
        &self,
        device: DeviceNumber,
        disk: &Disk,
    ) -> Result<(), BackendError> {
        let id = self.identify(disk).await?;
        self.attach(device, disk, &id).await
    }

    /// Maps the disk that its name means now.
    ///
    /// # Errors
    ///
    /// Those of [`Attacher::identify`] and [`Attacher::map`].
    async fn map_identified(
        &self,
        device: DeviceNumber,
        range: ByteRange,
        disk: &Disk,
    ) -> Result<(), BackendError> {
        let id = self.identify(disk).await?;
        self.map(device, range, disk, &id).await
    }
}

impl<A: Attacher + ?Sized> AttachIdentified for A {}
