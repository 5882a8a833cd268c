//! What a guest does for a request: from the protocol to the contracts of the guest.

use std::num::NonZeroU32;
use std::path::PathBuf;

use blockmount::{
    BackendError, DeviceLocator, Encryption, ErrorKind, Expose, Format, LayerCombiner,
    MountOptions, MountOptionsBuilder, Mounter, Overlay, Overwrite, Unplugger, Verity,
};

use crate::gcs::Hresult;
use crate::gcs::device::Device;
use crate::gcs::messages::{
    CombinedLayers, ErrorRecord, MappedVirtualDisk, ModificationRequest, NULL_ID, ReceivedSettings,
    RequestType, Resource, ResponseBase, ScsiDevice, UnreadableRequest, VerityInfo, VerityTarget,
    VpmemDevice,
};

/// How long an error may be on the wire, in bytes. It is there twice, and each byte may become six.
const LONGEST_MESSAGE: usize = 4 << 10;

/// One thing to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Work {
    Mount {
        device: DeviceLocator,
        target: PathBuf,
        options: MountOptions,
    },
    Unmount(PathBuf),
    Combine(Overlay),
    Separate(PathBuf),
    Unplug(DeviceLocator),
    /// A request that asks for nothing.
    Nothing,
}

/// What two pieces of work must not touch at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Target(PathBuf),
    Device(DeviceLocator),
}

