//! Scratch disks that are encrypted with a key that only the guest's kernel has.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmount::{Disk, Encryption, ErrorKind, Format, MountOptions, MountRequest};
use blockmount_debug_agent::kit::images;
use serde_json::json;

use crate::rig::Rig;

const MARKER: &str = "a marker that no cipher text has by chance";

fn request(format: Format, encrypted: bool) -> MountRequest {
    let mut options = MountOptions::builder().format(format);
    if encrypted {
        options = options.encryption(Encryption::Ephemeral);
    }
    MountRequest::new(options.build().unwrap())
}

fn encrypted(filesystem: &str) -> MountRequest {
    request(Format::new(filesystem), true)
}

fn blank(rig: &Rig, name: &str, mebibytes: u64) -> PathBuf {
    let path = rig.path(name);
    let image = File::create(&path).unwrap();
    image.set_len(mebibytes << 20).unwrap();
    path
}

fn holds_marker(image: &Path) -> bool {
    let bytes = fs::read(image).unwrap();
    assert!(
        bytes.iter().any(|byte| *byte != 0),
        "nothing was written to {image:?}"
    );
    let mut windows = bytes.windows(MARKER.len());
    windows.any(|window| window == MARKER.as_bytes())
}

async fn mapped(rig: &Rig) -> Vec<String> {
    let tables = rig.tables().await;
    let devices = tables["dm_devices"].as_array().unwrap();
    let name = |device: &serde_json::Value| device["name"].as_str().unwrap().to_owned();
    devices.iter().map(name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_is_written_to_an_encrypted_scratch_is_in_no_byte_of_its_image() {
    let rig = Rig::start().await;
    for (name, mebibytes, request, readable) in [
        ("plain", 64, request(Format::new("ext4"), false), true),
        ("ext4", 64, encrypted("ext4"), false),
        ("xfs", 320, encrypted("xfs"), false),
    ] {
        let image = blank(&rig, name, mebibytes);
        let disk = Disk::virtual_disk(&image);
        let mount = rig.manager.add(&disk, &request).await;
        let mount = mount.unwrap_or_else(|error| panic!("{name}: {error}: {}", error.cause()));
        let file = mount.path().join("file");
        let content = MARKER.repeat(200);
        rig.ask(json!({ "write": { "path": file, "content": content } }))
            .await;
        rig.assert_content(&file, &content).await;
        let devices = mapped(&rig).await;
        let is_encrypted = devices
            .iter()
            .any(|name| name.starts_with("blockmount-crypt-8."));
        assert_eq!(
            (devices.len(), is_encrypted),
            (usize::from(!readable), !readable)
        );
        mount.release().await.unwrap();
        assert_eq!(mapped(&rig).await, Vec::<String>::new());
        assert_eq!(holds_marker(&image), readable, "{name}");
    }
    // The noise of an earlier key is no content: the disk is used again, and nothing is left of what was on it.
    let disk = Disk::virtual_disk(rig.path("ext4"));
    let mount = rig.manager.add(&disk, &encrypted("ext4")).await.unwrap();
    assert!(!rig.tree(mount.path()).await.contains_key("file"));
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_is_on_a_disk_is_not_destroyed_by_encrypting_it_unless_that_was_asked_for() {
    let rig = Rig::start().await;
    let image = rig.path("data.ext4");
    images::image("ext4", &image, &[("file", MARKER)]);
    let disk = Disk::virtual_disk(&image);
    let before = fs::read(&image).unwrap();
    let error = rig
        .manager
        .add(&disk, &encrypted("ext4"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(
        error.cause().to_string().contains("holds ext"),
        "{}",
        error.cause()
    );
    assert!(fs::read(&image).unwrap() == before);
    assert_eq!(mapped(&rig).await, Vec::<String>::new());
    let forced = request(Format::new("ext4").overwriting_everything(), true);
    let mount = rig.manager.add(&disk, &forced).await.unwrap();
    assert!(!rig.tree(mount.path()).await.contains_key("file"));
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_is_killed_leaves_no_encrypted_device() {
    let rig = Rig::start().await;
    let disk = Disk::virtual_disk(blank(&rig, "held", 64));
    let mount = rig.manager.add(&disk, &encrypted("ext4")).await.unwrap();
    let file = mount.path().join("file");
    rig.ask(json!({ "write": { "path": file, "content": MARKER } }))
        .await;
    rig.ask(json!("kill_agent")).await;
    // The next agent has taken it over: its filesystem and its key are as they were.
    rig.assert_content(&file, MARKER).await;
    match mount.release().await {
        Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => doubtful.retry().await.unwrap(),
        released => released.unwrap(),
    }
    rig.assert_as_at_first().await;
    for round in 0..5 {
        let disk = Disk::virtual_disk(blank(&rig, &format!("scratch-{round}"), 64));
        let request = encrypted("ext4");
        let killing = async {
            tokio::time::sleep(Duration::from_millis(80 * round)).await;
            rig.ask(json!("kill_agent")).await
        };
        let (added, _) = tokio::join!(rig.manager.add(&disk, &request), killing);
        rig.settle([added]).await;
    }
    rig.end().await;
}
