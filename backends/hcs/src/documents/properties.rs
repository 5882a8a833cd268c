//! What the service says about a VM, and about errors.

use blockmount_bridge::gcs::Hresult;
use blockmount_bridge::gcs::messages::{GuestCapabilities, SchemaVersion, decode, is_zero};
use serde::{Deserialize, Serialize};

/// Which properties of a VM are asked for, besides the basic ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PropertyQuery {
    /// Names of properties, such as `GuestConnection`.
    pub property_types: Vec<String>,
}

impl PropertyQuery {
    /// The basic properties alone.
    pub fn basic() -> Self {
        Self::default()
    }

    /// With what is known of the guest.
    pub fn guest_connection() -> Self {
        PropertyQuery {
            property_types: vec!["GuestConnection".to_owned()],
        }
    }

    /// The document.
    pub fn to_json(&self) -> String {
        super::to_json(self)
    }
}

/// The properties of a VM, as far as this crate asks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Properties {
    /// The VM's id.
    #[serde(skip_serializing_if = "is_zero")]
    pub id: String,
    /// `Linux` or `Windows`, if the service knows it.
    #[serde(skip_serializing_if = "is_zero")]
    pub runtime_os_type: String,
    /// `Created`, `Running`, `Paused`, `Stopped`, `SavedAsTemplate` or `Unknown`.
    #[serde(skip_serializing_if = "is_zero")]
    pub state: String,
    /// Whether it has ended.
    #[serde(skip_serializing_if = "is_zero")]
    pub stopped: bool,
    /// The guest, if the service is connected to it and was asked.
    #[serde(skip_serializing_if = "is_zero")]
    pub guest_connection_info: Option<GuestConnectionInfo>,
}

/// What the service knows of a guest that it is connected to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct GuestConnectionInfo {
    /// The versions of the documents of containers.
    #[serde(skip_serializing_if = "is_zero")]
    pub supported_schema_versions: Vec<SchemaVersion>,
    /// The version of the protocol.
    #[serde(skip_serializing_if = "is_zero")]
    pub protocol_version: u32,
    /// What the guest says about itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub guest_defined_capabilities: GuestCapabilities,
}

impl Properties {
    /// Reads the document, whatever the case of its keys.
    ///
    /// # Errors
    ///
    /// If it is no such document.
    pub fn from_json(document: &str) -> Result<Self, serde_json::Error> {
        decode(document.as_bytes())
    }

    /// The document.
    pub fn to_json(&self) -> String {
        super::to_json(self)
    }

    /// Whether the VM has ended, so that nothing of it is left.
    pub fn has_ended(&self) -> bool {
        self.stopped || self.state == "Stopped"
    }
}

/// What the service says about an operation that has failed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ErrorDocument {
    /// The number of the error.
    pub(crate) error: Hresult,
    /// What went wrong.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) error_message: String,
    /// What went wrong below, the outermost first.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) error_events: Vec<ErrorEvent>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ErrorEvent {
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) message: String,
}

impl ErrorDocument {
    /// Reads the document, if it is one.
    pub(crate) fn from_json(document: &str) -> Option<Self> {
        decode(document.as_bytes()).ok()
    }

    /// What is said in it, from the outermost to the innermost cause.
    pub(crate) fn said(&self) -> String {
        let events = self.error_events.iter().map(|event| event.message.trim());
        let said: Vec<&str> = std::iter::once(self.error_message.trim())
            .chain(events)
            .filter(|said| !said.is_empty())
            .collect();
        said.join(": ")
    }
}
