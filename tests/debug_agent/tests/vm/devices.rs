//! Filesystems of several devices in a real guest.

#[path = "../../../common/merged_erofs.rs"]
mod merged_erofs;

use std::path::{Path, PathBuf};

use blockmount::{DeviceRole, Disk, ErrorKind, ExtraDevice, MountOptions, Mounter, Presence};
use blockmount_debug_agent::kit::images;
use merged_erofs::Merged;
use serde_json::json;

use crate::rig::{Rig, read_only};

/// Three blocks of text that no other content has.
fn content(seed: usize) -> String {
    let block = |n: usize| format!("{:4096}", format!("block {n} of {seed}"));
    (0..3).map(block).collect()
}

/// Two images with a file each, and one that has both files and no data.
pub fn merged(rig: &Rig) -> [Disk; 3] {
    let image = |name: &str, seed| {
        let path = rig.path(name);
        images::image("erofs", &path, &[("file", &content(seed))]);
        path
    };
    let blobs: [PathBuf; 2] = [image("one", 1), image("two", 2)];
    let contents = [content(1), content(2)];
    let files = [("first", 0), ("second", 1)].map(|(name, image)| Merged {
        name,
        image,
        content: contents[image].as_bytes(),
    });
    let path = rig.path("merged");
    let images: Vec<&Path> = blobs.iter().map(PathBuf::as_path).collect();
    merged_erofs::write(&path, &images, &files, true);
    let [one, two] = blobs;
    [path, one, two].map(|path| Disk::virtual_disk(path).read_only())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u04_merged_metadata_is_mounted_with_its_blobs() {
    let rig = Rig::start().await;
    let [merged, one, two] = merged(&rig);
    let request = read_only()
        .with_device(one.clone())
        .with_device(two.clone());
    let mount = rig.manager.add(&merged, &request).await.unwrap();
    for (name, seed) in [("first", 1), ("second", 2)] {
        rig.assert_content(&mount.path().join(name), &content(seed))
            .await;
    }
    // A new host and a new agent know it as what it is.
    let mut options = MountOptions::builder().read_only();
    for blob in [&one, &two] {
        let there = rig.manager.attach(blob).await.unwrap();
        options = options.device(ExtraDevice::new(DeviceRole::Data, there.locator().clone()));
        there.release().await.unwrap();
    }
    let options = options.build().unwrap();
    rig.ask(json!("kill_agent")).await;
    let guest = rig.vm.guest("blockmount.agent.next").await.unwrap();
    for (options, presence) in [
        (options, Presence::Present(())),
        (MountOptions::read_only(), Presence::Absent),
    ] {
        let found = Mounter::adopt(&guest, mount.locator(), mount.path(), &options).await;
        assert_eq!(found.unwrap(), presence);
    }
    drop(guest);
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u04_blobs_that_are_missing_or_in_another_order_are_refused() {
    let rig = Rig::start().await;
    let [merged, one, two] = merged(&rig);
    let missing = read_only().with_device(one.clone());
    let swapped = read_only().with_device(two).with_device(one);
    for (request, words) in [
        (read_only(), "needs 2 more devices"),
        (missing, "number 2 is not part of the request"),
        (swapped, "further device 1"),
    ] {
        let error = rig.manager.add(&merged, &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let said = error.cause().message();
        assert!(said.contains(words), "{said}");
        rig.assert_as_at_first().await;
    }
    rig.end().await;
}
