//! The settings of requests about disks.

use serde::{Deserialize, Serialize};

use crate::gcs::json::is_zero;

/// How a SCSI disk is mounted in a Linux guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct MappedVirtualDisk {
    /// Where. A request without a path asks for nothing.
    #[serde(skip_serializing_if = "is_zero")]
    pub mount_path: String,
    /// The disk on its controller.
    #[serde(skip_serializing_if = "is_zero")]
    pub lun: u8,
    /// The controller.
    #[serde(skip_serializing_if = "is_zero")]
    pub controller: u8,
    /// The partition, from 1; 0 is the whole disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub partition: u64,
    /// Refuse writes.
    #[serde(skip_serializing_if = "is_zero")]
    pub read_only: bool,
    /// Encrypt with a key that is thrown away.
    #[serde(skip_serializing_if = "is_zero")]
    pub encrypted: bool,
    /// Mount options by name.
    #[serde(skip_serializing_if = "is_zero")]
    pub options: Vec<String>,
    /// Let the block device itself appear at the path.
    #[serde(skip_serializing_if = "is_zero")]
    pub block_dev: bool,
    /// An older way to ask for an integrity check, which later guests ignore.
    #[serde(skip_serializing_if = "is_zero")]
    pub verity_info: Option<VerityInfo>,
    /// Make the filesystem if it is not there.
    #[serde(skip_serializing_if = "is_zero")]
    pub ensure_filesystem: bool,
    /// The filesystem.
    #[serde(skip_serializing_if = "is_zero")]
    pub filesystem: String,
}

/// How a SCSI disk is mounted in a Windows guest. The controller is 0.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct WindowsDisk {
    /// Where.
    #[serde(skip_serializing_if = "is_zero")]
    pub container_path: String,
    /// The disk on its controller.
    #[serde(skip_serializing_if = "is_zero")]
    pub lun: i32,
}

/// A SCSI disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ScsiDevice {
    /// The controller.
    #[serde(skip_serializing_if = "is_zero")]
    pub controller: u8,
    /// The disk on it.
    #[serde(skip_serializing_if = "is_zero")]
    pub lun: u8,
}

/// How a persistent memory device is mounted: read-only, always.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VpmemDevice {
    /// The device.
    #[serde(skip_serializing_if = "is_zero")]
    pub device_number: u32,
    /// Where.
    #[serde(skip_serializing_if = "is_zero")]
    pub mount_path: String,
    /// The range of the device that is meant; all of it if none.
    #[serde(skip_serializing_if = "is_zero")]
    pub mapping_info: Option<MappingInfo>,
    /// An older way to ask for an integrity check, which later guests ignore.
    #[serde(skip_serializing_if = "is_zero")]
    pub verity_info: Option<VerityInfo>,
}

/// A range of a persistent memory device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct MappingInfo {
    /// Where it starts.
    #[serde(skip_serializing_if = "is_zero")]
    pub device_offset_in_bytes: u64,
    /// How long it is.
    #[serde(skip_serializing_if = "is_zero")]
    pub device_size_in_bytes: u64,
}

/// An older way to ask for an integrity check: the hash tree follows the filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VerityInfo {
    /// The size of the filesystem.
    #[serde(skip_serializing_if = "is_zero")]
    pub ext4_size_in_bytes: i64,
    /// The version of the format of the tree.
    #[serde(skip_serializing_if = "is_zero")]
    pub version: i64,
    /// The digest algorithm.
    #[serde(skip_serializing_if = "is_zero")]
    pub algorithm: String,
    /// Whether a superblock is between filesystem and tree.
    #[serde(skip_serializing_if = "is_zero")]
    pub super_block: bool,
    /// The digest of the root.
    #[serde(skip_serializing_if = "is_zero")]
    pub root_digest: String,
    /// The salt.
    #[serde(skip_serializing_if = "is_zero")]
    pub salt: String,
    /// The size of a block, of data and of hashes.
    #[serde(skip_serializing_if = "is_zero")]
    pub block_size: i64,
}

/// An overlay of mounted layers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CombinedLayers {
    /// The container that it is for, by the name of the directory that the tree is in; a guest with a policy asks for it.
    #[serde(rename = "ContainerID", skip_serializing_if = "is_zero")]
    pub container_id: String,
    /// Where the tree appears.
    #[serde(skip_serializing_if = "is_zero")]
    pub container_root_path: String,
    /// The layers, the topmost first.
    #[serde(skip_serializing_if = "is_zero")]
    pub layers: Vec<Layer>,
    /// The directory that takes the changes; the tree is read-only without one.
    #[serde(skip_serializing_if = "is_zero")]
    pub scratch_path: String,
}

/// A layer of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Layer {
    /// An id, if the layer has one.
    #[serde(skip_serializing_if = "is_zero")]
    pub id: String,
    /// Where it is mounted.
    #[serde(skip_serializing_if = "is_zero")]
    pub path: String,
    /// What is at the path.
    #[serde(skip_serializing_if = "is_zero")]
    pub path_type: String,
    /// Whether Windows caches it.
    #[serde(skip_serializing_if = "is_zero")]
    pub cache: String,
}
