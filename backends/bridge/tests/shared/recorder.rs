//! A guest that does nothing and remembers everything.

use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay, Presence, Unplugger,
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
}

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
