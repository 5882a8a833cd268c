//! The documents of the Host Compute Service (HCS), as JSON.
//!
//! Names and order of the fields, what is left out and what is escaped are as in the documents of other clients, byte for
//! byte: older services refuse what they do not know. A document is always written from these types, so that no path
//! can end a string early.

mod devices;
mod path;
mod properties;

use blockmount::{BackendError, Disk, DiskKind, printable};
use blockmount_bridge::gcs::messages::{
    ModificationRequest, RequestType, Writer, decode, decode_value, encode, is_zero,
};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use thiserror::Error;

pub use self::devices::{Devices, Scsi, VirtualPMemController};
pub use self::path::{DiskAddress, InvalidPath, ResourcePath};
pub use self::properties::{GuestConnectionInfo, Properties, PropertyQuery};

pub(crate) use self::properties::ErrorDocument;

use crate::disk;

/// A change of a VM: of its devices, or within its guest.
#[derive(Debug, Clone, PartialEq)]
pub struct ModifySettingRequest {
    /// What changes; nothing of the VM's own where there is only a request for the guest.
    pub resource_path: Option<ResourcePath>,
    /// How it changes.
    pub request_type: Option<RequestType>,
    /// What it becomes; none where it is removed.
    pub settings: Option<Settings>,
    /// What the guest does about it, where the service has the connection to the guest.
    pub guest_request: Option<ModificationRequest>,
}

/// What a device of a VM becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Settings {
    /// A disk on a SCSI controller.
    Attachment(Attachment),
    /// A VPMEM device that is one disk.
    VpmemDevice(VirtualPMemDevice),
    /// A disk on a part of a VPMEM device.
    VpmemMapping(VirtualPMemMapping),
}

/// A disk on a SCSI controller.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Attachment {
    /// `VirtualDisk`, `PassThru` or `ExtensibleVirtualDisk`.
    #[serde(rename = "Type", skip_serializing_if = "is_zero")]
    pub kind: String,
    /// The file or device on the host, or what its provider calls it.
    #[serde(skip_serializing_if = "is_zero")]
    pub path: String,
    /// Flushes of the guest are not passed on.
    #[serde(skip_serializing_if = "is_zero")]
    pub ignore_flushes: bool,
    /// How the host caches: `Uncached`, `Cached` or `ReadOnlyCached`.
    #[serde(skip_serializing_if = "is_zero")]
    pub caching_mode: String,
    /// Writes may be lost when the host fails.
    #[serde(skip_serializing_if = "is_zero")]
    pub no_write_hardening: bool,
    /// The image grows as it is written to.
    #[serde(skip_serializing_if = "is_zero")]
    pub disable_expansion_optimization: bool,
    /// The image's parent is found by its absolute path.
    #[serde(skip_serializing_if = "is_zero")]
    pub ignore_relative_locator: bool,
    /// I/O is accounted to the process that caused it.
    #[serde(skip_serializing_if = "is_zero")]
    pub capture_io_attribution_context: bool,
    /// The VM cannot write to it.
    #[serde(skip_serializing_if = "is_zero")]
    pub read_only: bool,
    /// The image may be on a compressed volume.
    #[serde(skip_serializing_if = "is_zero")]
    pub support_compressed_volumes: bool,
    /// The image may be a sparse file.
    #[serde(skip_serializing_if = "is_zero")]
    pub always_allow_sparse_files: bool,
    /// The provider of an `ExtensibleVirtualDisk`.
    #[serde(skip_serializing_if = "is_zero")]
    pub extensible_virtual_disk_type: String,
}

impl Attachment {
    /// The attachment of a disk, with what its kind and access need and nothing else.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if it has options; `Invalid` if its source is empty, has a NUL in it or is not Unicode, or if its provider
    /// has no name.
    pub fn of(disk: &Disk) -> Result<Self, BackendError> {
        disk.options().require_only(&[])?;
        let (kind, provider) = match disk.kind() {
            DiskKind::VirtualDisk => ("VirtualDisk", ""),
            DiskKind::PhysicalDisk => ("PassThru", ""),
            DiskKind::Extensible { provider } if provider.is_empty() => {
                let message = format!("the provider of disk {disk} has no name");
                return Err(BackendError::invalid(message));
            }
            DiskKind::Extensible { provider } => ("ExtensibleVirtualDisk", provider.as_str()),
            other => {
                let message = format!("Hyper-V has no disks like {disk} ({other:?})");
                return Err(BackendError::unsuitable(message));
            }
        };
        Ok(Attachment {
            kind: kind.to_owned(),
            path: disk::path(disk)?,
            read_only: disk.is_read_only(),
            extensible_virtual_disk_type: provider.to_owned(),
            ..Attachment::default()
        })
    }
}

/// A VPMEM device that is one disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VirtualPMemDevice {
    /// The file on the host.
    #[serde(skip_serializing_if = "is_zero")]
    pub host_path: String,
    /// The VM cannot write to it.
    #[serde(skip_serializing_if = "is_zero")]
    pub read_only: bool,
    /// `Vhd1` for a file that is the disk and a footer after it, `Vhdx`.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_format: String,
}

impl VirtualPMemDevice {
    /// The device of a disk.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if it has options, or is not an image file to be attached read-only; `Invalid` as for [`Attachment::of`].
    pub fn of(disk: &Disk) -> Result<Self, BackendError> {
        disk::fit_for_vpmem(disk)?;
        let format = if disk::is_vhdx(disk) { "Vhdx" } else { "Vhd1" };
        Ok(VirtualPMemDevice {
            host_path: disk::path(disk)?,
            read_only: true,
            image_format: format.to_owned(),
        })
    }
}

