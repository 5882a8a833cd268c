//! The block device itself at a target.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::kit::{self, Image, Loop, TestDir, builder, guest, refused, run, short_wait, umount};
use blockmount::{BackendError, ErrorKind, Expose, MountOptions, Mounter, Presence};
use blockmount_linux::LinuxGuest;

fn exposed(names: &[&str]) -> MountOptions {
    let builder = MountOptions::builder().options(names.to_vec());
    builder.expose(Expose::BlockDevice).build().unwrap()
}

async fn expose(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    names: &[&str],
) -> Result<(), BackendError> {
    guest
        .mount(&device.locator(), target, &exposed(names))
        .await
}

#[tokio::test]
async fn root_a_node_is_made_with_its_owner_and_mode_and_removed_by_target_alone() {
    let mut dir = TestDir::new();
    let image = Image::Ext4.copy(dir.path());
    let (device, fixed) = (Loop::new(&image), Loop::read_only(&image));
    dir.settle();
    let guest = guest();
    for (device, names, mode, owner) in [
        (&device, &[][..], 0o600, (0, 0)),
        (&device, &["mode=0660", "uid=12", "gid=34"], 0o660, (12, 34)),
        (&fixed, &["ro"], 0o400, (0, 0)),
    ] {
        let target = dir.at("deep/er/node");
        expose(&guest, device, &target, names).await.unwrap();
        let node = fs::symlink_metadata(&target).unwrap();
        assert!(node.file_type().is_block_device());
        assert_eq!(node.rdev(), fs::metadata(device.node()).unwrap().rdev());
        assert_eq!(node.mode() & 0o7777, mode);
        assert_eq!((node.uid(), node.gid()), owner);
        assert!(fs::read(&target).unwrap() == fs::read(&image).unwrap());
        guest.unmount(&target).await.unwrap();
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_g08_what_others_have_at_the_target_is_not_touched() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::write(dir.at("file"), "theirs").unwrap();
    fs::create_dir_all(dir.at("directory/full")).unwrap();
    std::os::unix::fs::symlink("/dev/null", dir.at("link")).unwrap();
    dir.settle();
    let guest = guest();
    for name in ["file", "directory", "link", "directory/full"] {
        let tried = expose(&guest, &device, &dir.at(name), &[]).await;
        refused(tried, ErrorKind::Conflict);
        dir.assert_clean();
    }
    refused(guest.unmount(&dir.at("file")).await, ErrorKind::Conflict);
    // One that took the place of ours stays.
    expose(&guest, &device, &dir.at("node"), &[]).await.unwrap();
    fs::remove_file(dir.at("node")).unwrap();
    fs::write(dir.at("node"), "theirs").unwrap();
    guest.unmount(&dir.at("node")).await.unwrap();
    assert_eq!(fs::read_to_string(dir.at("node")).unwrap(), "theirs");
    fs::remove_file(dir.at("node")).unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_what_a_node_cannot_honour_is_refused() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    dir.settle();
    let guest = guest();
    for (names, kind) in [
        (&["ro"][..], ErrorKind::Unsuitable),
        (&["nodev"], ErrorKind::Unsuitable),
        (&["rshared"], ErrorKind::Unsuitable),
        (&["mode=7777"], ErrorKind::Invalid),
        (&["uid=somebody"], ErrorKind::Invalid),
    ] {
        let tried = expose(&guest, &device, &dir.at("node"), names).await;
        refused(tried, kind);
        dir.assert_clean();
    }
    fs::create_dir(dir.at("nodev")).unwrap();
    run(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            "nodev",
            "x",
            dir.at("nodev").to_str().unwrap(),
        ],
    );
    let tried = expose(&guest, &device, &dir.at("nodev/node"), &[]).await;
    umount(dir.at("nodev"));
    let message = refused(tried, ErrorKind::Unsuitable);
    assert!(message.contains("nodev"), "{message}");
}

#[tokio::test]
async fn root_a_node_whose_device_is_in_use_stays() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    fs::create_dir(dir.at("theirs")).unwrap();
    dir.settle();
    let guest = short_wait().build();
    let (node, theirs) = (dir.at("node"), dir.at("theirs"));
    expose(&guest, &device, &node, &[]).await.unwrap();
    let tried = kit::mount(&guest, &device, &dir.at("mnt"), &[]).await;
    refused(tried, ErrorKind::Conflict);
    run("mount", &[node.to_str().unwrap(), theirs.to_str().unwrap()]);
    let message = refused(guest.unmount(&node).await, ErrorKind::Busy);
    assert!(message.contains("theirs"), "{message}");
    assert!(node.exists());
    umount(theirs);
    guest.unmount(&node).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_a_partition_is_exposed_and_goes_after_its_node() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Gpt.copy(dir.path()));
    dir.settle();
    let guest = guest();
    let options = MountOptions::builder()
        .partition(2.try_into().unwrap())
        .expose(Expose::BlockDevice)
        .build()
        .unwrap();
    let node = dir.at("node");
    guest
        .mount(&device.locator(), &node, &options)
        .await
        .unwrap();
    run("e2fsck", &["-f", "-n", node.to_str().unwrap()]);
    guest.unmount(&node).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_a_node_outlives_its_guest_and_is_taken_over_or_left_alone() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Ext4.copy(dir.path()));
    let journal = dir.at("journal");
    drop(builder().journal(&journal).await.unwrap());
    dir.settle();
    let options = exposed(&["mode=0640"]);
    let node = dir.at("node");
    for replaced in [false, true] {
        let first = builder().journal(&journal).await.unwrap();
        expose(&first, &device, &node, &["mode=0640"])
            .await
            .unwrap();
        drop(first);
        if replaced {
            fs::remove_file(&node).unwrap();
            fs::write(&node, "theirs").unwrap();
        }
        let second = builder().journal(&journal).await.unwrap();
        let found = Mounter::adopt(&second, &device.locator(), &node, &options)
            .await
            .unwrap();
        assert_eq!(
            found,
            if replaced {
                Presence::Absent
            } else {
                Presence::Present(())
            }
        );
        if replaced {
            assert_eq!(fs::read_to_string(&node).unwrap(), "theirs");
            fs::remove_file(&node).unwrap();
        } else {
            second.unmount(&node).await.unwrap();
        }
        drop(second);
        fs::read_dir(&journal).unwrap().for_each(|left| {
            let left = left.unwrap().path();
            if left.extension().is_some_and(|end| end == "aside") {
                panic!("{}", left.display());
            }
        });
    }
}
