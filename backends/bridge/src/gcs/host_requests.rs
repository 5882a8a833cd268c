//! From mounts and overlays to the requests of the protocol, or why there is none.

use std::path::Path;

use blockmount::{BackendError, Encryption, Expose, Format, MountOptions, Overlay, Overwrite};

use crate::gcs::device::Device;
use crate::gcs::messages::{
    Capabilities, CombinedLayers, Layer, MappedVirtualDisk, MappingInfo, Resource, ScsiDevice,
    VpmemDevice, WindowsDisk,
};

/// How many controllers Hyper-V has, and so how many other guests know; a higher one ends them.
const CONTROLLERS: u8 = 4;

/// The longest path that a Linux guest takes, in bytes (`PATH_MAX` less the final zero).
const LONGEST_PATH: usize = 4095;

/// A path as a message can have it: text, absolute, and nothing that a guest could misread.
pub(crate) fn guest_path(path: &Path, guest: &Capabilities) -> Result<String, BackendError> {
    let refuse = |reason: &str| {
        let shown: String = path.display().to_string().chars().take(128).collect();
        Err(BackendError::invalid(format!(
            "{shown:?} cannot be a path in the guest: {reason}"
        )))
    };
    let Some(text) = path.to_str() else {
        return refuse("it is not UTF-8");
    };
    if text.contains('\0') {
        return refuse("it has a NUL character in it");
    }
    if text.len() > LONGEST_PATH {
        return refuse("it is longer than 4095 bytes");
    }
    let separators: &[char] = if guest.is_windows() || cfg!(windows) {
        &['/', '\\']
    } else {
        &['/']
    };
    if text.split(separators).any(|part| part == "..") {
        return refuse("it has '..' in it");
    }
    let below_root = match guest.is_windows() {
        true => match text.as_bytes() {
            [drive, b':', b'\\' | b'/', rest @ ..] => {
                drive.is_ascii_alphabetic() && !rest.is_empty()
            }
            _ => false,
        },
        false => text.starts_with('/') && !text.trim_matches('/').is_empty(),
    };
    if below_root {
        // On a Windows host both separators are one to `Path`; a Linux guest knows only its own.
        let foreign = cfg!(windows) && !guest.is_windows();
        Ok(match foreign {
            true => text.replace('\\', "/"),
            false => text.to_owned(),
        })
    } else {
        refuse("it is not below an absolute root")
    }
}

/// The request that mounts a device, and the one that unmounts it again.
pub(crate) fn mount(
    device: Device,
    path: String,
    options: &MountOptions,
    guest: &Capabilities,
) -> Result<(Resource, Resource), BackendError> {
    if !options.devices().is_empty() {
        return Err(BackendError::unsuitable(
            "GCS has no request to mount a filesystem of several devices",
        ));
    }
    if options.id_map().is_some() {
        return Err(unsuitable("files that appear with other owners"));
    }
    if options.fs_group().is_some() {
        return Err(unsuitable("a group that files are given to"));
    }
    match device {
        Device::Scsi(device) if guest.is_windows() => windows_disk(device, path, options),
        Device::Scsi(device) => linux_disk(device, path, options),
        Device::Vpmem { .. } if guest.is_windows() => Err(BackendError::unsuitable(
            "a Windows guest cannot mount a VPMEM device by GCS",
        )),
        Device::Vpmem { number, mapping } => vpmem(number, mapping, path, options),
    }
}

/// The request that combines layers, and the one that separates them.
pub(crate) fn combine(
    overlay: &Overlay,
    guest: &Capabilities,
) -> Result<(Resource, Resource), BackendError> {
    if guest.is_windows() {
        return Err(BackendError::unsuitable(
            "a Windows guest combines no layers by GCS",
        ));
    }
    if let Some(option) = overlay.options.as_slice().first() {
        return Err(BackendError::unsuitable(format!(
            "GCS has no options of overlays, such as {option}"
        )));
    }
    if overlay.layers.is_empty() {
        let target = overlay.target.display();
        return Err(BackendError::invalid(format!(
            "the overlay at {target} has no layers"
        )));
    }
    let layer = |path: &Path| {
        let path = guest_path(path, guest)?;
        // These guests paste paths into the options of overlayfs as they are.
        if path.contains([':', ',', '\\']) {
            let message =
                format!("this guest cannot have a layer at {path:?}: overlayfs would misread it");
            return Err(BackendError::unsuitable(message));
        }
        Ok(path)
    };
    let container_root_path = guest_path(&overlay.target, guest)?;
    let layers: Result<Vec<Layer>, BackendError> = overlay
        .layers
        .iter()
        .map(|path| {
            Ok(Layer {
                path: layer(path)?,
                ..Layer::default()
            })
        })
        .collect();
    let scratch_path = overlay
        .scratch
        .as_deref()
        .map(layer)
        .transpose()?
        .unwrap_or_default();
    if let Some(scratch) = &overlay.scratch {
        below_parent(scratch, &overlay.target)?;
    }
    let undo = separate(container_root_path.clone());
    let layers = CombinedLayers {
        container_id: container_id(&overlay.target),
        container_root_path,
        layers: layers?,
        scratch_path,
    };
    Ok((Resource::CombinedLayers(layers), undo))
}