/// A disk on a part of a VPMEM device. All of them are read-only.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VirtualPMemMapping {
    /// The file on the host.
    #[serde(skip_serializing_if = "is_zero")]
    pub host_path: String,
    /// `Vhd1`.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_format: String,
}

impl VirtualPMemMapping {
    /// The mapping of a disk.
    ///
    /// # Errors
    ///
    /// `Unsuitable` as for [`VirtualPMemDevice::of`], or if it is a VHDX, whose content is not where it is in the file;
    /// `Invalid` as for [`Attachment::of`].
    pub fn of(disk: &Disk) -> Result<Self, BackendError> {
        let VirtualPMemDevice {
            host_path,
            image_format,
            ..
        } = VirtualPMemDevice::of(disk)?;
        if disk::is_vhdx(disk) {
            let message = format!(
                "disk {disk} is a VHDX, which cannot be mapped to a part of a VPMEM device; \
                 attach it to a whole one, or over SCSI"
            );
            return Err(BackendError::unsuitable(message));
        }
        Ok(VirtualPMemMapping {
            host_path,
            image_format,
        })
    }
}

/// Why a document cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnreadableDocument {
    /// It is not such a document, or a value in it has another type.
    #[error("the document cannot be read")]
    Json(#[from] serde_json::Error),
    /// It is about something that this crate does not know.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// The type of the request is none.
    #[error("there is no request type \"{0}\"")]
    RequestType(String),
    /// The request for the guest cannot be read.
    #[error("the request for the guest cannot be read")]
    GuestRequest(#[from] blockmount_bridge::gcs::messages::UnreadableRequest),
}

/// The outer form of a request, before the type of its settings is known.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Outer {
    resource_path: String,
    request_type: String,
    settings: Option<Value>,
    guest_request: Option<Value>,
}

impl ModifySettingRequest {
    /// A request to add a disk.
    pub fn add(path: ResourcePath, settings: Settings) -> Self {
        ModifySettingRequest {
            resource_path: Some(path),
            request_type: Some(RequestType::Add),
            settings: Some(settings),
            guest_request: None,
        }
    }

    /// A request to remove a disk.
    pub fn remove(path: ResourcePath) -> Self {
        ModifySettingRequest {
            resource_path: Some(path),
            request_type: Some(RequestType::Remove),
            settings: None,
            guest_request: None,
        }
    }

    /// A request for the guest alone.
    pub fn guest(request: ModificationRequest) -> Self {
        ModifySettingRequest {
            resource_path: None,
            request_type: None,
            settings: None,
            guest_request: Some(request),
        }
    }

    /// The document, as other clients write it.
    pub fn to_json(&self) -> String {
        to_json(self)
    }

    /// Reads a document, as the service does: keys in any case, unknown ones skipped.
    ///
    /// # Errors
    ///
    /// [`UnreadableDocument`]; never panics.
    pub fn from_json(document: &str) -> Result<Self, UnreadableDocument> {
        let Outer {
            resource_path,
            request_type,
            settings,
            guest_request,
        } = decode(document.as_bytes())?;
        let resource_path = match resource_path.as_str() {
            "" => None,
            path => Some(path.parse::<ResourcePath>()?),
        };
        let request_type = match request_type.as_str() {
            "" => None,
            name => Some(RequestType::from_name(name).ok_or_else(|| {
                UnreadableDocument::RequestType(printable(name).shortened(64).to_string())
            })?),
        };
        let settings = match (&resource_path, settings) {
            (Some(path), Some(settings)) => Some(match path.address() {
                DiskAddress::Scsi(_) => Settings::Attachment(decode_value(settings)?),
                DiskAddress::VpmemDevice(_) => Settings::VpmemDevice(decode_value(settings)?),
                DiskAddress::VpmemMapping { .. } => Settings::VpmemMapping(decode_value(settings)?),
            }),
            _ => None,
        };
        Ok(ModifySettingRequest {
            resource_path,
            request_type,
            settings,
            guest_request: guest_request.map(guest_part).transpose()?,
        })
    }
}

/// Reads a request for a guest, by its shape: the document does not say which guest it is.
fn guest_part(
    request: Value,
) -> Result<ModificationRequest, blockmount_bridge::gcs::messages::UnreadableRequest> {
    let is_windows = request["ResourceType"] == "MappedVirtualDiskForContainerScratch"
        || request["Settings"].get("ContainerPath").is_some();
    if is_windows {
        ModificationRequest::from_windows_value(request)
    } else {
        ModificationRequest::from_value(request)
    }
}

/// Writes any document of this module.
fn to_json<T: Serialize>(document: &T) -> String {
    // The other clients' encoder is that of Go, without a line feed at the end.
    String::from_utf8(encode(document, Writer::Guest)).expect("JSON is text")
}

impl Serialize for ModifySettingRequest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut request = serializer.serialize_struct("ModifySettingRequest", 4)?;
        if let Some(path) = &self.resource_path {
            request.serialize_field("ResourcePath", &path.to_string())?;
        }
        if let Some(request_type) = self.request_type {
            request.serialize_field("RequestType", request_type.name())?;
        }
        if let Some(settings) = &self.settings {
            request.serialize_field("Settings", settings)?;
        }
        if let Some(guest_request) = &self.guest_request {
            request.serialize_field("GuestRequest", guest_request)?;
        }
        request.end()
    }
}
