//! Which controller of the guest is meant, and where its disks are.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockmount::{BackendError, PciAddress};
use blockmount_linux::sysfs::{self, VmbusId};
use blockmount_linux::uevent::{NotReady, Probe};

use crate::{HYPER_V_CONTROLLERS, Lun};

/// A controller as hypervisor and guest both know it.
///
/// The numbers that Linux gives its SCSI hosts are none: they depend on the order in which drivers are
/// loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ControllerId {
    /// A PCI device, such as virtio-scsi of QEMU.
    Pci(PciAddress),
    /// A channel of Hyper-V.
    Vmbus(VmbusId),
}

impl ControllerId {
    /// The [controllers](HYPER_V_CONTROLLERS) of a VM of Hyper-V, in their order.
    #[expect(clippy::missing_panics_doc, reason = "the constants are GUIDs")]
    pub fn hyper_v() -> [ControllerId; 4] {
        HYPER_V_CONTROLLERS.map(|guid| ControllerId::Vmbus(guid.parse().expect("it is a GUID")))
    }

    fn directory(self, sysfs: &Path) -> PathBuf {
        match self {
            ControllerId::Pci(address) => sysfs.join(format!("bus/pci/devices/{address}")),
            ControllerId::Vmbus(id) => sysfs.join(format!("bus/vmbus/devices/{id}")),
        }
    }

    /// Its SCSI host: the directory, and the number.
    fn host(self, sysfs: &Path) -> Probe<(PathBuf, u32)> {
        let device = self.directory(sysfs);
        // A virtio device sits on the PCI device; other drivers have their host there at once.
        let virtio = sysfs::numbered(&device, "virtio")?;
        let mut hosts = sysfs::numbered(&device, "host")?;
        for (below, _) in virtio {
            hosts.extend(sysfs::numbered(&below, "host")?);
        }
        match hosts.as_slice() {
            [host] => Ok(host.clone()),
            [] if !device.exists() => Err(NotReady::not_found(format!("there is no {self}"))),
            [] => Err(NotReady::not_found(format!("{self} has no SCSI host"))),
            several => {
                let count = several.len();
                let message = format!("{self} has {count} SCSI hosts, which cannot be told apart");
                Err(NotReady::Failed(BackendError::conflict(message)))
            }
        }
    }
}

/// The SCSI hosts that were found. Each is its controller's for as long as it is below it in sysfs.
#[derive(Debug, Default)]
pub(super) struct Hosts(Mutex<HashMap<ControllerId, (PathBuf, u32)>>);

impl Hosts {
    /// The number of a controller's SCSI host.
    pub(super) fn number(&self, controller: ControllerId, sysfs: &Path) -> Probe<u32> {
        let known = self.known().get(&controller).cloned();
        if let Some((directory, number)) = known
            && directory.exists()
        {
            return Ok(number);
        }
        let (directory, number) = controller.host(sysfs)?;
        self.known().insert(controller, (directory, number));
        Ok(number)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ControllerId, (PathBuf, u32)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for ControllerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ControllerId::Pci(address) => write!(f, "controller at PCI address {address}"),
            ControllerId::Vmbus(id) => write!(f, "controller {id} on the VMBus"),
        }
    }
}

/// LUNs up to here are addressed as a peripheral's, and those above in the flat way.
const LAST_PERIPHERAL: u16 = 255;
/// The mark of the flat way in the first two bytes, which Linux takes for a part of the number.
/// (Source: SAM-5, 4.7.7.3; Linux, `scsilun_to_int`)
const FLAT: u32 = 0x4000;

/// The number that Linux shows for a LUN.
pub(super) fn shown(lun: Lun) -> u32 {
    match lun.get() {
        low @ ..=LAST_PERIPHERAL => low.into(),
        high => FLAT + u32::from(high),
    }
}