/// Agents since July 2026 (hcsshim #2835) bind a directory of the scratch to the parent of the target, unless the scratch is
/// below that parent. Only the end of a container undoes it, so the scratch would stay mounted for ever.
fn below_parent(scratch: &Path, target: &Path) -> Result<(), BackendError> {
    let parent = target.parent().unwrap_or(target);
    if scratch.starts_with(parent) && scratch != parent && !scratch.starts_with(target) {
        return Ok(());
    }
    let (scratch, parent) = (scratch.display(), parent.display());
    let message = format!(
        "the agent of this guest would keep the scratch at {scratch} mounted: it has to be below the parent of the \
         overlay's target; mount it at {parent}/scratch"
    );
    Err(BackendError::unsuitable(message))
}

/// The container of a tree at `.../ID/rootfs`, which is where hosts of Hyper-V have them.
fn container_id(target: &Path) -> String {
    let is_rootfs = target.file_name().is_some_and(|name| name == "rootfs");
    let parent = target.parent().filter(|_| is_rootfs);
    let name = parent
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    name.unwrap_or_default().to_owned()
}

/// What takes an overlay apart, and unmounts whatever else is at a path.
pub(crate) fn separate(container_root_path: String) -> Resource {
    Resource::CombinedLayers(CombinedLayers {
        container_root_path,
        ..CombinedLayers::default()
    })
}

/// The request that unplugs a device; none where a guest needs to be told nothing.
pub(crate) fn unplug(
    device: Device,
    guest: &Capabilities,
) -> Result<Option<Resource>, BackendError> {
    match device {
        Device::Scsi(device) if !guest.is_windows() => {
            known_controller(device)?;
            Ok(Some(Resource::ScsiDevice(device)))
        }
        // The protocol has no message for it: Windows notices by itself, and a VPMEM device is released with its
        // mount.
        Device::Scsi(_) | Device::Vpmem { .. } => Ok(None),
    }
}

fn known_controller(device: ScsiDevice) -> Result<(), BackendError> {
    if device.controller < CONTROLLERS {
        return Ok(());
    }
    let message = format!(
        "a guest of Hyper-V knows SCSI controllers 0 to 3, not {}",
        device.controller
    );
    Err(BackendError::unsuitable(message))
}

fn linux_disk(
    device: ScsiDevice,
    mount_path: String,
    options: &MountOptions,
) -> Result<(Resource, Resource), BackendError> {
    known_controller(device)?;
    let ScsiDevice { controller, lun } = device;
    refuse_ignored(options)?;
    let encrypted = match options.encryption() {
        None => false,
        Some(Encryption::Ephemeral) => true,
        Some(other) => return Err(unsuitable(&format!("encryption {other:?}"))),
    };
    let filesystem = filesystem(options);
    if options.is_read_only() && !matches!(filesystem.as_str(), "" | "ext4") {
        let message = format!("{filesystem} read-only: this guest mounts nothing but ext4 so");
        return Err(BackendError::unsuitable(message));
    }
    if encrypted
        && options
            .format()
            .is_none_or(|format| format.filesystem != "xfs")
    {
        let what = "encryption without a format as xfs, the only one that this guest can encrypt";
        return Err(unsuitable(what));
    }
    let undo = MappedVirtualDisk {
        mount_path,
        lun,
        controller,
        partition: options
            .partition()
            .map_or(0, |number| u64::from(number.get())),
        read_only: options.is_read_only(),
        encrypted,
        block_dev: exposes_device(options)?,
        ..MappedVirtualDisk::default()
    };
    let disk = MappedVirtualDisk {
        options: words(options),
        ensure_filesystem: options.format().is_some(),
        filesystem,
        ..undo.clone()
    };
    Ok((
        Resource::MappedVirtualDisk(disk),
        Resource::MappedVirtualDisk(undo),
    ))
}

