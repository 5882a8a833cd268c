//! The part of the document that makes a VM which is about disks.

use std::collections::BTreeMap;

use blockmount::{BackendError, Disk};
use blockmount_bridge::gcs::messages::is_zero;
use blockmount_scsi::{HYPER_V_CONTROLLERS, ScsiAddress};
use blockmount_vpmem::{DeviceNumber, PAGE};
use serde::{Deserialize, Serialize};

use super::path::{ATTACHMENTS, SCSI, VPMEM};
use super::{Attachment, DiskAddress, ResourcePath, VirtualPMemDevice};

/// The controllers of a VM with what is on them from the start, for the `Devices` of the document that makes the VM.
///
/// What is here must also be reserved with the transport ([`reserved_scsi`](Self::reserved_scsi),
/// [`reserved_vpmem`](Self::reserved_vpmem)), which else gives the address to another disk. The usual ones are the root image of a
/// Linux guest and the scratch of a Windows guest, both at SCSI address 0/0.
///
/// ```
/// use blockmount::Disk;
/// use blockmount_hcs::documents::Devices;
///
/// let root = Disk::virtual_disk(r"C:\rootfs.vhd").read_only();
/// let devices = Devices::default().scsi_controllers(2)?.scsi_disk("0/0".parse()?, &root)?;
/// assert_eq!(devices.reserved_scsi(), ["0/0".parse()?]);
/// assert_eq!(
///     devices.to_json(),
///     r#"{"Scsi":{"0110f83b-de10-5172-a266-78bca56bf50a":{},"df6d0690-79e5-55b6-a5ec-c1e2f77f580a":{"Attachments":{"0":{"Type":"VirtualDisk","Path":"C:\\rootfs.vhd","ReadOnly":true}}}}}"#
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Devices {
    /// The SCSI controllers by their [GUIDs](HYPER_V_CONTROLLERS).
    #[serde(skip_serializing_if = "is_zero")]
    pub scsi: BTreeMap<String, Scsi>,
    /// The VPMEM devices.
    #[serde(rename = "VirtualPMem", skip_serializing_if = "is_zero")]
    pub virtual_pmem: Option<VirtualPMemController>,
}

/// A SCSI controller.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Scsi {
    /// The disks by their LUNs in decimal digits.
    #[serde(skip_serializing_if = "is_zero")]
    pub attachments: BTreeMap<String, Attachment>,
}

/// The VPMEM devices of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VirtualPMemController {
    /// The devices by their numbers in decimal digits.
    #[serde(skip_serializing_if = "is_zero")]
    pub devices: BTreeMap<String, VirtualPMemDevice>,
    /// How many devices there can be.
    #[serde(skip_serializing_if = "is_zero")]
    pub maximum_count: u32,
    /// How large a device is at most, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub maximum_size_bytes: u64,
    /// `Virtual` or `Physical`; the service's choice if empty.
    #[serde(skip_serializing_if = "is_zero")]
    pub backing: String,
}

impl Devices {
    /// The same with SCSI controllers 0 up to a count.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if there are more than 4, which is all that a VM can have.
    pub fn scsi_controllers(mut self, count: usize) -> Result<Self, BackendError> {
        let guids = HYPER_V_CONTROLLERS.get(..count).ok_or_else(|| {
            BackendError::unsuitable(format!(
                "a VM of Hyper-V has at most {} SCSI controllers, not {count}",
                HYPER_V_CONTROLLERS.len()
            ))
        })?;
        for guid in guids {
            self.scsi.entry((*guid).to_owned()).or_default();
        }
        Ok(self)
    }

