//! What the agent serves: the Linux engine, with everything that finds devices in this guest.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay, Unplugger,
};
use blockmount_linux::{LinuxGuest, Transports};
use blockmount_scsi::{ControllerId, ScsiResolver, ScsiUnplugger};
use blockmount_vpmem::{DeviceNumber, VpmemResolver, VpmemUnplugger};

use super::args::{AgentArgs, VpmemSource};
use crate::failure::{Context, Failure};

/// Here there are the channels of Hyper-V, in a guest of it.
const VMBUS: &str = "/sys/bus/vmbus/devices";

/// How long a disk may take to appear: of hundreds that a host plugs at once, a small guest finds a few dozen a second.
/// Hosts wait longer for an answer.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(45);

/// A guest that mounts, lays over each other, and lets go of devices.
#[derive(Debug, Clone)]
pub(super) struct Guest(LinuxGuest);

impl Guest {
    /// The guest that the command line describes, with what an earlier agent has left to it.
    pub(super) async fn new(args: &AgentArgs) -> Result<Self, Failure> {
        let engine = LinuxGuest::builder()
            .transports(transports(args)?)
            .allow_targets_under(&args.roots)
            .journal(&args.journal)
            .await
            .context(|| format!("cannot use the journal in {}", args.journal.display()))?;
        Ok(Guest(engine))
    }
}

/// Who finds and lets go of the devices of each transport.
fn transports(args: &AgentArgs) -> Result<Transports, Failure> {
    let vpmem = vpmem(&args.vpmem)?;
    let transports = Transports::new()
        .with(blockmount_vpmem::SCHEME, Arc::new(vpmem.clone()))
        .with_unplugger(
            blockmount_vpmem::SCHEME,
            Arc::new(VpmemUnplugger::new(vpmem)),
        );
    Ok(match scsi(&args.scsi_controllers) {
        None => transports,
        Some(scsi) => transports
            .with(blockmount_scsi::SCHEME, Arc::new(scsi.clone()))
            .with_unplugger(blockmount_scsi::SCHEME, Arc::new(ScsiUnplugger::new(scsi))),
    })
}

/// Who finds SCSI disks: nobody where no controller is known.
fn scsi(controllers: &[ControllerId]) -> Option<ScsiResolver> {
    match controllers {
        [] if Path::new(VMBUS).exists() => {
            Some(ScsiResolver::hyper_v().with_timeout(DEFAULT_TIMEOUT))
        }
        [] => None,
        given => Some(ScsiResolver::new(given.iter().copied()).with_timeout(DEFAULT_TIMEOUT)),
    }
}

/// Who finds persistent memory.
fn vpmem(sources: &[VpmemSource]) -> Result<VpmemResolver, Failure> {
    let mut resolver = match sources.contains(&VpmemSource::Nfit) {
        true => VpmemResolver::nfit(),
        false => VpmemResolver::new(|_| None),
    };
    let devices = sources.iter().filter_map(|source| match source {
        VpmemSource::Nfit => None,
        VpmemSource::Device(id) => Some(*id),
    });
    for (number, id) in (0_u64..).zip(devices) {
        let device = DeviceNumber::try_from(number)
            .map_err(|error| Failure::usage("--vpmem has too many devices").because(error))?;
        resolver = resolver.with(device, id);
    }
    Ok(resolver)
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
        self.0.mount(device, target, options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.unmount(target).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Unplugger for Guest {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.unplug(device).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LayerCombiner for Guest {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.0.combine(overlay).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.0.separate(target).await
    }
}

#[cfg(test)]
mod tests {
    use blockmount_vpmem::PmemId;

    use super::*;

    #[test]
    fn persistent_memory_has_a_rule_for_all_and_places_of_its_own() {
        let device = |function: u8| {
            let address = format!("0000:01:00.{function}");
            VpmemSource::Device(PmemId::Pci(address.parse().unwrap()))
        };
        assert!(vpmem(&[]).is_ok());
        assert!(vpmem(&[device(0), VpmemSource::Nfit, device(1)]).is_ok());
    }

    #[test]
    fn scsi_disks_are_found_on_the_controllers_that_are_given() {
        let given: ControllerId = ControllerId::Pci("0000:00:10.0".parse().unwrap());
        assert!(scsi(&[given]).is_some());
        assert_eq!(scsi(&[]).is_some(), Path::new(VMBUS).exists());
    }
}
