//! What is behind a disk, and what QEMU is told about it.

use std::path::Path;

use blockmount::{BackendError, Disk, DiskId};
use serde_json::{Value, json};

use super::qcow2;
use crate::source::{self, Source, absolute};

/// A disk that was looked at and can be given to QEMU.
#[derive(Debug)]
pub(super) struct Image {
    /// Absolute: QEMU may run in another directory.
    path: String,
    format: Format,
    is_device: bool,
    read_only: bool,
    /// Whether the image may have QEMU open what it is the difference to.
    backing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

impl Image {
    /// Opens the disk as QEMU will, and reads what its format says. Blocks.
    pub(super) fn inspect(disk: &Disk, id: &DiskId, backing: bool) -> Result<Self, BackendError> {
        let source = source::open(disk, id)?;
        let format = format(disk.source());
        match format {
            Format::Qcow2 => accept_qcow2(disk, &source, backing)?,
            Format::Raw => drop(source::size(disk, &source)?),
        }
        Ok(Image {
            path: absolute(disk.source())?,
            format,
            is_device: source.is_device,
            read_only: disk.is_read_only(),
            backing,
        })
    }

    /// The arguments of `blockdev-add`.
    pub(super) fn node(&self, name: &str) -> Value {
        let mut node = json!({
            "driver": if self.format == Format::Qcow2 { "qcow2" } else { "raw" },
            "node-name": name,
            "read-only": self.read_only,
            "discard": "unmap",
            "file": {
                "driver": if self.is_device { "host_device" } else { "file" },
                "node-name": format!("{name}-file"),
                "filename": self.path,
                "read-only": self.read_only,
                "discard": "unmap",
            },
        });
        if self.format == Format::Qcow2 && !self.backing {
            // Also where the image was replaced since: whatever its header says, QEMU opens nothing for it.
            node["backing"] = Value::Null;
        }
        node
    }
}

/// The format that a name stands for. What is in the file does not decide: a guest could write the header of
/// another format into its raw disk, and be given the file that it names.
fn format(path: &Path) -> Format {
    match path.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("qcow2") => Format::Qcow2,
        _ => Format::Raw,
    }
}

fn accept_qcow2(disk: &Disk, source: &Source, backing: bool) -> Result<(), BackendError> {
    let path = disk.source().display();
    let header = qcow2::read(&source.file).map_err(|error| {
        BackendError::other(format!("cannot read the header of {path}")).with_source(error)
    })?;
    let Some(header) = header else {
        return Err(BackendError::invalid(format!(
            "{path} is named as a qcow2 image and is none; rename it if it is a raw one"
        )));
    };
    if header.backing_file && !backing {
        return Err(BackendError::invalid(format!(
            "{path} has a backing file, and an image is not to make the host open others; \
             flatten it (qemu-img convert), or allow backing files"
        )));
    }
    if header.data_file {
        return Err(BackendError::invalid(format!(
            "{path} keeps its data in another file, and an image is not to make the host open others; \
             flatten it (qemu-img convert)"
        )));
    }
    if header.encrypted {
        return Err(BackendError::unsuitable(format!(
            "{path} is encrypted by qcow2, and there is no way to give the key; have the guest decrypt"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides_about_the_format() {
        for (name, expected) in [
            ("/a.qcow2", Format::Qcow2),
            ("/a.QCOW2", Format::Qcow2),
            ("/a.img", Format::Raw),
            ("/a.qcow2.img", Format::Raw),
            ("/qcow2", Format::Raw),
            ("/.qcow2", Format::Raw),
        ] {
            assert_eq!(format(Path::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn a_raw_disk_stays_raw_whatever_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let mut header = vec![0; 1 << 20];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        std::fs::write(&path, header).unwrap();
        let image = {
            let disk = Disk::virtual_disk(&path);
            Image::inspect(&disk, &source::identify(&disk).unwrap(), true)
        }
        .unwrap();
        let node = image.node("n");
        assert_eq!(node["driver"], "raw");
        assert_eq!(node["file"]["driver"], "file");
        assert_eq!(node["file"]["filename"], path.to_str().unwrap());
    }
}
