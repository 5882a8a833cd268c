//! What a guest is asked for by a message of GCS, and how it refuses.

use std::num::NonZeroU32;
use std::path::PathBuf;

use blockmount::{
    BackendError, Encryption, Expose, Format, InvalidOptions, MountOptions, MountOptionsBuilder,
    Overlay, Verity,
};

use crate::Request;
use crate::gcs::device::Device;
use crate::gcs::hresult::Hresult;
use crate::gcs::messages::{
    CombinedLayers, ErrorRecord, MappedVirtualDisk, ModificationRequest, NULL_ID, ReceivedSettings,
    RequestType, Resource, ResponseBase, ScsiDevice, UnreadableRequest, VerityInfo, VpmemDevice,
};

/// How long an error may be on the wire, in bytes. It is there twice, and each byte may become six.
const LONGEST_MESSAGE: usize = 4 << 10;

/// What a message asks for; nothing, as for a disk that is only attached.
pub(crate) fn read(settings: ReceivedSettings) -> Result<Option<Request>, Refusal> {
    if settings.container_id != NULL_ID {
        let shown: String = settings.container_id.chars().take(64).collect();
        let message = format!("there is no container {shown:?}, only the VM itself ({NULL_ID})");
        return Err(Refusal::new(Hresult::SYSTEM_NOT_FOUND, message));
    }
    let ModificationRequest {
        request_type,
        resource,
    } = ModificationRequest::from_value(settings.request)?;
    let name = resource.name();
    match (request_type, resource) {
        (RequestType::Add, Resource::MappedVirtualDisk(disk)) => mount_disk(disk),
        (RequestType::Remove, Resource::MappedVirtualDisk(disk)) => {
            let target = Some(disk.mount_path).filter(|path| !path.is_empty());
            Ok(target.map(|path| Request::Unmount {
                target: path.into(),
            }))
        }
        (RequestType::Add, Resource::VpmemDevice(device)) => mount_vpmem(device).map(Some),
        (RequestType::Remove, Resource::VpmemDevice(device)) => {
            let target = named(device.mount_path, name)?;
            Ok(Some(Request::Unmount { target }))
        }
        (RequestType::Add, Resource::CombinedLayers(layers)) => combine(layers).map(Some),
        (RequestType::Remove, Resource::CombinedLayers(layers)) => {
            let target = named(layers.container_root_path, name)?;
            Ok(Some(Request::Separate { target }))
        }
        (RequestType::Remove, Resource::ScsiDevice(device)) => {
            let locator = Device::from(device).try_into()?;
            Ok(Some(Request::Unplug { locator }))
        }
        (request_type, _) => {
            let message = format!(
                "the request type {} is not supported for {name}",
                request_type.name()
            );
            Err(BackendError::invalid(message).into())
        }
    }
}

fn mount_disk(disk: MappedVirtualDisk) -> Result<Option<Request>, Refusal> {
    if disk.mount_path.is_empty() {
        // Hosts send this for a disk that is only attached.
        return Ok(None);
    }
    let device = ScsiDevice {
        controller: disk.controller,
        lun: disk.lun,
    };
    let locator = Device::from(device).try_into()?;
    let mut options = MountOptions::builder().options(disk.options);
    if disk.read_only {
        options = options.read_only();
    }
    if disk.partition != 0 {
        options = options.partition(partition(disk.partition)?);
    }
    if disk.encrypted {
        options = options.encryption(Encryption::Ephemeral);
    }
    if disk.block_dev {
        options = options.expose(Expose::BlockDevice);
    }
    if disk.ensure_filesystem {
        if disk.filesystem.is_empty() {
            return Err(BackendError::invalid("there is no filesystem named to be ensured").into());
        }
        options = options.format(Format::new(disk.filesystem));
    } else if !disk.filesystem.is_empty() {
        options = options.filesystem(disk.filesystem);
    }
    Ok(Some(Request::Mount {
        locator,
        target: disk.mount_path.into(),
        options: built(options, disk.verity_info)?,
    }))
}

