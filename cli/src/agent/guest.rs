//! What the agent serves: the Linux engine, with everything that finds devices in this guest.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay, Unplugger,
};
use blockmount_linux::{LinuxGuest, Resolvers, Unpluggers};
use blockmount_scsi::{ControllerId, ScsiResolver, ScsiUnplugger};
use blockmount_vpmem::{VpmemResolver, VpmemUnplugger};

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
fn transports(args: &AgentArgs) -> Result<(Resolvers, Unpluggers), Failure> {
    let scsi = scsi(&args.scsi_controllers)?;
    let vpmem = vpmem(&args.vpmem)?;
    let resolvers = Resolvers::new()
        .with(blockmount_scsi::SCHEME, Arc::new(scsi.clone()))
        .with(blockmount_vpmem::SCHEME, Arc::new(vpmem.clone()));
    let unpluggers = Unpluggers::new(resolvers.clone())
        .with(blockmount_scsi::SCHEME, Arc::new(ScsiUnplugger::new(scsi)))
        .with(
            blockmount_vpmem::SCHEME,
            Arc::new(VpmemUnplugger::new(vpmem)),
        );
    Ok((resolvers, unpluggers))
}

/// The SCSI controllers that were named, or else those of a virtual machine of Hyper-V.
fn scsi(controllers: &[String]) -> Result<ScsiResolver, Failure> {
    if controllers.is_empty() {
        return Ok(ScsiResolver::hyper_v());
    }
    let parse = |text: &String| {
        let id = match text.split_once(':') {
            Some(("pci", address)) => address.parse().ok().map(ControllerId::Pci),
            Some(("vmbus", id)) => id.parse().ok().map(ControllerId::Vmbus),
            _ => None,
        };
        id.ok_or_else(|| {
            let what = format!("--scsi-controller {text:?} is no address of a controller");
            Failure::usage(what).advise("use pci:0000:00:10.0 or vmbus:GUID")
        })
    };
    let ids = controllers.iter().map(parse);
    Ok(ScsiResolver::new(ids.collect::<Result<Vec<_>, _>>()?))
}

/// Where the hypervisor has its devices of persistent memory.
fn vpmem(source: &str) -> Result<VpmemResolver, Failure> {
    let first = source
        .strip_prefix("slots:")
        .and_then(|first| first.parse().ok());
    match (source, first) {
        ("nfit", _) => Ok(VpmemResolver::nfit()),
        (_, Some(first)) => Ok(VpmemResolver::slots(first)),
        _ => {
            let what = format!("--vpmem {source:?} is no source of persistent memory");
            Err(Failure::usage(what).advise("use nfit, or slots:0 for PCI slots from number 0"))
        }
    }
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
