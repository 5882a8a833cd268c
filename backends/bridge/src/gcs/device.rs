//! Devices as GCS addresses them.

use blockmount::{BackendError, DeviceLocator};
use blockmount_scsi::ScsiAddress;
use blockmount_vpmem::{ByteRange, VpmemAddress};

use crate::gcs::messages::{MappingInfo, ScsiDevice};

/// A device that a message can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Scsi(ScsiDevice),
    Vpmem {
        number: u32,
        mapping: Option<MappingInfo>,
    },
}

impl TryFrom<&DeviceLocator> for Device {
    type Error = BackendError;

    fn try_from(locator: &DeviceLocator) -> Result<Self, BackendError> {
        match locator.transport() {
            blockmount_vpmem::SCHEME => {
                let VpmemAddress { device, range } = VpmemAddress::try_from(locator)?;
                Ok(Device::Vpmem {
                    number: device.get().into(),
                    mapping: range.map(|range| MappingInfo {
                        device_offset_in_bytes: range.offset(),
                        device_size_in_bytes: range.size(),
                    }),
                })
            }
            blockmount_scsi::SCHEME => {
                let ScsiAddress { controller, lun } = ScsiAddress::try_from(locator)?;
                let lun = u8::try_from(lun.get()).map_err(|_| {
                    let message =
                        format!("{locator} is beyond LUN 255, the last that GCS can name");
                    BackendError::unsuitable(message)
                })?;
                Ok(Device::Scsi(ScsiDevice {
                    controller: controller.get(),
                    lun,
                }))
            }
            _ => Err(BackendError::unsuitable(format!(
                "GCS has no message for {locator}, only for SCSI and VPMEM devices"
            ))),
        }
    }
}

impl From<ScsiDevice> for Device {
    fn from(device: ScsiDevice) -> Self {
        Device::Scsi(device)
    }
}

impl TryFrom<Device> for DeviceLocator {
    type Error = BackendError;

    /// Checks what the wire allows and no VM has, such as controller 200.
    fn try_from(device: Device) -> Result<Self, BackendError> {
        match device {
            Device::Scsi(ScsiDevice { controller, lun }) => {
                let address = ScsiAddress::new(
                    u64::from(controller).try_into()?,
                    u64::from(lun).try_into()?,
                );
                Ok(address.into())
            }
            Device::Vpmem { number, mapping } => {
                let range = mapping.map(|mapping| {
                    ByteRange::new(mapping.device_offset_in_bytes, mapping.device_size_in_bytes)
                });
                let address = VpmemAddress {
                    device: u64::from(number).try_into()?,
                    range: range.transpose()?,
                };
                Ok(address.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_read_back_what_they_print() {
        for text in [
            "scsi:0/0",
            "scsi:3/63",
            "scsi:63/255",
            "vpmem:0",
            "vpmem:2@4194304+1052672",
        ] {
            let locator: DeviceLocator = text.parse().unwrap();
            let device = Device::try_from(&locator).unwrap();
            assert_eq!(DeviceLocator::try_from(device).unwrap(), locator);
        }
    }

    #[test]
    fn what_the_wire_cannot_name_is_refused() {
        use blockmount::ErrorKind::{Invalid, Unsuitable};
        for (text, kind) in [
            ("scsi:0/256", Unsuitable),
            ("scsi:64/0", Invalid),
            ("scsi:00/1", Invalid),
            ("loop:7", Unsuitable),
            ("vpmem:-1", Invalid),
            ("vpmem:+1", Invalid),
            ("vpmem:01", Invalid),
            ("vpmem:4294967296", Invalid),
            ("vpmem:1@2", Invalid),
            ("vpmem:1@0+0", Invalid),
            ("vpmem:1@18446744073709551615+1", Invalid),
        ] {
            let locator = text.parse().unwrap();
            let error = Device::try_from(&locator).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}: {error}");
        }
        let absent = Device::Scsi(ScsiDevice {
            controller: 200,
            lun: 0,
        });
        assert_eq!(DeviceLocator::try_from(absent).unwrap_err().kind(), Invalid);
    }
}
