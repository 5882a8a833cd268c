//! A guest that mounts in memory and writes down what it was asked, in one log with the host's side.

use blockmount::testing::AttachIdentified as _;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, Manager, MountOptions, Mounter, Presence, Transport,
    Unplugger, Usage,
};

/// What has happened, in order: `attach vpmem:0`, `mount vpmem:0`, `unmount`, `unplug vpmem:0`, `detach`.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn push(&self, event: String) {
        self.0.lock().unwrap().push(event);
    }

    /// All since the last time.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[derive(Clone, Default)]
pub(crate) struct Guest {
    log: Log,
    mounted: Arc<Mutex<HashMap<PathBuf, DeviceLocator>>>,
}

impl Guest {
    /// What is mounted there now.
    pub(crate) fn device_at(&self, target: &Path) -> Option<String> {
        let mounted = self.mounted.lock().unwrap();
        mounted.get(target).map(ToString::to_string)
    }

    pub(crate) fn mounts(&self) -> usize {
        self.mounted.lock().unwrap().len()
    }

    /// A manager of this guest, with these transports in order.
    pub(crate) fn manager(&self, transports: Vec<Arc<dyn Transport>>) -> (Manager, Log) {
        let mut builder = Manager::builder()
            .unplugger(self.clone())
            .mounter(self.clone());
        for transport in transports {
            builder = builder.transport(Logged(transport, self.log.clone()));
        }
        (builder.build(), self.log.clone())
    }
}

#[async_trait]
impl Mounter for Guest {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        self.log.push(format!("mount {device}"));
        let mut mounted = self.mounted.lock().unwrap();
        let before = mounted.insert(target.to_owned(), device.clone());
        assert_eq!(before, None, "{} is taken", target.display());
        Ok(())
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.log.push("unmount".to_owned());
        self.mounted.lock().unwrap().remove(target);
        Ok(())
    }

    async fn usage(&self, _: &Path) -> Result<Usage, BackendError> {
        Err(BackendError::unsuitable("this guest tells no sizes"))
    }

    async fn trim(&self, _: &Path) -> Result<u64, BackendError> {
        Err(BackendError::unsuitable("this guest tells no sizes"))
    }

    async fn grow(&self, _: &Path, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("this guest tells no sizes"))
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
impl Unplugger for Guest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.log.push(format!("unplug {device}"));
        let mounted = self.mounted.lock().unwrap();
        assert!(
            mounted.values().all(|mounted| mounted != device),
            "{device} is mounted"
        );
        Ok(())
    }
}

/// A transport whose calls are written down when they have ended.
struct Logged(Arc<dyn Transport>, Log);

#[async_trait]
impl Transport for Logged {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, _: &DiskId) -> Result<DeviceLocator, BackendError> {
        let answer = self.0.attach_identified(disk).await;
        self.1.push(match &answer {
            Ok(locator) => format!("attach {locator}"),
            Err(error) => format!("attach: {}", error.kind()),
        });
        answer
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let answer = self.0.detach(disk).await;
        self.1.push(match &answer {
            Ok(()) => "detach".to_owned(),
            Err(error) => format!("detach: {}", error.kind()),
        });
        answer
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.0.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        self.0.adopt(disk, id, locator).await
    }
}
