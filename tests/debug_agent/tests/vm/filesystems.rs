//! Filesystems that the guest makes, devices that it exposes, and what it says of those that it does not mount.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use blockmount::{Disk, ErrorKind, Expose, Format, MountOptions, MountRequest};
use blockmount_debug_agent::kit::images;
use blockmount_vpmem::Mode;
use serde_json::json;

use crate::rig::{MOUNTS, Rig, read_only};

fn formatted(format: Format) -> MountRequest {
    MountRequest::new(MountOptions::builder().format(format).build().unwrap())
}

fn blank(path: &Path, mebibytes: u64) {
    File::create(path)
        .unwrap()
        .set_len(mebibytes << 20)
        .unwrap();
}

fn debugfs(image: &Path, request: &str) {
    let done = Command::new("/usr/sbin/debugfs")
        .args(["-w", "-R", request])
        .arg(image)
        .output();
    assert!(done.unwrap().status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_f06_a_blank_disk_is_formatted_in_the_guest_once_and_then_kept() {
    let rig = Rig::start().await;
    for (filesystem, mebibytes) in [("ext4", 64), ("xfs", 320)] {
        let image = rig.path(filesystem);
        blank(&image, mebibytes);
        let disk = Disk::virtual_disk(&image);
        let first = rig
            .manager
            .add(&disk, &formatted(Format::new(filesystem).label("scratch")))
            .await
            .unwrap_or_else(|error| panic!("{filesystem}: {error}: {}", error.cause()));
        let write =
            json!({ "write": { "path": first.path().join("file"), "content": filesystem } });
        rig.ask(write).await;
        first.release().await.unwrap();
        let again = rig
            .manager
            .add(&disk, &formatted(Format::new(filesystem)))
            .await
            .unwrap();
        rig.assert_content(&again.path().join("file"), filesystem)
            .await;
        again.release().await.unwrap();
        let other = match filesystem {
            "ext4" => "xfs",
            _ => "ext4",
        };
        let error = rig
            .manager
            .add(&disk, &formatted(Format::new(other)))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.cause());
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_disk_and_its_partition_are_exposed_as_devices() {
    let rig = Rig::start().await;
    let image = rig.path("disk");
    images::partitioned(&image, &[("file", "on partition 2")]);
    let disk = Disk::virtual_disk(&image).read_only();
    let exposed = |partition: Option<u32>, name: &str| {
        let mut options = MountOptions::builder()
            .read_only()
            .expose(Expose::BlockDevice);
        if let Some(number) = partition {
            options = options.partition(number.try_into().unwrap());
        }
        MountRequest::new(options.build().unwrap()).at(Path::new(MOUNTS).join(name))
    };
    let whole = rig
        .manager
        .add(&disk, &exposed(None, "disk"))
        .await
        .unwrap();
    assert!(rig.tree(Path::new(MOUNTS)).await.contains_key("disk"));
    whole.release().await.unwrap();
    let second = rig
        .manager
        .add(&disk, &exposed(Some(2), "second"))
        .await
        .unwrap();
    assert!(rig.tree(Path::new(MOUNTS)).await.contains_key("second"));
    second.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u01_a_journal_that_was_not_replayed_is_refused_on_every_transport() {
    for mode in [None, Some(Mode::WholeDevices), Some(Mode::Packed)] {
        let mut rig = match mode {
            None => Rig::start().await,
            Some(mode) => Rig::start_with_vpmem(mode).await,
        };
        let image = rig.path("ext4");
        images::image("ext4", &image, &[("file", "x")]);
        let disk = Disk::virtual_disk(&image).read_only();
        // The clean one needs no option.
        let clean = rig.manager.add(&disk, &read_only()).await.unwrap();
        clean.release().await.unwrap();
        // A packed device stays as long as its VM.
        rig.begin_here().await;
        let dirty = rig.path("dirty");
        std::fs::copy(&image, &dirty).unwrap();
        debugfs(&dirty, "feature needs_recovery");
        let disk = Disk::virtual_disk(&dirty).read_only();
        let error = rig.manager.add(&disk, &read_only()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.cause());
        assert!(
            error.cause().message().contains("noload"),
            "{}",
            error.cause()
        );
        let options = MountOptions::builder().options(["ro", "noload"]).build();
        let request = MountRequest::new(options.unwrap());
        let mount = rig.manager.add(&disk, &request).await.unwrap();
        rig.assert_content(&mount.path().join("file"), "x").await;
        mount.release().await.unwrap();
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u10_the_words_of_the_guests_kernel_reach_the_host() {
    let rig = Rig::start().await;
    let image = rig.path("ext4");
    images::image("ext4", &image, &[("file", "x")]);
    debugfs(&image, "feature FEATURE_I19");
    let disk = Disk::virtual_disk(&image).read_only();
    let error = rig.manager.add(&disk, &read_only()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.cause());
    for words in ["unsupported optional features", "incompat 0x80000"] {
        assert!(error.cause().message().contains(words), "{}", error.cause());
    }
    rig.end().await;
}
