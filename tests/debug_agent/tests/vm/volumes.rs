//! Disks that grow while they are mounted, and mounts that are asked how full they are.

use std::fs::{self, File};
use std::path::Path;

use blockmount::{
    Disk, Encryption, ErrorKind, Expose, Format, KeySource, MountOptions, MountRequest, Step,
};
use serde_json::json;

use crate::rig::{KEYS, Rig, read_only};

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_mounted_disk_grows_from_its_image_to_its_filesystem() {
    let rig = Rig::start().await;
    let key = Path::new(KEYS).join("volume");
    rig.ask(json!({ "write_key": { "path": key, "bytes": vec![7; 64] } }))
        .await;
    let in_file = Encryption::Keyed(KeySource::File("volume".to_owned()));
    for (filesystem, before, after, encryption) in [
        ("ext4", 64, 192, None),
        ("xfs", 320, 512, None),
        ("ext4", 64, 192, Some(Encryption::Ephemeral)),
        ("ext4", 64, 192, Some(in_file)),
    ] {
        let is_encrypted = encryption.is_some();
        let is_kept = encryption != Some(Encryption::Ephemeral);
        let image = rig.path(&format!("{filesystem}-{encryption:?}"));
        File::create(&image).unwrap().set_len(before * MIB).unwrap();
        let disk = Disk::virtual_disk(&image);
        let attachment = rig.manager.attach(&disk).await.unwrap();
        let mut options = MountOptions::builder().format(Format::new(filesystem));
        if let Some(encryption) = encryption {
            options = options.encryption(encryption);
        }
        let request = MountRequest::new(options.build().unwrap());
        let mount = rig.manager.add(&disk, &request).await.unwrap();
        let file = mount.path().join("file");
        let content = filesystem.repeat(200_000);
        rig.ask(json!({ "write": { "path": file, "content": content } }))
            .await;
        let small = rig.manager.usage(&mount).await.unwrap().bytes;
        assert!(small.total < before * MIB && small.used > content.len() as u64);
        // Again, it is as large already.
        for _ in 0..2 {
            let resized = rig.manager.resize(&attachment, after * MIB).await;
            resized.unwrap_or_else(|error| panic!("{error}: {}", error.cause()));
        }
        assert_eq!(fs::metadata(&image).unwrap().len(), after * MIB);
        let large = rig.manager.usage(&mount).await.unwrap().bytes;
        assert!(large.total > after * MIB * 8 / 10, "{large:?}");
        rig.assert_content(&file, &content).await;
        let smaller = rig.manager.resize(&attachment, before * MIB).await;
        let smaller = smaller.unwrap_err();
        assert_eq!(
            (smaller.kind(), smaller.step()),
            (ErrorKind::Invalid, Step::Resize)
        );
        rig.ask(json!({ "remove": { "path": file } })).await;
        match (rig.manager.trim(&mount).await, is_encrypted) {
            (Ok(bytes), false) => assert!(bytes > content.len() as u64, "{bytes}"),
            // What is free would show in the image.
            (trimmed, true) => assert_eq!(trimmed.unwrap_err().kind(), ErrorKind::Unsuitable),
            (Err(error), false) => panic!("{error}: {}", error.cause()),
        }
        mount.release().await.unwrap();
        attachment.release().await.unwrap();
        assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
        // What has grown is found by the next who mounts it.
        let mount = rig.manager.add(&disk, &request).await.unwrap();
        let again = rig.manager.usage(&mount).await.unwrap().bytes;
        if is_kept {
            assert_eq!(again.total, large.total);
        }
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_exposed_device_grows_and_what_cannot_grow_is_said() {
    let rig = Rig::start().await;
    let image = rig.path("disk");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let disk = Disk::virtual_disk(&image);
    let attachment = rig.manager.attach(&disk).await.unwrap();
    let options = MountOptions::builder().expose(Expose::BlockDevice);
    let exposed = MountRequest::new(options.build().unwrap());
    let node = rig.manager.add(&disk, &exposed).await.unwrap();
    rig.manager.resize(&attachment, 80 * MIB).await.unwrap();
    let usage = rig.manager.usage(&node).await.unwrap();
    assert_eq!(usage.bytes.total, 80 * MIB);
    node.release().await.unwrap();
    attachment.release().await.unwrap();
    // The key of a keyring may be another one by now.
    let key = "volumes:grown";
    rig.ask(json!({ "add_key": { "kind": "logon", "description": key, "bytes": vec![7; 64] } }))
        .await;
    let encryption = Encryption::Keyed(KeySource::Keyring(key.to_owned()));
    let options = MountOptions::builder().encryption(encryption);
    let request = MountRequest::new(options.format(Format::new("ext4")).build().unwrap());
    let image = rig.path("keyed");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let disk = Disk::virtual_disk(&image);
    let attachment = rig.manager.attach(&disk).await.unwrap();
    let mount = rig.manager.add(&disk, &request).await.unwrap();
    let error = rig.manager.resize(&attachment, 80 * MIB).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{}", error.cause());
    assert!(error.cause().message().contains(key), "{}", error.cause());
    mount.release().await.unwrap();
    attachment.release().await.unwrap();
    rig.ask(json!({ "remove_key": { "kind": "logon", "description": key } }))
        .await;
    // A layer is attached read-only.
    let layer = rig.layer("layer");
    let mount = rig.manager.add(&layer, &read_only()).await.unwrap();
    let attachment = rig.manager.attach(&layer).await.unwrap();
    let error = rig.manager.resize(&attachment, 80 * MIB).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.cause());
    attachment.release().await.unwrap();
    mount.release().await.unwrap();
    rig.end().await;
}