impl Work {
    /// Reads what is asked for.
    pub(crate) fn read(settings: ReceivedSettings) -> Result<Self, Refusal> {
        if settings.container_id != NULL_ID {
            let shown: String = settings.container_id.chars().take(64).collect();
            let message =
                format!("there is no container {shown:?}, only the VM itself ({NULL_ID})");
            return Err(Refusal::new(
                Hresult::SYSTEM_NOT_FOUND,
                ErrorKind::NotFound,
                message,
            ));
        }
        let ModificationRequest {
            request_type,
            resource,
        } = ModificationRequest::from_value(settings.request)?;
        let name = resource.name();
        match (request_type, resource) {
            (RequestType::Add, Resource::MappedVirtualDisk(disk)) => mount_disk(disk),
            (RequestType::Remove, Resource::MappedVirtualDisk(disk)) => Ok(match disk.mount_path {
                path if path.is_empty() => Work::Nothing,
                path => Work::Unmount(path.into()),
            }),
            (RequestType::Add, Resource::VpmemDevice(device)) => mount_vpmem(device),
            (RequestType::Remove, Resource::VpmemDevice(device)) if device.unplug => {
                let device = Device::Vpmem {
                    number: device.device_number,
                    mapping: device.mapping_info,
                };
                Ok(Work::Unplug(device.try_into()?))
            }
            (RequestType::Remove, Resource::VpmemDevice(device)) => {
                Ok(Work::Unmount(named(device.mount_path, name)?))
            }
            (RequestType::Add, Resource::CombinedLayers(layers)) => combine(layers),
            (RequestType::Remove, Resource::CombinedLayers(layers)) => {
                Ok(Work::Separate(named(layers.container_root_path, name)?))
            }
            (RequestType::Remove, Resource::ScsiDevice(device)) => {
                Ok(Work::Unplug(Device::from(device).try_into()?))
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

    /// What it touches, if anything.
    pub(crate) fn key(&self) -> Option<Key> {
        Some(match self {
            Work::Mount { target, .. } | Work::Unmount(target) | Work::Separate(target) => {
                Key::Target(target.clone())
            }
            Work::Combine(overlay) => Key::Target(overlay.target.clone()),
            Work::Unplug(device) => Key::Device(device.clone()),
            Work::Nothing => return None,
        })
    }

    pub(crate) async fn run<G>(self, guest: &G) -> Result<(), BackendError>
    where
        G: Mounter + Unplugger + LayerCombiner,
    {
        match self {
            Work::Mount {
                device,
                target,
                options,
            } => guest.mount(&device, &target, &options).await,
            Work::Unmount(target) => guest.unmount(&target).await,
            Work::Combine(overlay) => guest.combine(&overlay).await,
            Work::Separate(target) => guest.separate(&target).await,
            Work::Unplug(device) => guest.unplug(&device).await,
            Work::Nothing => Ok(()),
        }
    }
}

fn mount_disk(disk: MappedVirtualDisk) -> Result<Work, Refusal> {
    if disk.mount_path.is_empty() {
        // Hosts send this for a disk that is only attached.
        return Ok(Work::Nothing);
    }
    let device = ScsiDevice {
        controller: disk.controller,
        lun: disk.lun,
    };
    let device = Device::from(device).try_into()?;
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
        let overwrite = if disk.overwrite {
            Overwrite::Everything
        } else {
            Overwrite::Blank
        };
        let mut format = Format::new(disk.filesystem);
        format.overwrite = overwrite;
        options = options.format(format);
    } else if !disk.filesystem.is_empty() {
        options = options.filesystem(disk.filesystem);
    }
    let options = built(options, verity(disk.verity, disk.verity_info)?)?;
    Ok(Work::Mount {
        device,
        target: disk.mount_path.into(),
        options,
    })
}

fn mount_vpmem(disk: VpmemDevice) -> Result<Work, Refusal> {
    let target = named(disk.mount_path, "VPMemDevice")?;
    let device = Device::Vpmem {
        number: disk.device_number,
        mapping: disk.mapping_info,
    };
    let mut options = MountOptions::builder().read_only().options(disk.options);
    if disk.partition != 0 {
        options = options.partition(partition(disk.partition)?);
    }
    if !disk.filesystem.is_empty() {
        options = options.filesystem(disk.filesystem);
    }
    let options = built(options, verity(disk.verity, disk.verity_info)?)?;
    Ok(Work::Mount {
        device: device.try_into()?,
        target,
        options,
    })
}

fn combine(layers: CombinedLayers) -> Result<Work, Refusal> {
    let target = named(layers.container_root_path, "CombinedLayers")?;
    let scratch = Some(layers.scratch_path).filter(|path| !path.is_empty());
    let paths = layers.layers.into_iter().map(|layer| layer.path);
    let mut overlay = Overlay::new(paths, target);
    overlay.scratch = scratch.map(PathBuf::from);
    Ok(Work::Combine(overlay))
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
    verity: Option<Verity>,
) -> Result<MountOptions, BackendError> {
    if let Some(verity) = verity {
        options = options.verity(verity);
    }
    options
        .build()
        .map_err(|error| BackendError::invalid(error.to_string()))
}

/// The integrity check in our words, from either way to ask for it.
fn verity(
    ours: Option<VerityTarget>,
    older: Option<VerityInfo>,
) -> Result<Option<Verity>, BackendError> {
    if let Some(target) = ours {
        return Ok(Some(target.into()));
    }
    let Some(info) = older else {
        return Ok(None);
    };
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
    verity.algorithm = info.algorithm;
    (verity.data_block_size, verity.hash_block_size) = (block, block);
    verity.hash_start_block += u64::from(info.super_block);
    Ok(Some(verity))
}

/// Why a request is not done.
#[derive(Debug)]
pub(crate) struct Refusal {
    result: Hresult,
    kind: ErrorKind,
    message: String,
}

impl Refusal {
    pub(crate) fn new(result: Hresult, kind: ErrorKind, message: impl Into<String>) -> Self {
        Refusal {
            result,
            kind,
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
            error_records: vec![ErrorRecord::new(self.result, message).with_kind(self.kind)],
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
        Refusal::new(error.kind().into(), error.kind(), message)
    }
}

impl From<UnreadableRequest> for Refusal {
    fn from(error: UnreadableRequest) -> Self {
        let kind = match error {
            UnreadableRequest::ResourceType(_) => ErrorKind::Unsuitable,
            _ => ErrorKind::Invalid,
        };
        Refusal::new(error.hresult(), kind, error.to_string())
    }
}
