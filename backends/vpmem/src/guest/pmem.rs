//! Which persistent memory of the guest is meant, and where its disk is.

use std::fmt;
use std::path::{Path, PathBuf};

use blockmount::{BackendError, PciAddress};
use blockmount_linux::sysfs::{self, Disk};
use blockmount_linux::uevent::{NotReady, Probe};

/// Persistent memory as hypervisor and guest both know it. The numbers of `/dev/pmemN` are none: they are
/// given in the order in which devices are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PmemId {
    /// An NVDIMM by its handle in the firmware's table (ACPI NFIT). QEMU gives the DIMM in slot 0 the handle
    /// 1, and so on.
    NfitHandle(u32),
    /// Memory by its address in the guest, as QEMU's `query-memory-devices` has it.
    Region(u64),
    /// A virtio-pmem device by its PCI address.
    Pci(PciAddress),
    /// A virtio-pmem device by the PCI address of the bridge that it is behind, which is its only device:
    /// each `pcie-root-port` of QEMU takes one. The numbers of buses and slots behind bridges are none:
    /// they are given in the order in which devices are found.
    Port(PciAddress),
}

impl fmt::Display for PmemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PmemId::NfitHandle(handle) => write!(f, "NVDIMM with the NFIT handle {handle:#x}"),
            PmemId::Region(address) => write!(f, "persistent memory at the address {address:#x}"),
            PmemId::Pci(address) => write!(f, "persistent memory at the PCI address {address}"),
            PmemId::Port(address) => write!(f, "persistent memory behind the PCI bridge {address}"),
        }
    }
}

impl PmemId {
    /// Its directory on the PCI bus, if this says anything about that and it is there.
    pub(super) fn pci_device(
        self,
        root: &Path,
    ) -> Result<Option<(PciAddress, PathBuf)>, BackendError> {
        let devices = root.join("bus/pci/devices");
        let address = match self {
            PmemId::Pci(address) => address,
            PmemId::Port(bridge) => {
                let behind = sysfs::names(&devices.join(bridge.to_string()))?;
                let mut behind = behind.iter().filter_map(|name| name.parse().ok());
                match (behind.next(), behind.next()) {
                    (Some(only), None) => only,
                    (None, _) => return Ok(None),
                    (Some(_), Some(_)) => {
                        let message = format!("there are several PCI devices behind {bridge}");
                        return Err(BackendError::conflict(message));
                    }
                }
            }
            PmemId::NfitHandle(_) | PmemId::Region(_) => return Ok(None),
        };
        let device = devices.join(address.to_string());
        Ok(device.exists().then_some((address, device)))
    }

    /// The region of memory that it is.
    fn region(self, root: &Path) -> Probe<PathBuf> {
        let missing = || NotReady::not_found(format!("there is no {self}"));
        let buses = match (self.pci_device(root)?, self) {
            (Some((_, device)), _) => below(&below(&[device], "virtio")?, "ndbus")?,
            (None, PmemId::Pci(_) | PmemId::Port(_)) => return Err(missing()),
            (None, _) => vec![root.join("bus/nd/devices")],
        };
        let mut regions = below(&buses, "region")?;
        match self {
            PmemId::NfitHandle(handle) => {
                let dimm = dimm(root, handle)?.ok_or_else(missing)?;
                keep(&mut regions, |region| is_of_dimm(region, &dimm))?;
            }
            PmemId::Region(address) => keep(&mut regions, |region| {
                let resource = sysfs::text(region, "resource")?;
                Ok(resource.and_then(|text| sysfs::number(&text)) == Some(address))
            })?,
            PmemId::Pci(_) | PmemId::Port(_) => {}
        }
        one(regions, missing, || format!("{self} has several regions"))
    }

    /// The disk that it is.
    pub(super) fn disk(self, root: &Path) -> Probe<Disk> {
        let region = self.region(root)?;
        let mut found = Vec::new();
        // A namespace is a disk, or what was made of it is.
        for name in sysfs::names(&region)? {
            let namespace = region.join(name);
            if !sysfs::names(&namespace.join("block"))?.is_empty() {
                found.push(namespace);
            }
        }
        let missing = || NotReady::not_found(format!("{self} has no block device yet"));
        let namespace = one(found, missing, || {
            format!("{self} has several block devices")
        })?;
        Disk::below(&namespace)
    }
}

