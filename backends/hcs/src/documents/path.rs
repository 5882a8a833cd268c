//! Which part of a VM a document is about.

use std::fmt;
use std::str::FromStr;

use blockmount::{BackendError, DeviceLocator};
use blockmount_scsi::{Geometry, HYPER_V_CONTROLLERS, ScsiAddress};
use blockmount_vpmem::DeviceNumber;
use thiserror::Error;

pub(super) const SCSI: &str = "VirtualMachine/Devices/Scsi/";
pub(super) const ATTACHMENTS: &str = "/Attachments/";
pub(super) const VPMEM: &str = "VirtualMachine/Devices/VirtualPMem/Devices/";
const MAPPINGS: &str = "/Mappings/";

/// Where a disk is in a VM of Hyper-V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiskAddress {
    /// A LUN of a SCSI controller.
    Scsi(ScsiAddress),
    /// A VPMEM device.
    VpmemDevice(DeviceNumber),
    /// A part of a VPMEM device.
    VpmemMapping {
        /// The device.
        device: DeviceNumber,
        /// Where the part starts, in bytes.
        offset: u64,
    },
}

impl fmt::Display for DiskAddress {
    /// For messages: `SCSI address 0/3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskAddress::Scsi(address) => write!(f, "SCSI address {address}"),
            DiskAddress::VpmemDevice(device) => write!(f, "VPMEM device {device}"),
            DiskAddress::VpmemMapping { device, offset } => {
                write!(f, "offset {offset} of VPMEM device {device}")
            }
        }
    }
}

/// The path of a [`DiskAddress`] in documents. It is the same in every VM of Hyper-V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResourcePath(DiskAddress);

impl ResourcePath {
    /// The address.
    pub fn address(&self) -> DiskAddress {
        self.0
    }
}

impl TryFrom<DiskAddress> for ResourcePath {
    type Error = BackendError;

    /// Fails with `Unsuitable` if no VM of Hyper-V has such an address: it has 4 controllers of 64 LUNs.
    fn try_from(address: DiskAddress) -> Result<Self, BackendError> {
        match address {
            DiskAddress::Scsi(address) if !Geometry::HYPER_V.contains(address) => {
                Err(BackendError::unsuitable(format!(
                    "Hyper-V has no SCSI address {address}, only {} controllers and LUNs",
                    Geometry::HYPER_V
                )))
            }
            _ => Ok(ResourcePath(address)),
        }
    }
}

impl fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            DiskAddress::Scsi(ScsiAddress { controller, lun }) => {
                let guid = HYPER_V_CONTROLLERS[usize::from(controller.get())];
                write!(f, "{SCSI}{guid}{ATTACHMENTS}{lun}")
            }
            DiskAddress::VpmemDevice(device) => write!(f, "{VPMEM}{device}"),
            DiskAddress::VpmemMapping { device, offset } => {
                write!(f, "{VPMEM}{device}{MAPPINGS}{offset}")
            }
        }
    }
}

/// Why a text is not the path of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not the path of a disk")]
pub struct InvalidPath(String);

impl FromStr for ResourcePath {
    type Err = InvalidPath;

    /// Reads exactly what is printed, but a GUID in any case.
    fn from_str(text: &str) -> Result<Self, InvalidPath> {
        parse(text).ok_or_else(|| InvalidPath(text.chars().take(128).collect()))
    }
}

fn parse(text: &str) -> Option<ResourcePath> {
    if let Some(rest) = text.strip_prefix(SCSI) {
        let (guid, lun) = rest.split_once(ATTACHMENTS)?;
        let controller = HYPER_V_CONTROLLERS
            .iter()
            .position(|known| known.eq_ignore_ascii_case(guid))?;
        let controller = u64::try_from(controller).ok()?.try_into().ok()?;
        let address = ScsiAddress::new(controller, DeviceLocator::number(lun)?.try_into().ok()?);
        return DiskAddress::Scsi(address).try_into().ok();
    }
    let rest = text.strip_prefix(VPMEM)?;
    let Some((device, offset)) = rest.split_once(MAPPINGS) else {
        return Some(ResourcePath(DiskAddress::VpmemDevice(
            DeviceLocator::number(rest)?.try_into().ok()?,
        )));
    };
    let device = DeviceLocator::number(device)?.try_into().ok()?;
    let offset = DeviceLocator::number(offset)?;
    Some(ResourcePath(DiskAddress::VpmemMapping { device, offset }))
}
