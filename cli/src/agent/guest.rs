//! What the agent serves: the Linux engine, with everything that finds devices in this guest.

use std::path::Path;

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay, Unplugger,
};
use blockmount_linux::{LinuxGuest, Resolvers, Unpluggers};

use super::args::AgentArgs;
use crate::failure::{Context, Failure};

/// A guest that mounts, lays over each other, and lets go of devices.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    engine: LinuxGuest,
    unpluggers: Unpluggers,
}

impl Guest {
    /// The guest that the command line describes, with what an earlier agent has left to it.
    pub(super) async fn new(args: &AgentArgs) -> Result<Self, Failure> {
        let (resolvers, unpluggers) = transports(args)?;
        let engine = LinuxGuest::builder()
            .resolvers(resolvers)
            .allow_targets_under(&args.roots)
            .journal(&args.journal)
            .await
            .context(|| format!("cannot use the journal in {}", args.journal.display()))?;
        Ok(Guest { engine, unpluggers })
    }
}

/// Who finds and lets go of the devices of each transport.
fn transports(_args: &AgentArgs) -> Result<(Resolvers, Unpluggers), Failure> {
    let resolvers = Resolvers::new();
    let unpluggers = Unpluggers::new(resolvers.clone());
    Ok((resolvers, unpluggers))
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Mounter for Guest {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        self.engine.mount(device, target, options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.engine.unmount(target).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for Guest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.unpluggers.unplug(device).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for Guest {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.engine.combine(overlay).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.engine.separate(target).await
    }
}
