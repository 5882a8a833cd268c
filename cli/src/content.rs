//! What is in an image, in words, and what to do about it.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use blockmount_linux::probe::{self, Content, Superblock};
use rustix::fs::OFlags;
use serde::Serialize;

/// What is on a device or partition.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Found {
    /// `filesystem`, `partition-table`, `volume`, `disk-image`, `compressed`, `ambiguous`, `blank` or `unknown`.
    pub(crate) kind: &'static str,
    /// In words.
    pub(crate) description: String,
    /// The filesystem by the kernel's name.
    pub(crate) filesystem: Option<String>,
    /// How much the filesystem needs, in bytes.
    pub(crate) filesystem_size: Option<u64>,
    /// In bytes.
    pub(crate) block_size: Option<u32>,
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
    /// Whether the filesystem needs more than there is.
    pub(crate) truncated: bool,
    /// Whether its journal or log has changes that are not in their places.
    pub(crate) needs_recovery: bool,
    /// How many more devices the filesystem needs.
    pub(crate) more_devices: u32,
    /// Features that not every kernel knows.
    pub(crate) features: Vec<String>,
}

/// Opens an image to look at it.
pub(crate) fn open(image: &Path) -> io::Result<File> {
    // A pipe without a writer would keep us waiting; the kernel ignores the flag for files.
    File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(image)
}

/// What to do about an image that cannot be mounted as it is. Blocks.
pub(crate) fn advice_on(image: &Path) -> Option<&'static str> {
    let found = describe(&probe::probe(&mut open(image).ok()?).ok()?);
    found.unusable().or(match found.kind {
        "partition-table" => Some(
            "name one of its partitions with --partition N; \"blockmount inspect IMAGE\" lists them",
        ),
        "blank" => Some("make a filesystem on it, or choose another image"),
        _ if found.needs_recovery => Some(
            "mount it writable once, or see the older state with --option noload (ext3, ext4) or --option norecovery (xfs)",
        ),
        _ => None,
    })
}

impl Found {
    /// What to do about an image that cannot be mounted as it is.
    pub(crate) fn unusable(&self) -> Option<&'static str> {
        match self.kind {
            _ if self.truncated => Some("the end is missing: copy or download the image again"),
            "ambiguous" => Some(
                "remove the stale signatures with wipefs, or name the filesystem when mounting: --fs NAME",
            ),
            "disk-image" => Some(match self.description.contains("vmdk") {
                true => "convert it to a raw image: qemu-img convert -O raw IMAGE RAW",
                false => {
                    "name it by its format (.qcow2, .vhd or .vhdx), or convert it to a raw image: qemu-img convert -O raw IMAGE RAW"
                }
            }),
            "compressed" => Some(match &*self.description {
                gzip if gzip.ends_with("gzip") => "unpack it: gzip -dk IMAGE",
                zstd if zstd.ends_with("zstd") => "unpack it: zstd -d IMAGE",
                xz if xz.ends_with("xz") => "unpack it: xz -dk IMAGE",
                _ => "unpack it: bzip2 -dk IMAGE",
            }),
            "unknown" => Some("it is no filesystem or partition table that is known here"),
            "blank" if self.description.contains("empty") => {
                Some("the file has no content: make the image again")
            }
            _ => None,
        }
    }
}

/// What a probe has found, in words and fields.
pub(crate) fn describe(probe: &probe::ProbeResult) -> Found {
    let kind = match &probe.content {
        Content::Filesystem(_) => "filesystem",
        Content::PartitionTable(_) => "partition-table",
        Content::Volume(_) => "volume",
        Content::DiskImage(_) => "disk-image",
        Content::Compressed(_) => "compressed",
        Content::Ambiguous(_) => "ambiguous",
        Content::Blank => "blank",
        _ => "unknown",
    };
    let truncated = probe.truncated();
    let mut description = probe.content.to_string();
    if let Some(needs) = truncated {
        description += &format!(
            " (truncated: needs {needs} bytes, has {})",
            probe.device_bytes
        );
    }
    if probe.device_bytes == 0 {
        description = "nothing (empty)".to_owned();
    }
    let mut found = Found {
        kind,
        description,
        truncated: truncated.is_some(),
        ..Found::default()
    };
    if let Content::Filesystem(superblock) | Content::Volume(superblock) = &probe.content {
        let Superblock {
            name,
            label,
            uuid,
            size_bytes,
            block_size,
            needs_recovery,
            more_devices,
            features,
            ..
        } = superblock.clone();
        if needs_recovery {
            found.description += " (needs recovery)";
        }
        if more_devices > 0 {
            found.description += &format!(" (more devices needed: {more_devices})");
        }
        (found.needs_recovery, found.more_devices, found.features) =
            (needs_recovery, more_devices, features);
        found.filesystem = (kind == "filesystem").then(|| name.to_owned());
        (found.label, found.uuid) = (label, uuid);
        (found.filesystem_size, found.block_size) = (size_bytes, block_size);
    }
    found
}

/// A partition of which the disk has not all.
pub(crate) fn past_the_end() -> Found {
    Found {
        kind: "unknown",
        description: "past the end of the disk".to_owned(),
        truncated: true,
        ..Found::default()
    }
}
