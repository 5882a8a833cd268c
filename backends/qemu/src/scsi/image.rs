//! What is behind a disk, and what QEMU is told about it.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use blockmount::{BackendError, CacheMode, Disk, DiskId, DiskOptions};
use serde_json::{Value, json};

use super::qcow2::{self, Backing, Header};
use super::vhd;
use crate::image_format::ImageFormat;
use crate::open_file::OpenFile;

/// How many images a disk may be the difference to, one after the other. A circle ends here.
const MAX_BACKING_FILES: usize = 64;

/// A disk that was looked at and can be given to QEMU.
#[derive(Debug)]
pub(crate) struct Image {
    /// The image itself, and then what each is the difference to.
    layers: Vec<Layer>,
    files: Vec<OpenFile>,
    read_only: bool,
    options: DiskOptions,
}

#[derive(Debug)]
struct Layer {
    format: ImageFormat,
    is_device: bool,
}

impl Image {
    /// Opens the disk as QEMU will, and reads what its format says; the files that it is the difference to are opened
    /// as well where that is `allowed`. Blocks.
    pub(crate) fn inspect(disk: &Disk, id: &DiskId, allowed: bool) -> Result<Self, BackendError> {
        let mut image = Image {
            layers: Vec::new(),
            files: Vec::new(),
            read_only: disk.is_read_only(),
            options: disk.options().clone(),
        };
        let source = blockmount_source::open(disk, id)?;
        let format = ImageFormat::of(disk.source());
        if format == ImageFormat::Raw {
            let size = blockmount_source::size(disk, &source)?;
            ensure_whole_sectors(disk, size)?;
        }
        let mut next = image.add(disk.source(), source, format, allowed)?;
        while let Some((path, format)) = next {
            if image.layers.len() > MAX_BACKING_FILES {
                return Err(BackendError::invalid(format!(
                    "{disk} is the difference to more than {MAX_BACKING_FILES} images"
                )));
            }
            let backing = read_only_disk(&path);
            let source =
                blockmount_source::open(&backing, &blockmount_source::identify(&backing)?)?;
            next = image.add(&path, source, format, allowed)?;
        }
        Ok(image)
    }

    /// Adds an image, and says what it is the difference to.
    fn add(
        &mut self,
        path: &Path,
        source: blockmount_source::Source,
        format: ImageFormat,
        allowed: bool,
    ) -> Result<Option<(PathBuf, ImageFormat)>, BackendError> {
        let backing = match format {
            ImageFormat::Qcow2 => accept_qcow2(path, &source.file, allowed)?.backing,
            ImageFormat::Vhd => accept_vhd(path, format, vhd::vhd(&source.file))?,
            ImageFormat::Vhdx => accept_vhd(path, format, vhd::vhdx(&source.file))?,
            ImageFormat::Raw => None,
        };
        let is_device = source.is_device();
        self.layers.push(Layer { format, is_device });
        self.files.push(OpenFile::new(source.file, path)?);
        backing.map(|backing| locate(path, backing)).transpose()
    }

    /// What QEMU opens.
    pub(crate) fn files(&self) -> &[OpenFile] {
        &self.files
    }

    /// The arguments of `blockdev-add`, with the paths by which QEMU opens the files. All that QEMU opens is named
    /// here: whatever else a header says, QEMU opens nothing for it. What is QEMU's default is left out, since a monitor
    /// reads its commands byte by byte (`monitor_can_read`), some microseconds each.
    pub(crate) fn node(&self, name: &str, paths: &[String]) -> Value {
        let mut node = Value::Null;
        for (number, (layer, path)) in self.layers.iter().zip(paths).enumerate().rev() {
            let name = match number {
                0 => name.to_owned(),
                _ => format!("{name}-b{number}"),
            };
            let backing = std::mem::take(&mut node);
            let mut file = json!({
                "driver": if layer.is_device { "host_device" } else { "file" },
                "node-name": format!("{name}-file"),
                "filename": path,
            });
            self.configure(&mut file, number > 0);
            node = json!({
                "driver": layer.format.driver(),
                "node-name": name,
                "file": file,
            });
            self.configure(&mut node, number > 0);
            if layer.format == ImageFormat::Qcow2 {
                node["backing"] = backing;
            }
        }
        node
    }

    /// Sets what differs from QEMU's defaults, for the whole chain alike.
    fn configure(&self, node: &mut Value, is_backing: bool) {
        if self.read_only || is_backing {
            // Nothing is discarded on what is read alone.
            node["read-only"] = json!(true);
        } else {
            // The default of a node is "ignore", that of a file below one "unmap" (`bdrv_inherited_options`).
            let ignores = self.options.is_discard() == Some(false);
            node["discard"] = json!(if ignores { "ignore" } else { "unmap" });
        }
        let direct = self.options.is_direct_io() == Some(true);
        let no_flush = self.options.cache_mode() == Some(CacheMode::Unsafe);
        if direct || no_flush {
            node["cache"] = json!({ "direct": direct, "no-flush": no_flush });
        }
    }
}

