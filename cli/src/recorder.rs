//! Counts and times what the managers ask of the backends.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, Disk, DiskId, ErrorKind, LayerCombiner,
    MountOptions, Mounter, Overlay, Presence, Step, Transport, Unplugger, Usage,
};
use blockmount_agent::one_line;

/// What was asked of the backends so far. Clones share one record.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    /// Nothing but the counts is kept, by who works for as long as the machine is up.
    is_brief: bool,
    counts: Counts,
    attached: HashMap<PathBuf, Attached>,
    /// Why a transport passed on a disk, by its source.
    passed_on: HashMap<PathBuf, String>,
    mounted: HashMap<PathBuf, Duration>,
    combined: HashMap<PathBuf, Duration>,
    /// How long each call that succeeded took, in the order of their ends.
    times: HashMap<Step, Vec<Duration>>,
}

impl Record {
    fn took(&mut self, step: Step, since: Instant) {
        self.times.entry(step).or_default().push(since.elapsed());
    }
}

/// How many calls of each kind succeeded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) attaches: u64,
    pub(crate) detaches: u64,
    pub(crate) mounts: u64,
    pub(crate) unmounts: u64,
    pub(crate) combines: u64,
    pub(crate) separates: u64,
}

/// An attachment as it was made.
#[derive(Debug, Clone)]
pub(crate) struct Attached {
    pub(crate) locator: DeviceLocator,
    pub(crate) took: Duration,
}

impl Recorder {
    /// A backend that is watched on behalf of this record.
    pub(crate) fn watch<B>(&self, backend: B) -> Recorded<B> {
        Recorded {
            backend,
            recorder: self.clone(),
        }
    }

    /// Keeps nothing but the counts from now on.
    pub(crate) fn be_brief(&self) {
        self.record().is_brief = true;
    }

    pub(crate) fn counts(&self) -> Counts {
        self.record().counts
    }

    /// The last attachment at a locator.
    pub(crate) fn by_locator(&self, locator: &DeviceLocator) -> Option<Attached> {
        self.record()
            .attached
            .values()
            .find(|attached| attached.locator == *locator)
            .cloned()
    }

    /// Every source that was attached, with what came of it.
    pub(crate) fn all_attached(&self) -> Vec<(PathBuf, Attached)> {
        let record = self.record();
        record
            .attached
            .iter()
            .map(|(source, at)| (source.clone(), at.clone()))
            .collect()
    }

    /// Why the transport that was asked first has not taken a disk that another one has.
    pub(crate) fn passed_on(&self, source: &Path) -> Option<String> {
        self.record().passed_on.get(source).cloned()
    }

    /// How long the mount at a target took.
    pub(crate) fn mounted(&self, target: &Path) -> Option<Duration> {
        self.record().mounted.get(target).copied()
    }

    /// How long the overlay at a target took.
    pub(crate) fn combined(&self, target: &Path) -> Option<Duration> {
        self.record().combined.get(target).copied()
    }

    /// How long each call took since the last time this was asked, by step.
    pub(crate) fn take_times(&self) -> HashMap<Step, Vec<Duration>> {
        std::mem::take(&mut self.record().times)
    }

    // Held for the moment of writing down, never across a call of the backend.
    fn record(&self) -> MutexGuard<'_, Record> {
        let mut record = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if record.is_brief {
            *record = Record {
                is_brief: true,
                counts: record.counts,
                ..Record::default()
            };
        }
        record
    }
}

/// A backend whose calls are written down.
#[derive(Debug, Clone)]
pub(crate) struct Recorded<B> {
    backend: B,
    recorder: Recorder,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<B: Transport> Transport for Recorded<B> {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.backend.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let start = Instant::now();
        let locator = self.backend.attach(disk, id).await.inspect_err(|error| {
            if matches!(error.kind(), ErrorKind::Unsuitable | ErrorKind::Full) {
                let mut record = self.recorder.record();
                let why = one_line(error);
                record.passed_on.insert(disk.source().to_owned(), why);
            }
        })?;
        let attached = Attached {
            locator: locator.clone(),
            took: start.elapsed(),
        };
        let mut record = self.recorder.record();
        record.took(Step::Attach, start);
        record.counts.attaches += 1;
        record.attached.insert(disk.source().to_owned(), attached);
        Ok(locator)
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let start = Instant::now();
        self.backend.detach(disk).await?;
        let mut record = self.recorder.record();
        record.took(Step::Detach, start);
        record.counts.detaches += 1;
        Ok(())
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
        let adopted = self.backend.adopt(disk, id, locator).await?;
        if let Presence::Present(locator) = &adopted {
            let attached = Attached {
                locator: locator.clone(),
                took: Duration::ZERO,
            };
            let source = disk.source().to_owned();
            self.recorder.record().attached.insert(source, attached);
        }
        Ok(adopted)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<B: Mounter> Mounter for Recorded<B> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let start = Instant::now();
        self.backend.mount(device, target, options).await?;
        let took = start.elapsed();
        let mut record = self.recorder.record();
        record.took(Step::Mount, start);
        record.counts.mounts += 1;
        record.mounted.insert(target.to_owned(), took);
        Ok(())
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        let start = Instant::now();
        self.backend.unmount(target).await?;
        let mut record = self.recorder.record();
        record.took(Step::Unmount, start);
        record.counts.unmounts += 1;
        Ok(())
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
        Mounter::adopt(&self.backend, device, target, options).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<B: Unplugger> Unplugger for Recorded<B> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let start = Instant::now();
        self.backend.unplug(device).await?;
        self.recorder.record().took(Step::Unplug, start);
        Ok(())
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<B: LayerCombiner> LayerCombiner for Recorded<B> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let start = Instant::now();
        self.backend.combine(overlay).await?;
        let took = start.elapsed();
        let mut record = self.recorder.record();
        record.counts.combines += 1;
        record.combined.insert(overlay.target.clone(), took);
        Ok(())
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.backend.separate(target).await?;
        self.recorder.record().counts.separates += 1;
        Ok(())
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        LayerCombiner::adopt(&self.backend, overlay).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<B: Binder> Binder for Recorded<B> {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.backend.bind(bind).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.backend.unbind(target).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        Binder::adopt(&self.backend, bind).await
    }
}