    /// The same with a disk at a SCSI address.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if no VM has such an address, `Conflict` if it is taken, `Invalid` as for [`Attachment::of`].
    pub fn scsi_disk(mut self, address: ScsiAddress, disk: &Disk) -> Result<Self, BackendError> {
        let at = ResourcePath::try_from(DiskAddress::Scsi(address))?.address();
        let attachment = Attachment::of(disk)?;
        let guid = HYPER_V_CONTROLLERS[usize::from(address.controller.get())];
        let controller = self.scsi.entry(guid.to_owned()).or_default();
        insert(
            &mut controller.attachments,
            address.lun.to_string(),
            attachment,
            at,
        )?;
        Ok(self)
    }

    /// The same with so many VPMEM devices of at most a size in bytes. Usual are 64 of 4 GiB.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if there are more than 128, which is all that a VM can have, or if the size is not of whole pages of 4096 bytes.
    pub fn vpmem(
        mut self,
        maximum_count: u32,
        maximum_size_bytes: u64,
    ) -> Result<Self, BackendError> {
        let limit = u32::from(DeviceNumber::LIMIT);
        let pages = maximum_size_bytes > 0 && maximum_size_bytes.is_multiple_of(PAGE);
        if maximum_count > limit || !pages {
            return Err(BackendError::unsuitable(format!(
                "a VM of Hyper-V has at most {limit} VPMEM devices of whole pages of {PAGE} bytes, \
                 not {maximum_count} of {maximum_size_bytes} bytes"
            )));
        }
        let controller = self.virtual_pmem.get_or_insert_default();
        controller.maximum_count = maximum_count;
        controller.maximum_size_bytes = maximum_size_bytes;
        Ok(self)
    }

    /// The same with a disk as a VPMEM device.
    ///
    /// # Errors
    ///
    /// `Conflict` if the device is taken, `Unsuitable` and `Invalid` as for [`VirtualPMemDevice::of`].
    pub fn vpmem_disk(mut self, device: DeviceNumber, disk: &Disk) -> Result<Self, BackendError> {
        let controller = self.virtual_pmem.get_or_insert_default();
        let (address, entry) = (
            DiskAddress::VpmemDevice(device),
            VirtualPMemDevice::of(disk)?,
        );
        insert(&mut controller.devices, device.to_string(), entry, address)?;
        Ok(self)
    }

    /// The SCSI addresses that are taken from the start, in order: what a transport must reserve.
    pub fn reserved_scsi(&self) -> Vec<ScsiAddress> {
        let paths = self.scsi.iter().flat_map(|(guid, controller)| {
            let luns = controller.attachments.keys();
            luns.map(move |lun| format!("{SCSI}{guid}{ATTACHMENTS}{lun}"))
        });
        let mut taken: Vec<ScsiAddress> = paths
            .filter_map(|path| match path.parse::<ResourcePath>().ok()?.address() {
                DiskAddress::Scsi(address) => Some(address),
                _ => None,
            })
            .collect();
        taken.sort_unstable();
        taken
    }

    /// The VPMEM devices that are taken from the start, in order: what a transport must reserve.
    pub fn reserved_vpmem(&self) -> Vec<DeviceNumber> {
        let numbers = self
            .virtual_pmem
            .iter()
            .flat_map(|pmem| pmem.devices.keys());
        let paths = numbers.map(|number| format!("{VPMEM}{number}"));
        let mut taken: Vec<DeviceNumber> = paths
            .filter_map(|path| match path.parse::<ResourcePath>().ok()?.address() {
                DiskAddress::VpmemDevice(device) => Some(device),
                _ => None,
            })
            .collect();
        taken.sort_unstable();
        taken
    }

    /// The fragment: the object that is the value of `Devices`.
    pub fn to_json(&self) -> String {
        super::to_json(self)
    }
}

fn insert<T>(
    taken: &mut BTreeMap<String, T>,
    key: String,
    value: T,
    address: DiskAddress,
) -> Result<(), BackendError> {
    if taken.contains_key(&key) {
        return Err(BackendError::conflict(format!(
            "there is a disk at {address} already"
        )));
    }
    taken.insert(key, value);
    Ok(())
}
