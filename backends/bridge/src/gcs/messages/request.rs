//! A request to change something of the VM.

use blockmount::printable;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use thiserror::Error;

use super::{CombinedLayers, MappedVirtualDisk, ScsiDevice, VpmemDevice, WindowsDisk};
use crate::gcs::Hresult;
use crate::gcs::json::decode_value;

/// What to do with a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RequestType {
    /// Set it up. What a request without a type means.
    #[default]
    Add,
    /// Tear it down.
    Remove,
    /// Change it.
    Update,
    /// Prepare it.
    PreAdd,
}

impl RequestType {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            RequestType::Add => "Add",
            RequestType::Remove => "Remove",
            RequestType::Update => "Update",
            RequestType::PreAdd => "PreAdd",
        }
    }

    /// The type of this name; an empty one is [`Add`](Self::Add).
    pub fn from_name(name: &str) -> Option<Self> {
        use RequestType::{Add, PreAdd, Remove, Update};
        match name {
            "" => Some(Add),
            _ => [Add, Remove, Update, PreAdd]
                .into_iter()
                .find(|kind| kind.name() == name),
        }
    }
}

/// A change of the VM: what to do with which resource.
#[derive(Debug, Clone, PartialEq)]
pub struct ModificationRequest {
    /// What to do.
    pub request_type: RequestType,
    /// With what.
    pub resource: Resource,
}

/// What a guest can be asked to change.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// The mount of a SCSI disk in a Linux guest.
    MappedVirtualDisk(MappedVirtualDisk),
    /// The mount of a SCSI disk in a Windows guest.
    WindowsDisk(WindowsDisk),
    /// The same, formatted with ReFS before.
    WindowsScratch(WindowsDisk),
    /// A SCSI disk itself; only to be removed.
    ScsiDevice(ScsiDevice),
    /// The mount of a persistent memory device, or of a range of one.
    VpmemDevice(VpmemDevice),
    /// An overlay.
    CombinedLayers(CombinedLayers),
}

impl Resource {
    /// The type of the resource, as it is on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Resource::MappedVirtualDisk(_) | Resource::WindowsDisk(_) => "MappedVirtualDisk",
            Resource::WindowsScratch(_) => "MappedVirtualDiskForContainerScratch",
            Resource::ScsiDevice(_) => "SCSIDevice",
            Resource::VpmemDevice(_) => "VPMemDevice",
            Resource::CombinedLayers(_) => "CombinedLayers",
        }
    }
}

/// Why a [`ModificationRequest`] cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnreadableRequest {
    /// A value that cannot be read or does not fit.
    #[error("the settings of {resource} cannot be read: {error}")]
    Json {
        /// The type of the resource.
        resource: String,
        /// What is wrong with it.
        error: serde_json::Error,
    },
    /// There are no settings. The words are those of other guests.
    #[error("the settings of {0} cannot be read: unexpected end of JSON input")]
    NoSettings(String),
    /// A request type that is not defined.
    #[error("invalid RequestType '{0}'")]
    RequestType(String),
    /// A type of resource that this crate does not know.
    #[error("invalid ResourceType '{0}'")]
    ResourceType(String),
}

impl UnreadableRequest {
    /// The number that says so to the host.
    pub fn hresult(&self) -> Hresult {
        match self {
            UnreadableRequest::Json { .. } | UnreadableRequest::NoSettings(_) => {
                Hresult::INVALID_JSON
            }
            _ => Hresult::FAIL,
        }
    }
}

/// The outer form of a request, before the type of its settings is known.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Outer {
    request_type: String,
    resource_type: String,
    settings: Option<Value>,
}

impl ModificationRequest {
    /// A request to set something up.
    pub fn add(resource: Resource) -> Self {
        ModificationRequest {
            request_type: RequestType::Add,
            resource,
        }
    }

    /// A request to tear something down.
    pub fn remove(resource: Resource) -> Self {
        ModificationRequest {
            request_type: RequestType::Remove,
            resource,
        }
    }

    /// Reads a request as a Linux guest does.
    ///
    /// # Errors
    ///
    /// [`UnreadableRequest`]; without effect on anything else.
    pub fn from_value(request: Value) -> Result<Self, UnreadableRequest> {
        Self::read(request, linux_reader)
    }

    /// Reads a request as a Windows guest does, which has other settings under the same name.
    ///
    /// # Errors
    ///
    /// [`UnreadableRequest`]; without effect on anything else.
    pub fn from_windows_value(request: Value) -> Result<Self, UnreadableRequest> {
        Self::read(request, windows_reader)
    }

    fn read(request: Value, reader: fn(&str) -> Option<Reader>) -> Result<Self, UnreadableRequest> {
        let unreadable = |resource: &str| {
            let resource = resource.to_owned();
            move |error| UnreadableRequest::Json { resource, error }
        };
        let outer: Outer = decode_value(request).map_err(unreadable("the request"))?;
        let Outer {
            request_type,
            resource_type,
            settings,
        } = outer;
        let request_type = RequestType::from_name(&request_type).ok_or_else(|| {
            UnreadableRequest::RequestType(printable(request_type).shortened(64).to_string())
        })?;
        let Some(read) = reader(&resource_type) else {
            return Err(UnreadableRequest::ResourceType(
                printable(resource_type).shortened(64).to_string(),
            ));
        };
        let Some(settings) = settings else {
            return Err(UnreadableRequest::NoSettings(resource_type));
        };
        let resource = read(settings).map_err(unreadable(&resource_type))?;
        Ok(ModificationRequest {
            request_type,
            resource,
        })
    }
}

/// Reads the settings of one type of resource.
type Reader = fn(Value) -> Result<Resource, serde_json::Error>;

/// How a Linux guest reads the settings of a resource, if it knows it.
fn linux_reader(resource_type: &str) -> Option<Reader> {
    Some(match resource_type {
        "MappedVirtualDisk" => |settings| decode_value(settings).map(Resource::MappedVirtualDisk),
        "SCSIDevice" => |settings| decode_value(settings).map(Resource::ScsiDevice),
        "VPMemDevice" => |settings| decode_value(settings).map(Resource::VpmemDevice),
        "CombinedLayers" => |settings| decode_value(settings).map(Resource::CombinedLayers),
        _ => return None,
    })
}

/// How a Windows guest does.
fn windows_reader(resource_type: &str) -> Option<Reader> {
    Some(match resource_type {
        "MappedVirtualDisk" => |settings| decode_value(settings).map(Resource::WindowsDisk),
        "MappedVirtualDiskForContainerScratch" => {
            |settings| decode_value(settings).map(Resource::WindowsScratch)
        }
        _ => return None,
    })
}

impl Serialize for ModificationRequest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut request = serializer.serialize_struct("ModificationRequest", 3)?;
        request.serialize_field("RequestType", self.request_type.name())?;
        request.serialize_field("ResourceType", self.resource.name())?;
        match &self.resource {
            Resource::MappedVirtualDisk(disk) => request.serialize_field("Settings", disk)?,
            Resource::WindowsDisk(disk) | Resource::WindowsScratch(disk) => {
                request.serialize_field("Settings", disk)?;
            }
            Resource::ScsiDevice(device) => request.serialize_field("Settings", device)?,
            Resource::VpmemDevice(device) => request.serialize_field("Settings", device)?,
            Resource::CombinedLayers(layers) => request.serialize_field("Settings", layers)?,
        }
        request.end()
    }
}