/// The entries of several directories with names such as `region3`.
fn below(directories: &[PathBuf], prefix: &str) -> Result<Vec<PathBuf>, BackendError> {
    let mut found = Vec::new();
    for directory in directories {
        let numbered = sysfs::numbered(directory, prefix)?;
        found.extend(numbered.into_iter().map(|(path, _)| path));
    }
    Ok(found)
}

fn keep(
    all: &mut Vec<PathBuf>,
    fits: impl Fn(&Path) -> Result<bool, BackendError>,
) -> Result<(), BackendError> {
    let mut trouble = Ok(());
    all.retain(|path| match fits(path) {
        Ok(fits) => fits,
        Err(error) => {
            trouble = Err(error);
            false
        }
    });
    trouble
}

fn one(
    mut found: Vec<PathBuf>,
    missing: impl FnOnce() -> NotReady,
    several: impl FnOnce() -> String,
) -> Probe<PathBuf> {
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        (None, _) => Err(missing()),
        (Some(_), false) => Err(NotReady::Failed(BackendError::conflict(several()))),
    }
}

/// The name of the NVDIMM with a handle.
fn dimm(root: &Path, handle: u32) -> Result<Option<String>, BackendError> {
    for (directory, _) in sysfs::numbered(&root.join("bus/nd/devices"), "nmem")? {
        let found = sysfs::text(&directory.join("nfit"), "handle")?;
        if found.and_then(|text| sysfs::number(&text)) == Some(handle.into()) {
            let name = directory.file_name().and_then(|name| name.to_str());
            return Ok(name.map(str::to_owned));
        }
    }
    Ok(None)
}

/// Whether a region is made of this NVDIMM and of no other.
fn is_of_dimm(region: &Path, dimm: &str) -> Result<bool, BackendError> {
    let count = sysfs::text(region, "mappings")?.and_then(|text| sysfs::number(&text));
    let mapping = sysfs::text(region, "mapping0")?.unwrap_or_default();
    Ok(count == Some(1) && mapping.split(',').next() == Some(dimm))
}

/// The virtio device that a disk belongs to, by the place of the disk among all devices.
pub(super) fn pci_of(disk: &Path) -> Option<PciAddress> {
    let real = disk.canonicalize().ok()?;
    let parts: Vec<&str> = real.iter().filter_map(|part| part.to_str()).collect();
    parts.windows(2).rev().find_map(|pair| {
        let number = pair[1].strip_prefix("virtio")?;
        let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| pair[0].parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_pci_device_of_a_disk_is_the_one_above_virtio() {
        let root = tempfile::tempdir().unwrap();
        let device = "devices/pci0000:00/0000:00:06.0/0000:02:00.0";
        for (place, found) in [
            (
                "virtio4/ndbus0/region0/namespace0.0/block/pmem0",
                Some("0000:02:00.0"),
            ),
            ("virtiofs/ndbus0/region0/namespace0.0/block/pmem0", None),
            ("ndbus0/region0/namespace0.0/block/pmem0", None),
        ] {
            let disk = root.path().join(device).join(place);
            fs::create_dir_all(&disk).unwrap();
            let address = pci_of(&disk).map(|address| address.to_string());
            assert_eq!(address.as_deref(), found);
        }
        assert_eq!(pci_of(&root.path().join("gone")), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_is_written_there_is_read_or_refused(content in proptest::collection::vec(any::<u8>(), 0..60)) {
            let root = tempfile::tempdir().unwrap();
            let nd = root.path().join("bus/nd/devices");
            for directory in ["nmem0/nfit", "region0/namespace0.0/block/pmem0"] {
                fs::create_dir_all(nd.join(directory)).unwrap();
            }
            for file in ["nmem0/nfit/handle", "region0/mappings", "region0/mapping0", "region0/resource"] {
                fs::write(nd.join(file), &content).unwrap();
            }
            for id in [PmemId::NfitHandle(1), PmemId::Region(0)] {
                prop_assert!(id.disk(root.path()).is_err());
            }
        }
    }
}
