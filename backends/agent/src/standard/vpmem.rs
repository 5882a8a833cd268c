//! Persistent memory of the guest.

use blockmount::BackendError;
use blockmount_vpmem::{DeviceNumber, PmemId, SCHEME, VpmemResolver, VpmemUnplugger};

use crate::{Argument, GuestDevices, GuestTransport, Timeouts};

/// Persistent memory by its handles in the NFIT, unless devices are given.
#[derive(Debug, Clone, Default)]
pub struct Vpmem {
    given: bool,
    nfit: bool,
    devices: Vec<(DeviceNumber, PmemId)>,
}

impl GuestTransport for Vpmem {
    fn scheme(&self) -> &str {
        SCHEME
    }

    fn arguments(&self) -> &[Argument] {
        const {
            &[Argument::new(
                "vpmem",
                "SOURCE",
                "VPMEM devices: nfit, or pci:0000:01:00.0 or port:0000:00:10.0 for one device; repeatable. With nfit (the \
             default) device N has the handle N + 1 in the firmware's table. A device by pci is at that address, one by \
             port is behind the bridge at it. The first pci or port is device 0, the next one device 1",
            )]
        }
    }

    fn set(&mut self, _argument: &str, value: &str) -> Result<(), String> {
        self.given = true;
        match parse(value)? {
            None => self.nfit = true,
            Some(id) => {
                let number = DeviceNumber::try_from(self.devices.len() as u64)
                    .map_err(|error| format!("there are too many devices: {error}"))?;
                self.devices.push((number, id));
            }
        }
        Ok(())
    }

    fn modules(&self) -> &[&str] {
        &["nfit", "nd_pmem", "virtio_pmem", "dm_mod"]
    }

    fn devices(&self, timeouts: Timeouts) -> Option<GuestDevices> {
        let rule = match self.nfit || !self.given {
            true => VpmemResolver::nfit(),
            false => VpmemResolver::new(|_| None),
        };
        let devices = self.devices.iter();
        let resolver = devices.fold(rule, |resolver, (number, id)| resolver.with(*number, *id));
        let resolver = resolver.with_timeout(timeouts.device);
        let unplugger = VpmemUnplugger::new(resolver.clone())
            .with_timeout(timeouts.busy)
            .with_removal_deadline(timeouts.device);
        Some(GuestDevices::new(resolver, unplugger))
    }
}

/// The device that is meant, or `None` for those of the NFIT.
fn parse(text: &str) -> Result<Option<PmemId>, String> {
    let message = |error: BackendError| error.message().to_owned();
    match text.split_once(':') {
        None if text == "nfit" => Ok(None),
        Some(("pci", at)) => at.parse().map(|at| Some(PmemId::Pci(at))).map_err(message),
        Some(("port", at)) => at.parse().map(|at| Some(PmemId::Port(at))).map_err(message),
        _ => Err("a source of devices is nfit, pci:ADDRESS or port:ADDRESS".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_addresses_of_their_bus() {
        assert_eq!(parse("nfit"), Ok(None));
        let [pci, port] = ["pci", "port"].map(|kind| parse(&format!("{kind}:0000:01:00.0")));
        assert!(matches!(pci, Ok(Some(PmemId::Pci(_)))));
        assert!(matches!(port, Ok(Some(PmemId::Port(_)))));
        for text in ["", "pci", "pci:10.0", "nfit:1", "port:x", "0000:00:10.0"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn devices_are_numbered_as_they_are_given() {
        let mut vpmem = Vpmem::default();
        for value in ["pci:0000:01:00.0", "nfit", "port:0000:01:00.1"] {
            vpmem.set("vpmem", value).unwrap();
        }
        let numbers: Vec<u64> = vpmem.devices.iter().map(|(n, _)| n.get().into()).collect();
        assert_eq!((numbers, vpmem.nfit), (vec![0, 1], true));
        while vpmem.set("vpmem", "pci:0000:01:00.0").is_ok() {}
        assert!(vpmem.devices.len() > 100, "{}", vpmem.devices.len());
    }
}
