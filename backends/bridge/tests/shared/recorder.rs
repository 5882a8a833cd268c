//! A guest that does nothing and remembers everything.

use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Space, Unplugger, Usage,
};

/// A guest that writes down what it is asked for, and always succeeds.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<Asked>>>);

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Asked {
    Mount(String, String, MountOptions),
    Unmount(String),
    Unplug(String),
    Combine(Overlay),
    Separate(String),
    Usage(String),
    Trim(String),
    Grow(String, u64),
    Bind(BindMount),
    Unbind(String),
}

/// What every filesystem answers.
pub(crate) fn usage() -> Usage {
    let space = |used| Space {
        total: u64::MAX,
        used,
        available: 7,
    };
    Usage::new(space(u64::MAX - 7), space(5))
}

/// How much every trim frees, in bytes.
pub(crate) const TRIMMED: u64 = (1 << 53) + 1;

impl Recorder {
    fn note(&self, asked: Asked) -> Result<(), BackendError> {
        self.0.lock().unwrap().push(asked);
        Ok(())
    }

    pub(crate) fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[async_trait]
impl Mounter for Recorder {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.note(Asked::Mount(
            device.to_string(),
            text(target),
            options.clone(),
        ))
    }
    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.note(Asked::Unmount(text(target)))
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.note(Asked::Usage(text(target)))?;
        Ok(usage())
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.note(Asked::Trim(text(target)))?;
        Ok(TRIMMED)
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.note(Asked::Grow(text(target), bytes))
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait]
impl Unplugger for Recorder {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.note(Asked::Unplug(device.to_string()))
    }
}

#[async_trait]
impl LayerCombiner for Recorder {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.note(Asked::Combine(overlay.clone()))
    }
    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.note(Asked::Separate(text(target)))
    }

    async fn adopt(&self, _: &Overlay) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait]
impl Binder for Recorder {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.note(Asked::Bind(bind.clone()))
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.note(Asked::Unbind(text(target)))
    }

    async fn adopt(&self, _: &BindMount) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}