/// A message has no field for more than a read-only ext4 on a VPMEM device.
fn vpmem(
    device_number: u32,
    mapping_info: Option<MappingInfo>,
    mount_path: String,
    options: &MountOptions,
) -> Result<(Resource, Resource), BackendError> {
    if !options.is_read_only() {
        return Err(unsuitable("a VPMEM device read-write"));
    }
    if exposes_device(options)? {
        return Err(unsuitable("the block device of a VPMEM device"));
    }
    if options.partition().is_some() {
        return Err(unsuitable("a partition of a VPMEM device"));
    }
    refuse_ignored(options)?;
    let filesystem = filesystem(options);
    if !matches!(filesystem.as_str(), "" | "ext4") {
        return Err(unsuitable(&format!("{filesystem} on a VPMEM device")));
    }
    if options.propagation().is_some() {
        return Err(unsuitable("mount options of a VPMEM device"));
    }
    let device = Resource::VpmemDevice(VpmemDevice {
        device_number,
        mount_path,
        mapping_info,
        ..VpmemDevice::default()
    });
    Ok((device.clone(), device))
}

/// A Windows guest takes a path and a LUN, and finds out the rest.
fn windows_disk(
    ScsiDevice { controller, lun }: ScsiDevice,
    container_path: String,
    options: &MountOptions,
) -> Result<(Resource, Resource), BackendError> {
    if controller != 0 {
        let message =
            format!("a Windows guest mounts disks of SCSI controller 0 only, not of {controller}");
        return Err(BackendError::unsuitable(message));
    }
    let scratch = match options.format() {
        None => false,
        Some(Format {
            filesystem,
            overwrite: Overwrite::Everything,
            ..
        }) => filesystem.eq_ignore_ascii_case("refs"),
        Some(_) => false,
    };
    let has_others = options.partition().is_some()
        || options.filesystem().is_some_and(|_| !scratch)
        || options.flags().iter().next().is_some()
        || !options.data().is_empty()
        || options.propagation().is_some()
        || options.verity().is_some()
        || options.encryption().is_some()
        || options.format().is_some_and(|_| !scratch)
        || options.expose() != Expose::Filesystem;
    if has_others {
        return Err(unsuitable(
            "mount options in a Windows guest (only ro, and a format with refs over everything)",
        ));
    }
    let disk = WindowsDisk {
        container_path,
        lun: lun.into(),
    };
    let undo = Resource::WindowsDisk(disk.clone());
    Ok((
        if scratch {
            Resource::WindowsScratch(disk)
        } else {
            undo.clone()
        },
        undo,
    ))
}

/// Refuses what the guest would silently not do.
fn refuse_ignored(options: &MountOptions) -> Result<(), BackendError> {
    if options.verity().is_some() {
        return Err(unsuitable(
            "an integrity check in this guest, which reads it from the disk or not at all",
        ));
    }
    if let Some(flag) = options.flags().iter().next() {
        return Err(unsuitable(&format!(
            "{} in this guest, which ignores it",
            flag.name()
        )));
    }
    if let Some(option) = options.data().first() {
        return Err(unsuitable(&format!(
            "{option:?} in this guest, which ignores it"
        )));
    }
    match options.format() {
        Some(format) if format.label.is_some() || format.uuid.is_some() => Err(unsuitable(
            "a label or UUID of a new filesystem in this guest",
        )),
        // What is encrypted with a new key has no content to lose.
        Some(format) if format.overwrite == Overwrite::Blank && options.encryption().is_none() => {
            Err(unsuitable(
                "a format of blank disks only in this guest, which overwrites any other filesystem; \
                 ask for Overwrite::Everything if it may",
            ))
        }
        _ => Ok(()),
    }
}

fn unsuitable(what: &str) -> BackendError {
    BackendError::unsuitable(format!("GCS has no message for {what}"))
}

fn exposes_device(options: &MountOptions) -> Result<bool, BackendError> {
    match options.expose() {
        Expose::Filesystem => Ok(false),
        Expose::BlockDevice => Ok(true),
        other => Err(unsuitable(&format!("{other:?} to appear at the target"))),
    }
}

/// Mount options by name, the access first.
fn words(options: &MountOptions) -> Vec<String> {
    let access = options.is_read_only().then(|| "ro".to_owned());
    let flags = options.flags();
    access
        .into_iter()
        .chain(flags.iter().map(|flag| flag.name().to_owned()))
        .chain(
            options
                .propagation()
                .map(|propagation| propagation.to_string()),
        )
        .chain(options.data().iter().cloned())
        .collect()
}

fn filesystem(options: &MountOptions) -> String {
    let formatted = options.format().map(|format| format.filesystem.as_str());
    options
        .filesystem()
        .or(formatted)
        .unwrap_or_default()
        .to_owned()
}