/// Refuses an image that ends within a sector of the size that is asked for.
fn ensure_whole_sectors(disk: &Disk, size: u64) -> Result<(), BackendError> {
    match disk.options().logical_sector_size() {
        Some(sector) if !size.is_multiple_of(sector.bytes().into()) => {
            Err(BackendError::invalid(format!(
                "{disk} has {size} bytes, which are no whole sectors of {} bytes; pad the image",
                sector.bytes()
            )))
        }
        _ => Ok(()),
    }
}

fn read_only_disk(path: &Path) -> Disk {
    let metadata = std::fs::metadata(path);
    match metadata.is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        true => Disk::physical_disk(path).read_only(),
        false => Disk::virtual_disk(path).read_only(),
    }
}

/// Where the backing file of an image is, which is named relative to the image, and in which format.
fn locate(image: &Path, backing: Backing) -> Result<(PathBuf, ImageFormat), BackendError> {
    let unsuitable = |what: String| {
        let message = format!(
            "{} has a backing file {what}; flatten it (qemu-img convert)",
            image.display()
        );
        BackendError::unsuitable(message)
    };
    // As QEMU has it, a colon before the first slash ends the name of a protocol.
    let name = String::from_utf8_lossy(&backing.name).into_owned();
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(unsuitable(format!("that is no file: {name:?}")));
    }
    let name = PathBuf::from(std::ffi::OsString::from_vec(backing.name));
    let path = match image.parent() {
        Some(directory) => directory.join(name),
        None => name,
    };
    let format = match backing.format.as_deref() {
        None => ImageFormat::of(&path),
        Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => return Err(unsuitable(format!("of the format {other:?}"))),
    };
    Ok((path, format))
}

/// Neither is ever the difference to another image, which QEMU could not read.
fn accept_vhd(
    path: &Path,
    format: ImageFormat,
    found: io::Result<vhd::Kind>,
) -> Result<Option<Backing>, BackendError> {
    let path = path.display();
    let found = found.map_err(|error| {
        BackendError::other(format!("cannot read the header of {path}")).with_source(error)
    })?;
    match found {
        vhd::Kind::Whole => Ok(None),
        vhd::Kind::Difference => Err(BackendError::invalid(format!(
            "{path} is the difference to another image, which QEMU cannot read: merge it with its parent where it was made"
        ))),
        vhd::Kind::Other => Err(BackendError::invalid(format!(
            "{path} is named as a {format} image and is none; rename it if it is a raw one"
        ))),
    }
}

fn accept_qcow2(path: &Path, file: &File, allowed: bool) -> Result<Header, BackendError> {
    let path = path.display();
    let header = qcow2::read(file).map_err(|error| {
        BackendError::other(format!("cannot read the header of {path}")).with_source(error)
    })?;
    let Some(header) = header else {
        return Err(BackendError::invalid(format!(
            "{path} is named as a qcow2 image and is none; rename it if it is a raw one"
        )));
    };
    if header.backing.is_some() && !allowed {
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
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_disk_stays_raw_whatever_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let mut header = vec![0; 1 << 20];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        std::fs::write(&path, header).unwrap();
        let image = {
            let disk = Disk::virtual_disk(&path);
            Image::inspect(&disk, &blockmount_source::identify(&disk).unwrap(), true)
        }
        .unwrap();
        let paths = [image.files()[0].path().to_owned()];
        let node = image.node("n", &paths);
        assert_eq!(node["driver"], "raw");
        assert_eq!(node["file"]["driver"], "file");
        assert_eq!(node["file"]["filename"], path.to_str().unwrap());
    }

    #[test]
    fn what_a_disk_is_to_do_with_discards_and_writes_is_said_of_each_node() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let node = |disk: Disk| {
            let id = blockmount_source::identify(&disk).unwrap();
            let image = Image::inspect(&disk, &id, true).unwrap();
            image.node("n", &["/dev/fdset/0".to_owned()])
        };
        let disk = || Disk::virtual_disk(&path);
        let quiet = DiskOptions::default().discard(false);
        let whole = json!({
            "driver": "raw",
            "node-name": "n",
            "read-only": true,
            "file": {
                "driver": "file",
                "node-name": "n-file",
                "filename": "/dev/fdset/0",
                "read-only": true,
            },
        });
        assert_eq!(node(disk().read_only()), whole);
        for (disk, says) in [(disk(), "unmap"), (disk().with_options(quiet), "ignore")] {
            let node = node(disk);
            for node in [&node, &node["file"]] {
                assert_eq!(
                    (&node["discard"], &node["read-only"]),
                    (&json!(says), &Value::Null)
                );
                assert_eq!(node["cache"], Value::Null);
            }
        }
    }
}
