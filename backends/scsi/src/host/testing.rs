//! What tests of attachers do all the time.

use async_trait::async_trait;
use blockmount::{BackendError, Disk};

use crate::{Attacher, ScsiAddress};

/// Identifying and attaching in one call, as [`ScsiTransport`](crate::ScsiTransport) does it.
#[async_trait]
pub trait AttachIdentified: Attacher {
    /// Attaches the disk that its name means now.
    ///
    /// # Errors
    ///
    /// Those of [`Attacher::identify`] and [`Attacher::attach`].
    async fn attach_identified(
        &self,
        address: ScsiAddress,
        disk: &Disk,
    ) -> Result<(), BackendError> {
        let id = self.identify(disk).await?;
        self.attach(address, disk, &id).await
    }
}

impl<A: Attacher + ?Sized> AttachIdentified for A {}