/// A disk's directory. All disks of a controller are at channel 0 and target 0.
pub(super) fn device(sysfs: &Path, host: u32, lun: Lun) -> PathBuf {
    sysfs.join(format!("bus/scsi/devices/{host}:0:0:{}", shown(lun)))
}

/// Whether an event about a device, by its path, is about the block device with this LUN, on whatever host:
/// that event is the last one of a disk that comes.
pub(super) fn concerns(lun: Lun) -> impl Fn(&[u8]) -> bool + Clone + Send + Sync + 'static {
    let part = format!(":0:0:{}", shown(lun)).into_bytes();
    move |path| {
        // From its end: each wait looks at the events of all disks.
        let mut names = path.rsplit(|byte| *byte == b'/').skip(1);
        names.next() == Some(b"block") && names.next().is_some_and(|name| name.ends_with(&part))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use blockmount::ErrorKind;

    use super::*;

    #[test]
    fn the_four_of_hyper_v() {
        let printed = ControllerId::hyper_v().map(|id| id.to_string());
        assert_eq!(
            printed,
            [
                "controller df6d0690-79e5-55b6-a5ec-c1e2f77f580a on the VMBus",
                "controller 0110f83b-de10-5172-a266-78bca56bf50a on the VMBus",
                "controller b5d2d8d4-3a75-51bf-945b-3444dc6b8579 on the VMBus",
                "controller 305891a9-b251-5dfe-91a2-c25d9212275b on the VMBus",
            ]
        );
    }

    #[test]
    fn a_lun_is_shown_as_linux_shows_it() {
        for (lun, expected) in [
            (0, 0),
            (63, 63),
            (255, 255),
            (256, 16_640),
            (16_383, 32_767),
        ] {
            assert_eq!(shown(Lun::try_from(lun).unwrap()), expected);
        }
    }

    #[test]
    fn events_about_a_lun_concern_it() {
        let concerns = concerns(Lun::try_from(3).unwrap());
        assert!(concerns(
            b"/devices/pci0000:00/0000:00:10.0/virtio1/host2/target2:0:0/2:0:0:3/block/sda"
        ));
        for other in [
            &b""[..],
            b"/",
            b"/x/2:0:0:31/block/sda",
            b"/x/2:0:0:30/block/sda",
            b"/x/2:0:0:3/bsg/2:0:0:3",
            b"/x/2:0:0:3",
            b"/x/target2:0:3",
        ] {
            assert!(!concerns(other));
        }
    }

    #[test]
    fn the_host_is_searched_below_the_controller_and_never_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let pci = ControllerId::Pci("0000:00:10.0".parse().unwrap());
        let hosts = Hosts::default();
        let host = |id| hosts.number(id, dir.path()).map_err(NotReady::into_error);
        let error = host(pci).unwrap_err();
        assert_eq!(
            error.message(),
            "there is no controller at PCI address 0000:00:10.0"
        );
        let device = dir.path().join("bus/pci/devices/0000:00:10.0");
        fs::create_dir_all(device.join("virtio7/block")).unwrap();
        let error = host(pci).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.message().ends_with("has no SCSI host"), "{error}");
        fs::create_dir_all(device.join("virtio7/host12/target12:0:0")).unwrap();
        assert_eq!(host(pci).unwrap(), 12);
        fs::rename(device.join("virtio7/host12"), device.join("virtio7/host3")).unwrap();
        assert_eq!(host(pci).unwrap(), 3, "it was plugged in anew");
        fs::rename(device.join("virtio7/host3"), device.join("virtio7/host4")).unwrap();
        fs::create_dir_all(device.join("host2")).unwrap();
        assert_eq!(host(pci).unwrap_err().kind(), ErrorKind::Conflict);

        let vmbus = ControllerId::hyper_v()[2];
        let id = "b5d2d8d4-3a75-51bf-945b-3444dc6b8579";
        fs::create_dir_all(dir.path().join("bus/vmbus/devices").join(id).join("host3")).unwrap();
        assert_eq!(host(vmbus).unwrap(), 3);
    }
}
