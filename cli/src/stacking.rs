//! From the layers of the command line to what is asked of the manager.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt};
use std::path::PathBuf;

use blockmount::{DeviceRole, Disk, Encryption, LuksKey, MountOptions, MountRequest};

use crate::args::Layer;
use crate::failure::{Context, Failure, printable};
use crate::terminal::note;
use crate::verity;

/// The disk of a layer: an image file, or a block device of this machine.
pub(crate) fn layer_disk(layer: &Layer) -> Disk {
    let image = &layer.image;
    // One that cannot be looked at is told of when it is attached.
    let kind = image.metadata().map(|metadata| metadata.file_type());
    match kind.is_ok_and(|kind| kind.is_block_device()) {
        true => Disk::physical_disk(image).read_only(),
        false => Disk::virtual_disk(image).read_only(),
    }
}

/// A read-only mount of a layer.
pub(crate) fn layer_request(layer: &Layer) -> Result<MountRequest, Failure> {
    let options = &layer.options;
    let mut builder = MountOptions::builder().read_only().options(options);
    if let Some(name) = &layer.filesystem {
        builder = builder.filesystem(name);
    }
    if let Some(number) = layer.partition {
        builder = builder.partition(number);
    }
    if let Some(trusted) = &layer.verity {
        let tree = layer.verity_tree.as_deref();
        let verity = verity::of_layer(&layer.image, layer.partition, trusted, tree)?;
        builder = builder.verity(verity);
    }
    if let Some(key) = &layer.key {
        builder = builder.encryption(Encryption::Keyed(key.source()));
    }
    if let Some(passphrase) = &layer.luks {
        let key = LuksKey::Passphrase(passphrase.source());
        builder = builder.encryption(Encryption::Luks2(key));
    }
    if let Some(map) = &layer.id_map {
        builder = builder.id_map(map.clone());
    }
    let options = builder
        .build()
        .context(|| "the mount options make no sense".to_owned())?;
    let disk = |image: &PathBuf| Disk::virtual_disk(image).read_only();
    let devices = layer.devices.iter().map(disk);
    let request = devices.fold(MountRequest::new(options), MountRequest::with_device);
    Ok(match &layer.verity_tree {
        Some(tree) => request.with_device_as(DeviceRole::HashTree, disk(tree)),
        None => request,
    })
}

/// The layers without those that are there a second time, under whatever name.
///
/// Linux refuses an overlay of a layer with itself. Nothing is lost: of two equal layers
/// the upper one covers all that the lower one has.
pub(crate) fn distinct(layers: &[Layer]) -> Vec<Layer> {
    let mut seen: Vec<((u64, u64), &Layer)> = Vec::new();
    let mut distinct = Vec::new();
    for layer in layers {
        // One that cannot be looked at is told of when it is attached.
        if let Ok(metadata) = layer.image.metadata() {
            let file = (metadata.dev(), metadata.ino());
            let same = |(other, upper): &&((u64, u64), &Layer)| {
                let same = [upper, &layer].map(|layer| {
                    let Layer {
                        partition, verity, ..
                    } = layer;
                    (
                        partition,
                        verity,
                        &layer.verity_tree,
                        [&layer.key, &layer.luks],
                        &layer.devices,
                    )
                });
                *other == file && same[0] == same[1]
            };
            if let Some((_, upper)) = seen.iter().find(same) {
                let (lower, upper) = (layer.image.display(), upper.image.display());
                let same =
                    format!("{lower} is the same layer as {upper} above it, and adds nothing");
                note(format_args!("note: {}", printable(same)));
                continue;
            }
            seen.push((file, layer));
        }
        distinct.push(layer.clone());
    }
    distinct
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn the_upper_of_two_equal_layers_stays() {
        let directory = tempfile::tempdir().unwrap();
        let layer = |name: &str, partition| Layer {
            partition: NonZeroU32::new(partition),
            ..Layer::of(directory.path().join(name))
        };
        std::fs::write(directory.path().join("a"), "a").unwrap();
        std::fs::write(directory.path().join("b"), "b").unwrap();
        std::fs::hard_link(directory.path().join("a"), directory.path().join("hard")).unwrap();
        std::os::unix::fs::symlink("a", directory.path().join("link")).unwrap();
        let given = [
            layer("link", 0),
            layer("b", 0),
            layer("hard", 0),
            layer("a", 1),
            layer("absent", 0),
            layer("./b", 0),
        ];
        let expected = [
            layer("link", 0),
            layer("b", 0),
            layer("a", 1),
            layer("absent", 0),
        ];
        assert_eq!(distinct(&given), expected);
    }
}
