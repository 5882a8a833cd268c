//! The bodies of the messages.
//!
//! Names and order of the fields are those of the protocol.

mod request;
mod storage;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::gcs::Hresult;

pub use self::request::{ModificationRequest, RequestType, Resource, UnreadableRequest};
pub use self::storage::{
    CombinedLayers, Layer, MappedVirtualDisk, MappingInfo, ScsiDevice, VerityInfo, VpmemDevice,
    WindowsDisk,
};
pub use crate::gcs::json::{Writer, decode, decode_value, encode, is_zero};

/// The only version of the protocol that there is.
pub const PROTOCOL_VERSION: u32 = 4;

/// The id of the VM itself where a message names a container, and the activity of every message.
pub const NULL_ID: &str = "00000000-0000-0000-0000-000000000000";

/// What every request starts with, and all that some are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RequestBase {
    /// The container that it is about; the VM itself is [`NULL_ID`].
    pub container_id: String,
    /// What it is a part of; the answer repeats it.
    pub activity_id: String,
}

/// Begins a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NegotiateRequest {
    /// Empty.
    pub container_id: String,
    /// [`NULL_ID`].
    pub activity_id: String,
    /// The lowest version that the host speaks.
    pub minimum_version: u32,
    /// The highest version that the host speaks.
    pub maximum_version: u32,
}

impl Default for NegotiateRequest {
    /// What a host of this version says.
    fn default() -> Self {
        NegotiateRequest {
            container_id: String::new(),
            activity_id: NULL_ID.to_owned(),
            minimum_version: PROTOCOL_VERSION,
            maximum_version: PROTOCOL_VERSION,
        }
    }
}

/// The answer to [`NegotiateRequest`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NegotiateResponse {
    /// Success or error.
    pub result: Hresult,
    /// That of the request.
    #[serde(skip_serializing_if = "is_zero")]
    pub activity_id: String,
    /// What went wrong.
    #[serde(skip_serializing_if = "is_zero")]
    pub error_message: String,
    /// What went wrong, in detail.
    #[serde(skip_serializing_if = "is_zero")]
    pub error_records: Vec<ErrorRecord>,
    /// The version that both speak.
    #[serde(skip_serializing_if = "is_zero")]
    pub version: u32,
    /// What the guest can do.
    pub capabilities: Capabilities,
}

/// What a guest can do, as far as hosts ask.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Capabilities {
    /// The host has to send a Create for the VM itself; so with Windows.
    #[serde(skip_serializing_if = "is_zero")]
    pub send_host_create_message: bool,
    /// And a Start after it.
    #[serde(skip_serializing_if = "is_zero")]
    pub send_host_start_message: bool,
    /// The versions of the documents of containers.
    #[serde(skip_serializing_if = "is_zero")]
    pub supported_schema_versions: Vec<SchemaVersion>,
    /// `Linux` or `Windows`.
    #[serde(skip_serializing_if = "is_zero")]
    pub runtime_os_type: String,
    /// What the guest says beyond the protocol.
    pub guest_defined_capabilities: GuestCapabilities,
}

impl Capabilities {
    /// Whether disks are mounted the Windows way in this guest.
    pub fn is_windows(&self) -> bool {
        self.runtime_os_type.eq_ignore_ascii_case("windows")
    }
}

/// A version of the documents of containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct SchemaVersion {
    /// Incompatible changes.
    pub major: u32,
    /// Compatible changes.
    pub minor: u32,
}

/// What a Linux guest says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct GuestCapabilities {
    /// Network namespaces can be added.
    #[serde(skip_serializing_if = "is_zero")]
    pub namespace_add_request_supported: bool,
    /// Processes can be signalled.
    #[serde(skip_serializing_if = "is_zero")]
    pub signal_process_supported: bool,
    /// The agent's stacks can be read.
    #[serde(skip_serializing_if = "is_zero")]
    pub dump_stacks_supported: bool,
    /// Containers that have ended can be forgotten.
    #[serde(skip_serializing_if = "is_zero")]
    pub delete_container_state_supported: bool,
}

/// Makes a container, or the VM's own part of a Windows guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CreateRequest {
    /// The new container; [`NULL_ID`] for the VM.
    pub container_id: String,
    /// [`NULL_ID`].
    pub activity_id: String,
    /// A document as JSON inside a string.
    pub container_config: String,
}

impl CreateRequest {
    /// What a guest that asks for it is sent for the VM itself.
    pub fn for_vm() -> Self {
        CreateRequest {
            container_id: NULL_ID.to_owned(),
            activity_id: NULL_ID.to_owned(),
            container_config: r#"{"SystemType":"Container","TimeZoneInformation":null}"#.to_owned(),
        }
    }
}

/// Changes settings: what a host sends.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ModifySettings {
    /// [`NULL_ID`]: the VM.
    pub container_id: String,
    /// [`NULL_ID`].
    pub activity_id: String,
    /// The change.
    pub request: ModificationRequest,
}

impl From<ModificationRequest> for ModifySettings {
    /// A change of the VM.
    fn from(request: ModificationRequest) -> Self {
        ModifySettings {
            container_id: NULL_ID.to_owned(),
            activity_id: NULL_ID.to_owned(),
            request,
        }
    }
}

/// Changes settings: what a guest receives, which may be anything.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ReceivedSettings {
    /// The container that it is about.
    pub container_id: String,
    /// What it is a part of.
    pub activity_id: String,
    /// The change; see [`ModificationRequest::from_value`].
    pub request: Value,
}

/// The answer to every request that asks for nothing but success.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ResponseBase {
    /// Success or error.
    pub result: Hresult,
    /// That of the request.
    #[serde(skip_serializing_if = "is_zero")]
    pub activity_id: String,
    /// What went wrong.
    #[serde(skip_serializing_if = "is_zero")]
    pub error_message: String,
    /// What went wrong, in detail; there may be several.
    #[serde(skip_serializing_if = "is_zero")]
    pub error_records: Vec<ErrorRecord>,
}

/// What went wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ErrorRecord {
    /// The number of the error.
    pub result: Hresult,
    /// The error.
    pub message: String,
    /// The stack of the agent.
    #[serde(skip_serializing_if = "is_zero")]
    pub stack_trace: String,
    /// Which program says so; `gcs` for an agent.
    pub module_name: String,
    /// The file in its source.
    pub file_name: String,
    /// The line in the file; 4294967295 if unknown.
    pub line: u32,
    /// The function.
    #[serde(skip_serializing_if = "is_zero")]
    pub function_name: String,
}

impl ErrorRecord {
    /// A record that says no more than what went wrong.
    pub fn new(result: Hresult, message: impl Into<String>) -> Self {
        ErrorRecord {
            result,
            message: message.into(),
            module_name: "gcs".to_owned(),
            line: u32::MAX,
            ..ErrorRecord::default()
        }
    }
}

/// What a guest says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Notification {
    /// The container that it is about.
    pub container_id: String,
    /// What it is a part of.
    pub activity_id: String,
    /// What happened: `None`, `GracefulExit`, `ForcedExit`, `UnexpectedExit`, `Reboot`, `Constructed`,
    /// `Started`, `Paused`, `Unknown`, or what a later peer may say.
    #[serde(rename = "Type")]
    pub event: String,
    /// What it happened during.
    pub operation: String,
    /// How it ended.
    pub result: Hresult,
}
