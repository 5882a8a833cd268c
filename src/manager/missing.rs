//! What a manager has in place of a backend that it was not given.

use std::path::Path;

use async_trait::async_trait;

use crate::{
    BackendError, BindMount, Binder, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Usage,
};

/// Stands where the builder was given nothing.
pub(super) struct Missing(pub(super) &'static str);

impl Missing {
    fn refuse(&self) -> BackendError {
        BackendError::unsuitable(format!("the manager was built without {}", self.0))
    }
}

#[async_trait]
impl Mounter for Missing {
    async fn mount(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn unmount(&self, _: &Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn usage(&self, _: &Path) -> Result<Usage, BackendError> {
        Err(self.refuse())
    }

    async fn trim(&self, _: &Path) -> Result<u64, BackendError> {
        Err(self.refuse())
    }

    async fn grow(&self, _: &Path, _: u64) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Err(self.refuse())
    }
}

#[async_trait]
impl LayerCombiner for Missing {
    async fn combine(&self, _: &Overlay) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn separate(&self, _: &Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn adopt(&self, _: &Overlay) -> Result<Presence, BackendError> {
        Err(self.refuse())
    }
}

#[async_trait]
impl Binder for Missing {
    async fn bind(&self, _: &BindMount) -> Result<(), BackendError> {
        Err(self.refuse())
    }

    async fn unbind(&self, _: &Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn adopt(&self, _: &BindMount) -> Result<Presence, BackendError> {
        Err(self.refuse())
    }
}