fn mount_vpmem(disk: VpmemDevice) -> Result<Request, Refusal> {
    let target = named(disk.mount_path, "VPMemDevice")?;
    let device = Device::Vpmem {
        number: disk.device_number,
        mapping: disk.mapping_info,
    };
    Ok(Request::Mount {
        locator: device.try_into()?,
        target,
        options: built(MountOptions::builder().read_only(), disk.verity_info)?,
    })
}

fn combine(layers: CombinedLayers) -> Result<Request, Refusal> {
    let target = named(layers.container_root_path, "CombinedLayers")?;
    let scratch = Some(layers.scratch_path).filter(|path| !path.is_empty());
    let paths = layers.layers.into_iter().map(|layer| layer.path);
    let mut overlay = Overlay::new(paths, target);
    overlay.scratch = scratch.map(PathBuf::from);
    Ok(Request::Combine(overlay))
}

fn named(path: String, resource: &str) -> Result<PathBuf, BackendError> {
    if path.is_empty() {
        return Err(BackendError::invalid(format!("the {resource} has no path")));
    }
    Ok(path.into())
}

fn partition(number: u64) -> Result<NonZeroU32, BackendError> {
    let partition = u32::try_from(number).ok().and_then(NonZeroU32::new);
    partition.ok_or_else(|| BackendError::not_found(format!("no disk has a partition {number}")))
}

fn built(
    mut options: MountOptionsBuilder,
    info: Option<VerityInfo>,
) -> Result<MountOptions, BackendError> {
    if let Some(info) = info {
        options = options.verity(verity(info)?);
    }
    options
        .build()
        .map_err(|error| BackendError::invalid(error.to_string()))
}

/// The integrity check as this crate names it.
fn verity(info: VerityInfo) -> Result<Verity, BackendError> {
    let refuse = |what: &str| Err(BackendError::invalid(format!("the verity info has {what}")));
    if info.version != 1 {
        return refuse("a version other than 1");
    }
    let (size, block) = (
        u64::try_from(info.ext4_size_in_bytes),
        u32::try_from(info.block_size),
    );
    let (Ok(size), Ok(block)) = (size, block) else {
        return refuse("a size that cannot be");
    };
    if block == 0 || size == 0 || size % u64::from(block) != 0 {
        return refuse("a size that is not a number of blocks");
    }
    let data_blocks = size / u64::from(block);
    let mut verity = Verity::new(info.root_digest, data_blocks);
    verity.salt = info.salt;
    verity.algorithm = info
        .algorithm
        .parse()
        .map_err(|error: InvalidOptions| BackendError::invalid(error.to_string()))?;
    (verity.data_block_size, verity.hash_block_size) = (block, block);
    verity.hash_start_block += u64::from(info.super_block);
    Ok(verity)
}

/// Why a request is not done.
#[derive(Debug)]
pub(crate) struct Refusal {
    result: Hresult,
    message: String,
}

impl Refusal {
    pub(crate) fn new(result: Hresult, message: impl Into<String>) -> Self {
        Refusal {
            result,
            message: message.into(),
        }
    }

    /// The answer that says so.
    pub(crate) fn into_response(self, activity_id: String) -> ResponseBase {
        let mut message = self.message;
        if message.len() > LONGEST_MESSAGE {
            let fits = |end: &usize| message.is_char_boundary(*end);
            let end = (0..=LONGEST_MESSAGE).rev().find(fits).unwrap_or(0);
            message.truncate(end);
        }
        ResponseBase {
            result: self.result,
            activity_id,
            error_message: message.clone(),
            error_records: vec![ErrorRecord::new(self.result, message)],
        }
    }
}

impl From<BackendError> for Refusal {
    fn from(error: BackendError) -> Self {
        let mut message = error.message().to_owned();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Refusal::new(error.kind().into(), message)
    }
}

impl From<UnreadableRequest> for Refusal {
    fn from(error: UnreadableRequest) -> Self {
        Refusal::new(error.hresult(), error.to_string())
    }
}
