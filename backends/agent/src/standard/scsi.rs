//! SCSI disks of the guest.

use std::path::Path;

use blockmount::BackendError;
use blockmount_scsi::{ControllerId, SCHEME, ScsiResolver, ScsiUnplugger};

use crate::{Argument, GuestDevices, GuestTransport, Timeouts};

/// Here there are the channels of Hyper-V, in a guest of it.
const VMBUS: &str = "/sys/bus/vmbus/devices";

/// The disks on SCSI controllers that are given, or on those that Hyper-V gives its guests.
#[derive(Debug, Clone, Default)]
pub struct Scsi {
    controllers: Vec<ControllerId>,
}

impl GuestTransport for Scsi {
    fn scheme(&self) -> &str {
        SCHEME
    }

    fn arguments(&self) -> &[Argument] {
        const {
            &[Argument::new(
                "scsi-controller",
                "ADDRESS",
                "A SCSI controller, as pci:0000:00:10.0 or vmbus:GUID; repeatable, the first is controller 0. On the VMBus \
             of Hyper-V the default are the four controllers that it gives its guests, elsewhere none",
            )]
        }
    }

    fn set(&mut self, _argument: &str, value: &str) -> Result<(), String> {
        self.controllers.push(parse_controller(value)?);
        Ok(())
    }

    fn modules(&self) -> &[&str] {
        &["virtio_scsi", "sd_mod"]
    }

    fn devices(&self, timeouts: Timeouts) -> Option<GuestDevices> {
        let resolver = match &*self.controllers {
            [] if !Path::new(VMBUS).exists() => return None,
            [] => ScsiResolver::hyper_v(),
            given => ScsiResolver::new(given.iter().copied()),
        };
        let resolver = resolver.with_timeout(timeouts.device);
        let unplugger = ScsiUnplugger::new(resolver.clone())
            .with_timeout(timeouts.busy)
            .with_removal_deadline(timeouts.device);
        Some(GuestDevices::new(resolver, unplugger))
    }
}

fn parse_controller(text: &str) -> Result<ControllerId, String> {
    let message = |error: BackendError| error.message().to_owned();
    match text.split_once(':') {
        Some(("pci", address)) => address.parse().map(ControllerId::Pci).map_err(message),
        Some(("vmbus", id)) => id.parse().map(ControllerId::Vmbus).map_err(message),
        _ => Err("a controller is pci:ADDRESS or vmbus:GUID".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_have_addresses_of_their_bus() {
        let pci = parse_controller("pci:0000:00:10.0").unwrap();
        assert_eq!(pci.to_string(), "controller at PCI address 0000:00:10.0");
        let first = "vmbus:{DF6D0690-79e5-55b6-a5ec-c1e2f77f580a}";
        assert_eq!(parse_controller(first), Ok(ControllerId::hyper_v()[0]));
        for text in [
            "",
            "pci",
            "pci:",
            "pci:10.0",
            "vmbus:0000:00:10.0",
            "port:x",
            "0000:00:10.0",
        ] {
            assert!(parse_controller(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn disks_are_found_on_the_controllers_that_are_given() {
        let mut scsi = Scsi::default();
        assert_eq!(
            scsi.devices(Timeouts::default()).is_some(),
            Path::new(VMBUS).exists()
        );
        scsi.set("scsi-controller", "pci:0000:00:10.0").unwrap();
        assert!(scsi.devices(Timeouts::default()).is_some());
    }
}
